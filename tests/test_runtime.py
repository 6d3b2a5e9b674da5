"""The loop a robot runs, with a clock that a test turns: it holds rather than guesses."""

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from insula.client.connection import Client, Reply
from insula.client.plan import Stitching
from insula.client.record import LOG_FILE, PICTURES_FOLDER, Recorder
from insula.client.runtime import Loop, RuntimeConfig, _Answer, _Asked, _Asker
from insula.errors import InputError, InsulaError, ProtocolError, ServerError

HZ = 10.0


class Arm:
    """Reports its step as its state, and remembers what it was told."""

    def __init__(self) -> None:
        self.step = -1
        self.done: list[float | None] = []

    def observe(self) -> dict[str, Any]:
        self.step += 1
        return {"images": {"front": np.zeros((4, 4, 3), np.uint8)}, "state": np.array([self.step], np.float32)}

    def act(self, action: np.ndarray) -> None:
        self.done.append(float(action[0]))

    def hold(self) -> None:
        self.done.append(None)


class World:
    """Simulated time, and an asker in it: what is asked at step k is answered `delay(k)` steps later, or fails then."""

    def __init__(self, delay: Callable[[int], int] = lambda step: 2, horizon: int = 8) -> None:
        self.now = 0.0
        self.delay = delay
        self.horizon = horizon
        self.asked: list[Mapping[str, Any]] = []
        self.errors: dict[int, InsulaError] = {}
        self.metadata: dict[str, Any] = {}
        self.client = self
        self.connected = True
        self.lost = 0
        self.failure = None
        self.last_step = -1000
        self._due: float | None = None

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    @property
    def idle(self) -> bool:
        return self._due is None

    def ask(self, asked: _Asked) -> None:
        self.asked.append(asked.observation)
        self.last_step = asked.step
        self._due = (asked.step + self.delay(asked.step)) / HZ

    def answers(self) -> list[_Answer]:
        if self._due is None or self.now + 1e-9 < self._due:
            return []

        self._due, step = None, self.last_step
        if step in self.errors:
            return [_Answer(step, None, self.errors[step])]
        actions = (100 * step + np.arange(self.horizon, dtype=np.float32))[:, None]
        return [_Answer(step, Reply(actions, 1000 * self.delay(step) / HZ, 1.0, 1.0, {}), None)]


def drive(world: World, steps: int, recorder: Recorder | None = None, **settings: Any) -> tuple[Arm, Any]:
    arm = Arm()
    return arm, make_loop(world, arm, recorder, **settings).run(steps)


def make_loop(world: World, arm: Arm, recorder: Recorder | None = None, **settings: Any) -> Loop:
    loop = Loop(Client("ws://nowhere"), arm, "task", RuntimeConfig(HZ, **settings), recorder, world.clock, world.sleep)
    loop._asker = world  # type: ignore[assignment]
    return loop


def test_it_holds_until_the_first_chunk_and_then_acts_from_its_start() -> None:
    """It has not moved since the observation: the middle of the chunk is for a robot that has."""
    arm, summary = drive(World(), steps=4)
    assert arm.done[:2] == [None, None]
    assert arm.done[2:4] == [0.0, 1.0]  # the chunk of step 0
    assert summary.held == 2 and summary.steps == 4


def test_no_action_is_executed_twice_and_none_behind_a_chunks_end() -> None:
    world = World(delay=lambda step: 2 if step == 0 else 1000, horizon=5)
    arm, summary = drive(world, steps=12)
    executed = [action for action in arm.done if action is not None]
    assert executed == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert arm.done[7:] == [None] * 6  # and once more at the end: it is left holding
    assert summary.replies == 1


def test_an_action_older_than_its_bound_is_not_executed() -> None:
    world = World(delay=lambda step: 2 if step == 0 else 1000, horizon=50)
    arm, _ = drive(world, steps=12, max_age_s=0.5)
    assert [action for action in arm.done if action is not None] == [0.0, 1.0, 2.0, 3.0]  # at steps 2 to 5


def test_after_an_error_it_holds_and_asks_anew() -> None:
    world = World(horizon=3)
    world.errors[2] = ServerError("gone")
    arm, _ = drive(world, steps=9)
    assert [int(asked["state"][0]) for asked in world.asked][:3] == [0, 2, 4]
    # It moved after it had seen what 4 and 6 were asked with, so these chunks are executed at their own place in time.
    assert arm.done[:9] == [None, None, 0.0, 1.0, 2.0, None, 402.0, None, 602.0]


def test_a_first_observation_that_is_refused_ends_it_with_the_reason() -> None:
    world = World()
    world.errors[0] = ProtocolError("invalid", "state", "expected 7 numbers")
    with pytest.raises(ProtocolError, match="expected 7 numbers"):
        drive(world, steps=5)


@pytest.mark.parametrize("kind", ["undecoded", "stale", "overloaded"])
def test_a_first_refusal_that_says_nothing_of_the_next_is_held_through(kind: str) -> None:
    world = World()
    world.errors[0] = ProtocolError(kind, "", "not this time")
    arm, summary = drive(world, steps=6)
    assert summary.refused == 1 and arm.done[:5] == [None, None, None, None, 200.0]


def test_a_later_refusal_is_counted_and_held_through() -> None:
    world = World(horizon=3)
    world.errors[2] = ProtocolError("stale", "", "waited")
    arm, summary = drive(world, steps=9)
    assert summary.refused == 1 and summary.replies >= 2
    assert arm.done[5] is None


