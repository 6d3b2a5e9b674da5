"""`unseen-pairs`: as `put`, but twelve of the 36 pairs of colors never occur in demonstrations. They are evaluated.

Every color is held out twice as a block's and twice as a bowl's: each word of the sentence is known, and each thing.
The bowl that is not asked for is one that this block does go into in demonstrations: a policy that knows pairs by
heart, rather than words, goes there.
"""

from __future__ import annotations

import numpy as np

from insula.worlds.tabletop.goals import Goal
from insula.worlds.tabletop.instructions import COLORS
from insula.worlds.tabletop.scene import SceneLayout, draw_layout
from insula.worlds.tabletop.tasks.pairs import Pair, pair_goal
from insula.worlds.tabletop.tasks.task import Scene, Split, Task

HELD_OUT_PAIRS: tuple[Pair, ...] = tuple(
    (block, COLORS[(i + step) % len(COLORS)]) for i, block in enumerate(COLORS) for step in (2, 3)
)
"""Red in blue or yellow, green in yellow or purple, and so on around `COLORS`."""


def asks_held_out(goal: Goal) -> bool:
    """Whether a block goes into a bowl of its held-out color, whatever the task and however it is said."""
    return any((one.block, one.target) in HELD_OUT_PAIRS and one.relation == "in" for one in goal.placements)


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    # The other goal is of the same split, too. In training there always is one; few scenes have two pairs held out.
    while True:
        layout = draw_layout(rng)
        asked = _pairs(layout, split)
        if not asked:
            continue

        block, bowl = asked[rng.integers(len(asked))]
        others = [pair for pair in asked if pair[0] != block and pair[1] != bowl]
        if others:
            return Scene(layout, pair_goal((block, bowl)), pair_goal(others[rng.integers(len(others))]))


def _pairs(layout: SceneLayout, split: Split) -> list[Pair]:
    """What may be asked of this scene: pairs that are shown, or pairs held out of blocks that know the other bowl."""
    pairs = [(block, bowl) for block in layout.block_colors for bowl in layout.bowl_colors]
    shown = [pair for pair in pairs if pair not in HELD_OUT_PAIRS]
    if split == "train":
        return shown

    tempted = {block for block, _ in shown}
    return [pair for pair in pairs if pair in HELD_OUT_PAIRS and pair[0] in tempted]


UNSEEN_PAIRS = Task("unseen-pairs", "pairs of colors that no demonstration shows", _draw, 100, takes_pair=True)
