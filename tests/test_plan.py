"""Which action is due: never one twice, never one from behind a chunk's end, never one that is too old."""

import numpy as np
import pytest

from insula.client.plan import ENSEMBLE_DECAY, Plan, Stitching


def chunk(name: int, steps: int = 6) -> np.ndarray:
    """[H, 1]: the hundreds say whose, the rest which step."""
    return (100 * name + np.arange(steps, dtype=np.float32))[:, None]


def due(plan: Plan, steps: range) -> list[float | None]:
    found = [plan.action(step) for step in steps]
    return [None if action is None else float(action[0]) for action in found]


def test_a_chunk_is_executed_at_its_own_place_in_time() -> None:
    plan = Plan()
    plan.add(4, chunk(1))
    assert due(plan, range(3, 11)) == [None, 100, 101, 102, 103, 104, 105, None]


def test_a_chunk_that_comes_late_starts_in_its_middle() -> None:
    plan = Plan()
    plan.add(4, chunk(1))
    assert due(plan, range(4, 8)) == [100, 101, 102, 103]
    plan.add(6, chunk(2))
    assert due(plan, range(8, 13)) == [202, 203, 204, 205, None]


def test_a_chunk_starts_later_for_a_robot_that_has_held() -> None:
    """And ends later; but an action is as old as what was seen."""
    plan = Plan(max_age=5)
    plan.add(4, np.arange(4.0)[:, None], start=7)
    assert plan.action(6) is None and plan.origin(7) == 4
    assert [plan.action(step) for step in (7, 8, 9)] == [0.0, 1.0, 2.0]
    assert plan.left(8) is not None and plan.left(8).tolist() == [[1.0], [2.0], [3.0]]
    assert not plan.add(4, np.zeros((4, 1)), start=9)
    assert plan.action(10) is None  # six steps after it was seen


def test_an_older_chunk_never_comes_back() -> None:
    plan = Plan()
    assert plan.add(6, chunk(2))
    assert not plan.add(4, chunk(1, steps=20))
    assert due(plan, range(10, 14)) == [204, 205, None, None]


def test_an_action_that_is_too_old_is_not_executed() -> None:
    plan = Plan(max_age=2)
    plan.add(4, chunk(1))
    assert due(plan, range(4, 9)) == [100, 101, 102, None, None]


def test_ensembling_weighs_the_oldest_most() -> None:
    plan = Plan(Stitching.ENSEMBLE)
    plan.add(0, chunk(1))
    plan.add(2, chunk(2))
    old, new = 102.0, 200.0
    weight = np.exp(-ENSEMBLE_DECAY)
    assert due(plan, range(2, 3)) == [pytest.approx((old + weight * new) / (1 + weight))]
    assert old < due(plan, range(2, 3))[0] < (old + new) / 2  # type: ignore[operator]
    assert due(plan, range(6, 9)) == [204, 205, None]  # the first has ended


def test_what_is_left_is_of_the_newest_chunk_alone() -> None:
    plan = Plan(Stitching.RTC)
    assert plan.left(0) is None
    plan.add(0, chunk(1))
    plan.add(3, chunk(2))
    left = plan.left(5)
    assert left is not None and left[:, 0].tolist() == [202, 203, 204, 205]
    assert plan.left(9) is None


def test_the_origin_is_that_of_the_newest_observation_behind_an_action() -> None:
    for stitching in Stitching:
        plan = Plan(stitching)
        plan.add(0, chunk(1))
        plan.add(2, chunk(2))
        assert (plan.origin(3), plan.origin(7), plan.origin(8)) == (2, 2, None)


def test_a_new_episode_starts_with_nothing() -> None:
    plan = Plan()
    plan.add(0, chunk(1))
    plan.clear()
    assert plan.action(1) is None
    assert plan.add(0, chunk(2))
