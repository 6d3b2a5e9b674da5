"""The example that drives a LeRobot arm, with an arm that has its interface and no motors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lerobot_arm import LeRobotArm, MadeUpArm, drive
from live_server import Scripted, serving

from insula.client import Client
from insula.errors import InputError, ServerError

TOLD = {"server": "insula", "robot": "arm", "cameras": ["front", "wrist"], "state_dim": 3, "action_dim": 2}
CHUNK = np.arange(40, dtype=np.float32).reshape(20, 2)


@pytest.fixture(scope="module")
def backend() -> Scripted:
    return Scripted(lambda request: CHUNK, TOLD)


@pytest.fixture(scope="module")
def url(backend: Scripted) -> Iterator[str]:
    with serving(backend) as url:
        yield url


class Noted(MadeUpArm):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(3, 2, ["front", "wrist"])
        self.told: list[dict[str, float]] = []

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.told.append(action)
        return super().send_action(action)


def test_it_is_told_by_name_what_the_policy_says_by_place(url: str, backend: Scripted) -> None:
    arm = Noted()
    done = drive(Client(url), arm, "put it away", hz=50.0, steps=30)
    assert not arm.is_connected
    assert len(arm.told) == done.steps - done.held > 0
    for action in arm.told:
        assert list(action) == ["joint_0.pos", "joint_1.pos"]
        assert [*action.values()] in CHUNK.tolist() or done.replies > 1  # RTC's chunks follow one another

    seen = backend.asked[0].observation
    assert (seen["task"], seen["state"].tolist()) == ("put it away", [0, 0, 0])
    assert {name: picture.shape for name, picture in seen["images"].items()} == {
        "front": (48, 64, 3),
        "wrist": (48, 64, 3),
    }


def test_joints_are_read_in_the_robot_s_own_order() -> None:
    arm = MadeUpArm(3, 2, ["front", "wrist"])
    arm.connect()
    arm.send_action({"joint_0.pos": 0.25, "joint_1.pos": 0.5})
    np.testing.assert_array_equal(LeRobotArm(arm, TOLD).observe()["state"], np.float32([0.25, 0.5, 0]))


def test_holding_tells_its_motors_nothing() -> None:
    arm = Noted()
    LeRobotArm(arm, TOLD).hold()
    assert arm.told == []


def test_an_arm_that_does_not_fit_is_refused() -> None:
    for arm, said in (
        (MadeUpArm(2, 2, ["front", "wrist"]), "2 joints"),
        (MadeUpArm(3, 6, ["front", "wrist"]), "6 actions"),
        (MadeUpArm(3, 2, ["front", "top"]), "no camera 'wrist'"),
    ):
        with pytest.raises(InputError, match=said):
            LeRobotArm(arm, TOLD)


def test_it_is_disconnected_where_there_is_no_server() -> None:
    arm = Noted()
    with pytest.raises(ServerError, match="cannot be reached"):
        drive(Client("ws://127.0.0.1:1"), arm, "put it away", hz=50.0, steps=30)
    assert not arm.is_connected and arm.told == []
