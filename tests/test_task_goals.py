"""Goals of the tabletop's tasks: judge, labels and expert agree."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from task_worlds import INSIDE, NEW, OUT, SORT, TOWER, block, table, tower, undrawn_worlds

from insula.worlds.tabletop import demonstrator
from insula.worlds.tabletop.goals import Goal, achieved, credit, fulfilled, misplaced, next_placement, subtask
from insula.worlds.tabletop.tasks import TASKS


@pytest.fixture(scope="module")
def worlds():
    with undrawn_worlds() as made:
        yield made


# --- the judge, on tables made by hand ------------------------------------------------------------------------------


def test_placements_are_fulfilled_one_by_one():
    none, one = table(*OUT), table(block("red", -0.1, 0, INSIDE), *OUT[1:])
    both = table(block("red", -0.1, 0, INSIDE), block("blue", 0.1, 0, INSIDE), OUT[2])
    assert [credit(t, SORT) for t in (none, one, both)] == [0, 0.5, 1]
    assert [subtask(t, SORT) for t in (none, one, both)] == [SORT.placements[k].text for k in (0, 1, 1)]
    assert [next_placement(t, SORT) for t in (none, one, both)] == [*SORT.placements, None]
    assert not achieved(one, SORT) and achieved(both, SORT)
    assert not achieved(table(*both.blocks, opening=0.5), SORT)
    assert not achieved(table(block("red", -0.1, 0, INSIDE, speed=0.1), *both.blocks[1:]), SORT)
    assert credit(table(*both.blocks, held="blue"), SORT) == 0.5  # what is held lies nowhere


def test_a_block_in_hand_goes_first():
    assert next_placement(table(*OUT, held="blue"), SORT) == SORT.placements[1]
    assert next_placement(table(*OUT, held="green"), SORT) == SORT.placements[0]
    assert next_placement(table(*OUT, held="blue"), replace(SORT, ordered=True)) == SORT.placements[0]  # not its turn
    # But a tower waits for what is below.
    assert next_placement(table(*OUT, held="red"), TOWER) == TOWER.placements[0]


def test_an_order_gives_credit_up_to_the_first_that_is_left():
    ordered = replace(SORT, ordered=True)
    second = table(OUT[0], block("blue", 0.1, 0, INSIDE), OUT[2])
    first = table(block("red", -0.1, 0, INSIDE), *OUT[1:])
    assert [credit(second, goal) for goal in (SORT, ordered)] == [0.5, 0]
    assert [credit(first, goal) for goal in (SORT, ordered)] == [0.5, 0.5]


def test_a_tower_is_built_from_below():
    half_built = table(block("green", 0.0), block("blue", 0.0, z=0.06), block("red", 0.1))
    assert [credit(t, TOWER) for t in (table(*OUT), half_built, table(*tower()))] == [0, 0.5, 1]
    assert next_placement(table(*OUT), TOWER).text == "put the blue block on the green block"
    assert next_placement(half_built, TOWER).text == "put the red block on the blue block"
    # Red on blue, and blue on the table: the lower placement is what is left.
    upside_down = table(OUT[2], block("blue", 0.0), block("red", 0.0, z=0.06))
    assert next_placement(upside_down, TOWER) == TOWER.placements[0]


@pytest.mark.parametrize(
    "top",
    [
        block("red", 0.0, z=0.10, speed=0.3),  # falls past
        block("red", 0.025, z=0.10),  # its center is off the edge
        block("red", 0.0, z=0.11),  # in the air
        block("red", 0.0, z=0.09),  # leans
    ],
)
def test_on_is_face_on_face_and_at_rest(top):
    assert fulfilled(table(*tower()), TOWER.placements[1])
    assert not fulfilled(table(*tower()[:2], top), TOWER.placements[1])
    assert not fulfilled(table(*tower(), held="red"), TOWER.placements[1])


def test_wrong_places_are_wrong_and_right_ones_are_not():
    assert not misplaced(table(*OUT), SORT, judge_stacks=True)
    assert not misplaced(table(block("red", -0.1, 0, INSIDE), *OUT[1:]), SORT, True)
    assert misplaced(table(block("red", 0.1, 0, INSIDE), *OUT[1:]), SORT, True)
    assert misplaced(table(*OUT[:2], block("green", 0.1, 0, INSIDE)), SORT, True)
    assert not misplaced(table(block("red", 0.1, 0, INSIDE), *OUT[1:], held="red"), SORT, True)

    assert not misplaced(table(*tower()), TOWER, True)
    other = table(block("green", 0.0), block("red", 0.0, z=0.06), block("blue", 0.0, 0.1))
    assert misplaced(other, TOWER, True)
    assert not misplaced(other, TOWER, judge_stacks=False)  # as `put` always had it
    assert misplaced(table(block("blue", 0.1, 0, INSIDE), *OUT[::2]), TOWER, True)
    assert [name for name, task in TASKS.items() if not task.judge_stacks] == ["put"]


# --- the expert -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEW)
def test_the_expert_succeeds(worlds, name):
    rng = np.random.default_rng(0)
    episodes = [demonstrator.rollout(worlds[name], rng, 0.3, seed=seed) for seed in range(20)]
    assert sum(e.success for e in episodes) >= 18
    steps = np.mean([len(e.labels) for e in episodes])
    assert 1.5 * steps < TASKS[name].max_steps < 6 * steps
    assert all(len(e.subtasks) == len(e.labels) == len(e.observations) for e in episodes)


@pytest.mark.parametrize("name", NEW)
def test_the_other_goal_is_wrong_unless_it_is_asked_for(worlds, name):
    env = worlds[name]

    def drive(goal: Goal, **options: Any) -> dict[str, Any]:
        _, info = env.reset(seed=1, options=options)
        for _ in range(TASKS[name].max_steps):
            _, _, over, _, info = env.step(demonstrator.act(env.unwrapped.table(), goal))
            if over or credit(env.unwrapped.table(), goal) == 1:
                break
        return info

    env.reset(seed=1, options={"swap": True})
    other = env.unwrapped.goal
    asked, unasked = drive(other, swap=True), drive(other)
    assert asked["credit"] == 1 and not asked["wrong_object"]
    assert unasked["wrong_object"] and not unasked["success"]
    assert unasked["credit"] == 0


@pytest.mark.parametrize("order, credits", [((1, 0, 2), [0]), ((0, 2, 1), [0, 1]), ((0, 1, 2), [0, 1, 2, 3])])
def test_in_sort_a_block_out_of_turn_ends_the_episode(worlds, order, credits):
    env = worlds["sort"]
    env.reset(seed=2)
    asked, told = env.unwrapped.goal, []
    driven = Goal("driven", tuple(asked.placements[k] for k in order), ordered=True)
    for _ in range(TASKS["sort"].max_steps):
        _, reward, over, _, info = env.step(demonstrator.act(env.unwrapped.table(), driven))
        told.append(round(3 * info["credit"]))
        if over:
            break
        assert not info["wrong_object"]
    # Not by its limit: at the very step of the wrong block, and only there.
    right = order == (0, 1, 2)
    assert over and len(told) < TASKS["sort"].max_steps
    assert info["success"] == right and info["wrong_object"] == (not right) and reward == right
    assert runs(told) == credits


@pytest.mark.parametrize(
    ("seen", "wrong"), [("r rb", False), ("b", True), ("r . b", True), ("r . r rb", False), ("rb", False)]
)
def test_a_turn_is_kept_only_while_what_came_before_lies_there(worlds, seen, wrong):
    """Of red, then blue: what lies in its bowl, moment after moment."""
    env = worlds["sort"].unwrapped
    env.reset(seed=2)
    env._goal = replace(SORT, ordered=True)
    for lying in seen.split():
        red = block("red", -0.1, 0, INSIDE) if "r" in lying else OUT[0]
        blue = block("blue", 0.1, 0, INSIDE) if "b" in lying else OUT[1]
        env._judge(table(red, blue, OUT[2]))
    assert env._out_of_turn == env._wrong == wrong


@pytest.mark.parametrize("name", ["sort", "stack"])
def test_the_subtask_changes_exactly_when_a_placement_is_fulfilled(worlds, name):
    env, changes = worlds[name], 0
    for seed in range(4):
        env.reset(seed=seed)
        goal, known = env.unwrapped.goal, []
        for _ in range(TASKS[name].max_steps):
            label = demonstrator.act(env.unwrapped.table(), goal)
            _, _, over, _, info = env.step(label)
            known.append((info["credit"], info["subtask"]))
            if over:
                break
        for before, after in pairwise(known):
            last = after[0] == 1  # then there is none after it
            assert (before[1] != after[1]) == (before[0] != after[0] and not last), (seed, before, after)
            changes += before[1] != after[1]
        assert runs(text for _, text in known) == [placement.text for placement in goal.placements]
    assert changes >= 4


def runs(values: Iterable[Any]) -> list[Any]:
    """Each value once for each time it began."""
    return [value for value, _ in itertools.groupby(values)]
