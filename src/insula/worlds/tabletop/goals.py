"""What is asked for: an instruction, and the placements that fulfill it. All of it is judged from the present state.

    "stack the red block on the blue block on the green block"
        1  put the blue block on the green block       ─┐ the sentence of the next placement is the subtask
        2  put the red block on the blue block         ─┘

A goal is the same for the judge (is it fulfilled), for the expert (what to do next) and for labels (in which words).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from insula.worlds.tabletop.facts import AT_REST, Table
from insula.worlds.tabletop.instructions import Relation, instruction

_OPEN = 0.8  # share of the opening: the fingers are off whatever they held


@dataclass(frozen=True)
class Placement:
    """One block, by its color, and where it shall lie: in the bowl, or on the block, of color `target`."""

    block: str
    target: str
    relation: Relation

    @property
    def text(self) -> str:
        """As an instruction: "put the red block on the blue block"."""
        return instruction(self.block, self.target, self.relation)


@dataclass(frozen=True)
class Goal:
    """`instruction` in words, and all of the `placements` it means: of a tower, the lowest first. `ordered`: it names
    their order, and another is wrong."""

    instruction: str
    placements: tuple[Placement, ...]
    ordered: bool = False


def fulfilled(table: Table, placement: Placement) -> bool:
    """Whether the block lies where it shall; a block that is held lies nowhere."""
    place = table.container if placement.relation == "in" else table.support
    return place(placement.block) == placement.target


def unfulfilled(table: Table, goal: Goal) -> list[Placement]:
    """The placements that are left, in the order of the goal."""
    return [placement for placement in goal.placements if not fulfilled(table, placement)]


def next_placement(table: Table, goal: Goal) -> Placement | None:
    """What to do now: the placement of the block that is held, else the first one that is left; None where nothing is.
    A placement must wait for that of its target: a tower is built from below."""
    left = unfulfilled(table, goal)
    moving = {placement.block for placement in left}
    ready = [placement for placement in left if placement.relation == "in" or placement.target not in moving]

    # Where the order is free, a block in hand is not put down again for the sake of another.
    in_hand = [placement for placement in ready if placement.block == table.held and not goal.ordered]
    return next(iter([*in_hand, *ready]), None)


def subtask(table: Table, goal: Goal) -> str:
    """The sentence of the next placement; of the last one, where nothing is left to do."""
    return (next_placement(table, goal) or goal.placements[-1]).text


def credit(table: Table, goal: Goal) -> float:
    """The share of placements that are fulfilled, 0 to 1; of an ordered goal, of those before the first that is not."""
    done = [fulfilled(table, placement) for placement in goal.placements]
    if goal.ordered:
        done = list(itertools.takewhile(bool, done))

    return sum(done) / len(goal.placements)


def achieved(table: Table, goal: Goal) -> bool:
    """Everything lies where it shall, at rest, and the gripper has let go."""
    still = all(table.block(placement.block).speed < AT_REST for placement in goal.placements)
    return not unfulfilled(table, goal) and table.opening > _OPEN and still


def misplaced(table: Table, goal: Goal, judge_stacks: bool) -> bool:
    """Whether a block lies in a bowl where no placement wants it, or, with `judge_stacks`, rests on such a block."""
    # Neither place counts a block that is held, so carrying one across a bowl is no mistake yet.
    lying = [(b.color, table.container(b.color), "in") for b in table.blocks]
    if judge_stacks:
        lying += [(b.color, table.support(b.color), "on") for b in table.blocks]

    wanted = {(placement.block, placement.target, placement.relation) for placement in goal.placements}
    return any(place is not None and (color, place, relation) not in wanted for color, place, relation in lying)
