"""LeRobot's robots as clients of a policy server, by the plugin of plugins/. Skipped where LeRobot is not installed
(`make lerobot PYTHON=PATH`)."""

import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot_policy_insula", exc_type=ImportError)

import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.robots import Robot
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_arm import LeRobotRobot, MadeUpArm
from live_server import OBSERVATION, serving, small_policy

from insula.errors import ProtocolError, ServerError
from insula.policy import Policy
from insula.serve.policy_backend import PolicyBackend


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return small_policy(tmp_path_factory.mktemp("lerobot"))


@pytest.fixture
def url(policy: Policy) -> Iterator[str]:
    """A server of its own for each test: its noise begins anew."""
    with serving(PolicyBackend(policy, "small", "none")) as url:
        yield url


def config_for(url: str, **more: object) -> PreTrainedConfig:
    register_third_party_plugins()
    choice = PreTrainedConfig.get_choice_class("insula")
    return choice(url=url, device="cpu", cameras={"front": "top"}, **more)


def frame() -> dict:
    """As a LeRobot robot gives it: pictures float [3, h, w] in 0 to 1."""
    images = {"top": OBSERVATION["images"]["front"], "wrist": OBSERVATION["images"]["wrist"]}
    pictures = {
        f"observation.images.{name}": torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        for name, picture in images.items()
    }
    return {"observation.state": torch.from_numpy(OBSERVATION["state"]), "task": OBSERVATION["task"]} | pictures


def test_it_is_found_by_name_and_acts_as_the_policy_does(url: str, policy: Policy) -> None:
    config = config_for(url)
    robot = get_policy_class("insula")(config)
    before, after = make_pre_post_processors(config)

    actions = [after(robot.select_action(before(frame()))).numpy() for _ in range(8)]
    # Two chunks of 4. The backend draws the noise of request n by (n,); compiling took the first numbers.
    assert all(action.shape == (1, 3) for action in actions)
    chunk = np.concatenate(actions[:4])
    drawn = [policy.act(OBSERVATION, seed=(n,)) for n in range(8)]
    assert min(np.abs(chunk - one).max() for one in drawn) < 1e-4

    # The control: neither is the second chunk the first, nor does another state get the same.
    assert np.abs(np.concatenate(actions[4:]) - chunk).max() > 1e-3


def test_fewer_actions_of_a_chunk(url: str) -> None:
    robot = get_policy_class("insula")(config_for(url, n_action_steps=1))
    before, _ = make_pre_post_processors(robot.config)
    first, second = (robot.select_action(before(frame())) for _ in range(2))
    assert (first != second).any() and not robot._due


def test_from_a_directory(url: str, tmp_path: Path) -> None:
    """As `--policy.path` reads it. There is no file of weights."""
    get_policy_class("insula")(config_for(url, n_action_steps=2))._save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    robot = get_policy_class("insula").from_pretrained(tmp_path, config=config)
    assert (robot.config.url, robot.config.n_action_steps, robot.config.cameras) == (url, 2, {"front": "top"})
    assert robot.predict_action_chunk(batched(frame())).shape == (1, 4, 3)


def test_a_refusal_and_a_server_that_is_gone_are_errors(url: str) -> None:
    robot = get_policy_class("insula")(config_for(url))
    wrong = frame() | {"observation.state": torch.zeros(5)}
    with pytest.raises(ProtocolError, match="state"):
        robot.predict_action_chunk(batched(wrong))
    with pytest.raises(ServerError, match="cannot be reached"):
        get_policy_class("insula")(config_for("ws://127.0.0.1:1")).predict_action_chunk(batched(frame()))


def test_the_made_up_arm_of_the_example_has_the_interface_of_lerobot_s() -> None:
    """What the example uses of a robot is there by these names, with these parameters."""
    used = [name for name in vars(LeRobotRobot) if callable(getattr(LeRobotRobot, name)) and not name.startswith("_")]
    assert {"connect", "get_observation", "send_action", "disconnect"} <= set(used)
    for name in used:
        theirs, ours = (inspect.signature(getattr(robot, name)).parameters for robot in (Robot, MadeUpArm))
        assert list(theirs) == list(ours), name
    for name in ("observation_features", "action_features"):
        assert isinstance(vars(Robot)[name], property)


def batched(one: dict) -> dict:
    return {name: value if isinstance(value, str) else value[None] for name, value in one.items()}
