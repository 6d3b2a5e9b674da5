"""`distractors`: as `put`, among balls and cylinders of the blocks' own colors, so that color alone finds no block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from insula.worlds.tabletop.scene import (
    BLOCK_AREA,
    BLOCK_HALF,
    BOWL_RADIUS,
    BOWL_WALL,
    DISTRACTOR_RADIUS,
    draw_layout,
    draw_pair,
    far_from,
)
from insula.worlds.tabletop.tasks.pairs import PHRASINGS, other_pair, pair_goal
from insula.worlds.tabletop.tasks.task import Scene, Split, Task

SHAPES = ("ball", "cylinder", "ball")
# A block is squared up by the fingers before it is lifted: a corner may swing out by half its side.
_TO_BLOCK = 1.5 * BLOCK_HALF + DISTRACTOR_RADIUS + 0.016
_TO_BOWL = BOWL_RADIUS + BOWL_WALL + DISTRACTOR_RADIUS + 0.006
_APART = 2 * DISTRACTOR_RADIUS + 0.012


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    spots = None
    while spots is None:
        layout = draw_layout(rng)
        spots = _beside(rng, layout.block_poses[:, :2], layout.bowl_xy)

    # Each block's color once: whichever block is asked for, there is a thing of its color that is none.
    colors = tuple(layout.block_colors[i] for i in rng.permutation(len(SHAPES)))
    layout = replace(layout, distractor_colors=colors, distractor_xy=spots)

    pair = draw_pair(rng, layout)
    sentence = PHRASINGS.draw(rng, split)
    return Scene(layout, pair_goal(pair, sentence), pair_goal(other_pair(layout, pair), sentence))


def _beside(rng: np.random.Generator, blocks: np.ndarray, bowls: np.ndarray) -> np.ndarray | None:
    """Places [n, 2] for all distractors beside `blocks` [3, 2] and `bowls` [n, 2]; None where none were found."""
    spots = np.zeros((0, 2))
    for _ in range(100):
        point = rng.uniform(-1, 1, 2) * BLOCK_AREA
        if far_from(blocks, point, _TO_BLOCK) and far_from(bowls, point, _TO_BOWL) and far_from(spots, point, _APART):
            spots = np.concatenate([spots, point[None]])
        if len(spots) == len(SHAPES):
            return spots

    return None


DISTRACTORS = Task(
    "distractors", "one block among balls and cylinders of its color", _draw, 100, distractors=SHAPES, takes_pair=True
)
