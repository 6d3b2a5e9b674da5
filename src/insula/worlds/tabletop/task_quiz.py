"""Questions about what the harder tasks turn on, beside those of quiz.py, which stay as they are: the embedded backbone
was trained on them.

    kind       question                                                     answer
    size       which block is the largest                                   the red block
    beside     which block is left of the blue bowl                         the red block
    distance   which block is nearest to the blue bowl                      the red block
    stacked    what is on the blue block                                    the red block | nothing
               is the red block on the blue block                           yes | no
    next       stack the red block on the blue block: what is next          put the red block on the blue block

As there, a question is asked only where its answer is plainly true, and no answer tells a robot action.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from insula.errors import InputError, did_you_mean
from insula.worlds.tabletop.facts import AT_REST, Table
from insula.worlds.tabletop.goals import Goal, next_placement
from insula.worlds.tabletop.quiz import Pairs
from insula.worlds.tabletop.relations import describe

_APART = 0.045  # meters, between centers: at least this, and neither of two blocks is on the other


def _described(*kinds: str) -> Callable[[Table, Goal], Pairs]:
    """Asks which block is what, for these kinds of relations."""

    def asker(table: Table, goal: Goal) -> Pairs:
        # A block in the air is drawn elsewhere than above where it is: only its size can be seen.
        known = describe(table.blocks, table.bowls) if table.held is None else describe(table.blocks, ())
        return [(found.question, f"the {found.block} block") for found in known if found.kind in kinds]

    return asker


def _stacked(table: Table, goal: Goal) -> Pairs:
    # What moves may be about to lie elsewhere.
    if table.held is not None or any(block.speed > AT_REST for block in table.blocks):
        return []

    pairs: Pairs = []
    for lower in table.blocks:
        others = [block for block in table.blocks if block is not lower]
        on = [block.color for block in others if table.support(block.color) == lower.color]
        beside = [b.color for b in others if np.hypot(*(b.position - lower.position)[:2]) >= _APART]

        question = f"is the {{}} block on the {lower.color} block"
        pairs += [(question.format(color), "yes") for color in on]
        pairs += [(question.format(color), "no") for color in beside]

        if len(on) == 1 or len(beside) == len(others):
            answer = f"the {on[0]} block" if on else "nothing"
            pairs.append((f"what is on the {lower.color} block", answer))

    return pairs


def _next(table: Table, goal: Goal) -> Pairs:
    # Where all is done there is no next thing, and a label that says so only for want of another is no truth.
    placement = next_placement(table, goal)
    return [] if placement is None else [(f"{goal.instruction}: what is next", placement.text)]


_ASKERS: dict[str, Callable[[Table, Goal], Pairs]] = {
    "size": _described("largest", "smallest"),
    "beside": _described("left", "right"),
    "distance": _described("nearest", "farthest"),
    "stacked": _stacked,
    "next": _next,
}
TASK_KINDS = tuple(_ASKERS)


def task_questions(table: Table, goal: Goal, kind: str) -> Pairs:
    """Every (question, answer) of one kind that has a plain answer here. Raises InputError for an unknown kind."""
    if kind not in _ASKERS:
        known = f"expected one of {', '.join(TASK_KINDS)}{did_you_mean(kind, TASK_KINDS)}"
        raise InputError(f"question kind: got {kind!r}, {known}")

    return _ASKERS[kind](table, goal)
