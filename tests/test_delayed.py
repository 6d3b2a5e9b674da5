"""A delay in closed loop: what is executed meanwhile is the last chunk, and nothing is invented."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from insula.client.plan import Plan, Stitching
from insula.errors import InputError
from insula.evaluate.delayed import Delay, DelayedPolicy

HOLD = np.array([0.0, np.nan])


class Counts:
    """Chunks that say by which step they were asked for, and which step of the chunk each is."""

    def __init__(self, horizon: int = 8) -> None:
        self.horizon = horizon
        self.asked: list[dict[str, Any]] = []

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        return self.act_batch([observation], [(0, 0)])[0]

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        self.asked += observations
        rows = [[[100 * seed[-1] + i, 1] for i in range(self.horizon)] for seed in seeds]
        return np.array(rows, np.float32)


def play(policy: DelayedPolicy, cycles: int, scene: int = 7) -> list[float]:
    """The first dimension of what is executed, from the start of an episode."""
    done: list[float] = []
    for _ in range(cycles):
        done += executed(policy, (scene, len(done)))[:, 0].tolist()
    return done


def executed(policy: DelayedPolicy, seed: tuple[int, ...]) -> np.ndarray:
    """Until the next chunk is asked for, [period, D]."""
    return policy.act_batch([{"state": 0}], [seed])[0][: policy.period]


def test_without_a_delay_the_policy_is_as_it_is() -> None:
    policy = DelayedPolicy(Counts(), Delay(), period=2, hold=HOLD)
    assert play(policy, 3) == [0, 1, 200, 201, 400, 401]


def test_the_last_chunk_is_executed_until_the_next_one_is_there() -> None:
    policy = DelayedPolicy(Counts(), Delay(2), period=3, hold=HOLD)
    # Held for two steps, then from the first chunk's start on, as it has not moved; then always two steps late.
    assert play(policy, 3) == [0, 0, 0, 1, 2, 302, 303, 304, 602]


def test_nothing_is_executed_from_behind_a_chunks_end() -> None:
    policy = DelayedPolicy(Counts(horizon=4), Delay(4), period=4, hold=HOLD)
    played = executed(policy, (7, 0))
    assert played.tolist() == [[0, 0]] * 4  # no gripper was closed before
    assert executed(policy, (7, 4)).tolist() == [[0, 1], [1, 1], [2, 1], [3, 1]]
    assert executed(policy, (7, 8)).tolist() == [[0, 1]] * 4  # that of step 4 had ended when it came


@pytest.mark.parametrize("stitching", Stitching)
def test_behind_what_is_executed_is_what_would_follow(stitching: Stitching) -> None:
    """Told ahead of time, and never forgotten for it: the next rows are the same, asked for or not."""
    policy = DelayedPolicy(Counts(), Delay(2, stitching=stitching), period=3, hold=HOLD)
    first, second = (policy.act_batch([{}], [(7, step)])[0] for step in (0, 3))
    assert first[:, 0].tolist() == [0, 0, *range(8)]
    ensemble = stitching is Stitching.ENSEMBLE
    assert second[:2, 0].tolist() == [1, 2] and second[-1, 0] == 307
    assert len(second) == 8 and (second[2, 0] == 302) is not ensemble  # there it is a mean with the first chunk's

    class Blind(Plan):
        def ahead(self, step: int) -> list[np.ndarray]:
            return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("insula.evaluate.delayed.Plan", Blind)
        unasked = play(DelayedPolicy(Counts(), Delay(2, stitching=stitching), period=3, hold=HOLD), 6)
    assert play(DelayedPolicy(Counts(), Delay(2, stitching=stitching), period=3, hold=HOLD), 6) == unasked


def test_steps_in_which_it_held_are_kept_by_episode() -> None:
    policy = DelayedPolicy(Counts(horizon=4), Delay(4), period=4, hold=HOLD)
    for step in (0, 4, 8):
        policy.act_batch([{}, {}, {}], [(7, step), (8, step), (7, step)])  # the last only fills the batch
    assert policy.held == {(7,): [0, 1, 2, 3, 8, 9, 10, 11], (8,): [0, 1, 2, 3, 8, 9, 10, 11]}
    policy.act_batch([{}], [(7, 0)])  # again
    assert policy.held[7,] == [0, 1, 2, 3]
    waiting = DelayedPolicy(Counts(), Delay(), period=4, hold=HOLD)
    play(waiting, 3)
    assert waiting.held == {(7,): []}


def test_a_held_gripper_stays_as_it_was() -> None:
    policy = DelayedPolicy(Counts(horizon=5), Delay(4), period=5, hold=HOLD)
    assert executed(policy, (7, 0)).tolist() == [[0, 0]] * 4 + [[0, 1]]
    assert executed(policy, (7, 5)).tolist() == [[1, 1], [2, 1], [3, 1], [4, 1], [504, 1]]
    assert executed(policy, (7, 10)).tolist() == [[0, 1]] * 4 + [[1000, 1]]  # as it had held


def test_an_episode_does_not_see_its_neighbors_or_what_was_before() -> None:
    alone = play(DelayedPolicy(Counts(), Delay(2, 1), period=3, hold=HOLD), 5)
    policy = DelayedPolicy(Counts(), Delay(2, 1), period=3, hold=HOLD)
    together: list[float] = []
    for _ in range(5):
        step = len(together)
        rows = policy.act_batch([{}, {}, {}], [(3, step), (7, step), (3, step)])
        assert np.array_equal(rows[0], rows[2])  # a row that only fills the batch
        together += rows[1][: policy.period, 0].tolist()
    assert together == alone
    assert play(policy, 5) == alone  # the same episode again


def test_jitter_moves_the_switch_and_is_drawn_by_the_episode() -> None:
    steady = play(DelayedPolicy(Counts(), Delay(2), period=4, hold=HOLD), 20)
    jittery = play(DelayedPolicy(Counts(), Delay(2, 2), period=4, hold=HOLD), 20)
    assert steady != jittery
    assert play(DelayedPolicy(Counts(), Delay(2, 2), period=4, hold=HOLD), 20, scene=8) != jittery


def test_real_time_chunking_is_told_what_is_left_and_how_long_it_takes() -> None:
    counts = Counts()
    play(DelayedPolicy(counts, Delay(2, stitching=Stitching.RTC), period=3, hold=HOLD), 2)
    first, second = counts.asked
    # Nothing is left, and it is said: without any, a row would run another program than beside others.
    assert first["previous"]["actions"].shape == (0, 2) and first["previous"]["delay"] == 0
    assert second["previous"]["delay"] == 2
    assert second["previous"]["actions"][:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_jumps_are_where_one_chunk_follows_another() -> None:
    policy = DelayedPolicy(Counts(), Delay(2), period=3, hold=HOLD, moves=slice(0, 1))
    play(policy, 3)
    assert policy.jumps == [302 - 2, 602 - 304]


@pytest.mark.parametrize(("steps", "jitter"), [(-1, 0), (2, 3), (0, 1)])
def test_a_delay_that_cannot_be_is_named(steps: int, jitter: int) -> None:
    with pytest.raises(InputError, match="delay is"):
        Delay(steps, jitter)


def test_a_chunk_must_be_there_before_the_next_is_asked_for() -> None:
    with pytest.raises(InputError, match="delay of up to 5 steps"):
        DelayedPolicy(Counts(), Delay(4, 1), period=4, hold=HOLD)
    with pytest.raises(InputError, match="chunks have 8 steps"):
        play(DelayedPolicy(Counts(), Delay(9), period=9, hold=HOLD), 1)
