"""`unseen-pairs`: as `put`, but six of the 36 pairs of colors never occur in demonstrations, and are what is evaluated.

Every color is held out once as a block's and once as a bowl's: each word of the sentence is known, and each thing.
"""

from __future__ import annotations

import numpy as np

from insula.worlds.tabletop.goals import Goal
from insula.worlds.tabletop.instructions import COLORS
from insula.worlds.tabletop.scene import draw_layout
from insula.worlds.tabletop.tasks.pairs import Pair, pair_goal
from insula.worlds.tabletop.tasks.task import Scene, Split, Task

HELD_OUT_PAIRS: tuple[Pair, ...] = tuple(zip(COLORS, (*COLORS[2:], *COLORS[:2]), strict=True))
"""Red in blue, green in yellow, blue in purple, yellow in orange, purple in red, orange in green."""


def asks_held_out(goal: Goal) -> bool:
    """Whether a block goes into a bowl of its held-out color, whatever the task and however it is said."""
    return any((one.block, one.target) in HELD_OUT_PAIRS and one.relation == "in" for one in goal.placements)


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    # The other goal is of the same split, too. In training there always is one; few scenes have two pairs held out.
    while True:
        layout = draw_layout(rng)
        pairs = [(block, bowl) for block in layout.block_colors for bowl in layout.bowl_colors]
        asked = [pair for pair in pairs if (pair in HELD_OUT_PAIRS) == (split == "held_out")]
        if not asked:
            continue

        block, bowl = asked[rng.integers(len(asked))]
        others = [pair for pair in asked if pair[0] != block and pair[1] != bowl]
        if others:
            return Scene(layout, pair_goal((block, bowl)), pair_goal(others[rng.integers(len(others))]))


UNSEEN_PAIRS = Task("unseen-pairs", "pairs of colors that no demonstration shows", _draw, 100, takes_pair=True)