def test_real_time_chunking_sends_what_is_left_and_the_longest_delay() -> None:
    world = World(delay=lambda step: 3)
    drive(world, steps=10, stitching=Stitching.RTC)
    first, second = world.asked[0], world.asked[1]
    assert "previous" not in first and first["max_age_ms"] == 2000
    assert second["previous"]["delay"] == 3
    assert second["previous"]["actions"][:, 0].tolist() == list(range(8))  # from the step of this observation on


def test_a_delay_longer_than_the_policy_was_trained_for_is_not_sent() -> None:
    world = World(delay=lambda step: 3)
    world.metadata = {"rtc_max_delay": 2}
    drive(world, steps=10, stitching=Stitching.RTC)
    assert all("previous" not in asked for asked in world.asked)


def test_what_is_left_is_not_sent_where_no_chunk_goes_on_from_it() -> None:
    """Not even where an answer takes no step at all."""
    for most, sent in ((0, False), (None, True)):
        world = World(delay=lambda step: 0)
        world.metadata = {"rtc_max_delay": most}
        drive(world, steps=10, stitching=Stitching.RTC)
        assert any("previous" in asked for asked in world.asked) is sent


def test_steps_that_were_missed_are_left_out_and_never_made_up_for() -> None:
    world = World(delay=lambda step: 1, horizon=20)
    arm = Arm()
    slow = arm.observe

    def observe() -> dict[str, Any]:
        if arm.step == 4:
            world.now += 0.55  # a camera that hangs for five steps and a half
        return slow()

    arm.observe = observe  # type: ignore[method-assign]
    summary = make_loop(world, arm, replan_steps=100).run(14)
    executed = [action for action in arm.done if action is not None]
    assert summary.missed == 5 and summary.steps == 9
    assert executed == [0.0, 1.0, 2.0, 3.0, 9.0, 10.0, 11.0, 12.0]


def test_the_log_has_every_step_reply_and_error(tmp_path: Path) -> None:
    world = World(horizon=4)
    world.errors[2] = ServerError("gone")
    with Recorder(tmp_path, every=5) as recorder:
        arm, summary = drive(world, 9, recorder)
    rows = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    steps = [row for row in rows if "state" in row]
    assert [row["step"] for row in steps] == list(range(9))
    assert [None if row["action"] is None else row["action"][0] for row in steps] == arm.done[:9]
    assert sum("chunk" in row for row in rows) == summary.replies
    assert [row["error"] for row in rows if "error" in row] == ["gone"]
    kept = sorted(path.name for path in (tmp_path / PICTURES_FOLDER).iterdir())
    assert kept == ["000000_front.png", "000005_front.png"]


class Flaky:
    """A client whose server goes at the second request, and comes back at the third attempt to connect."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.attempts = 0

    def infer(self, observation: Mapping[str, Any]) -> Reply:
        self.asked.append(int(observation["step"]))
        if len(self.asked) == 2:
            raise ServerError("gone")
        return Reply(np.zeros((2, 1), np.float32), 1.0, 1.0, 1.0, {})

    def wait(self, seconds: float) -> None:
        self.attempts += 1
        if self.attempts < 3:
            raise ServerError("not yet")

    def close(self) -> None:
        pass


def test_a_server_that_went_is_connected_to_again() -> None:
    client = Flaky()
    asker = _Asker(client)  # type: ignore[arg-type]
    asker.start()
    answers: list[_Answer] = []
    for step in range(3):
        asker.ask(_Asked(step, {"step": step}))
        while not asker.idle:
            time.sleep(0.001)
        answers += asker.answers()
    asker.stop()

    assert [answer.step for answer in answers] == [0, 1, 1, 2]  # lost, and once why it cannot connect
    assert [answer.error is None for answer in answers] == [True, False, False, True]
    assert (client.attempts, asker.lost, asker.connected) == (3, 1, True)
    assert client.asked == [0, 1, 2]  # what was lost is not asked again: it is too old by then


def test_a_server_that_goes_in_the_middle_of_the_handshake_is_a_server_that_is_gone() -> None:
    """And not an error of a kind that nobody expects, which ended the thread that connects again."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            for _ in range(20):
                connection, _ = listening.accept()
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
                connection.close()  # resets

        threading.Thread(target=hang_up, daemon=True).start()
        for _ in range(20):
            with pytest.raises(ServerError):
                Client(f"ws://127.0.0.1:{listening.getsockname()[1]}").connect()


def test_a_fault_of_ours_ends_the_loop_and_leaves_the_robot_holding() -> None:
    class Broken:
        connected = False

        def infer(self, observation: Mapping[str, Any]) -> Reply:
            raise ZeroDivisionError("ours")

        def close(self) -> None:
            pass

    arm = Arm()
    loop = Loop(Client("ws://nowhere"), arm, "task", RuntimeConfig(100.0))
    loop._asker = _Asker(Broken())  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError, match="ours"):
        loop.run(steps=1000)
    assert arm.done[-1] is None and set(arm.done) == {None}


def test_stopping_does_not_wait_for_a_server_that_is_gone() -> None:
    client = Flaky()
    client.attempts = -(10**9)
    asker = _Asker(client)  # type: ignore[arg-type]
    asker.start()
    for step in range(2):
        asker.ask(_Asked(step, {"step": step}))
        while step == 0 and not asker.idle:
            time.sleep(0.001)
    asker.stop()
    assert threading.active_count() >= 1 and asker.lost <= 1


@pytest.mark.parametrize(
    "settings", [{"hz": 0}, {"hz": float("nan")}, {"hz": 10, "replan_steps": 0}, {"hz": 10, "max_age_s": 0}]
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(reversed(settings))):
        RuntimeConfig(**settings)
