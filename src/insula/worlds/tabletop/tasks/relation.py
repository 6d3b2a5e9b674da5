"""`relation`: the block is named by its size or its place, the bowl by its color. Only plain truths are asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from insula.worlds.tabletop.facts import Block, Bowl
from insula.worlds.tabletop.goals import Goal, Placement
from insula.worlds.tabletop.relations import KINDS, Description, describe
from insula.worlds.tabletop.scene import BLOCKS, SceneLayout, draw_layout
from insula.worlds.tabletop.tasks.task import Phrasings, Scene, Split, Task

HALVES = (0.016, 0.020, 0.024)  # of the blocks' sides, meters
PHRASINGS = Phrasings(
    train=(
        "put {block} in the {bowl} bowl",
        "move {block} to the {bowl} bowl",
        "place {block} into the {bowl} bowl",
    ),
    held_out=("move {block} into the {bowl} bowl", "{block} goes in the {bowl} bowl"),
)


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    # The kind first: drawn from what is true of a scene, sizes, which always are, would crowd out places.
    kind = KINDS[rng.integers(len(KINDS))]
    fitting: list[Description] = []
    while not fitting:
        layout = _resized(draw_layout(rng), rng.permutation(HALVES))
        known = _describe(layout)
        fitting = [found for found in known if found.kind == kind]

    asked = fitting[rng.integers(len(fitting))]
    # There always is one: the largest and the smallest are two blocks.
    others = [found for found in known if found.block != asked.block]
    other = others[rng.integers(len(others))]

    bowl, other_bowl = (layout.bowl_colors[i] for i in rng.permutation(len(layout.bowl_colors)))
    sentence = PHRASINGS.draw(rng, split)
    return Scene(layout, _goal(asked, bowl, sentence), _goal(other, other_bowl, sentence))


def _resized(layout: SceneLayout, halves: np.ndarray) -> SceneLayout:
    poses = layout.block_poses.copy()
    poses[:, 2] = halves  # lying on the table
    return replace(layout, block_poses=poses, block_halves=tuple(halves.tolist()))


def _describe(layout: SceneLayout) -> list[Description]:
    blocks = [
        Block(layout.block_colors[i], layout.block_poses[i, :3], layout.block_poses[i, 3], 0.0, layout.block_halves[i])
        for i in range(BLOCKS)
    ]
    bowls = [Bowl(color, np.array([*xy, 0.0])) for color, xy in zip(layout.bowl_colors, layout.bowl_xy, strict=True)]
    return describe(blocks, bowls)


def _goal(asked: Description, bowl: str, sentence: str) -> Goal:
    return Goal(sentence.format(block=asked.noun, bowl=bowl), (Placement(asked.block, bowl, "in"),))


RELATION = Task("relation", "a block named by its size or place, into one bowl", _draw, 100)
