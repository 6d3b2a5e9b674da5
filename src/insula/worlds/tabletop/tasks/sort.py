"""`sort`: three blocks, each into the bowl of its own color, in the order that the sentence names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from insula.worlds.tabletop.goals import Goal, Placement
from insula.worlds.tabletop.scene import BLOCKS, arrange, place_blocks
from insula.worlds.tabletop.tasks.task import Phrasings, Scene, Split, Task

_SPACING = 0.14  # of the bowls in their row, which are 0.13 wide
_ROW, _JITTER = 0.072, (0.004, 0.012)  # meters: of the row from the middle of the table, along y; of each bowl
PHRASINGS = Phrasings(
    train=(
        "sort the blocks {first} then {second} then {third}",
        "sort the {first} block then the {second} block then the {third} block",
        "put each block in the bowl of its color {first} then {second} then {third}",
    ),
    held_out=(
        "put each of the blocks in its bowl {first} then {second} then {third}",
        "sort each block {first} then {second} then {third}",
    ),
)


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    # In a row, at the back or at the front: three bowls and three blocks with room for the fingers fit in no other way.
    row = np.stack([_SPACING * np.array([-1.0, 0.0, 1.0]), np.full(BLOCKS, _ROW * rng.choice([-1, 1]))], axis=1)
    blocks = None
    while blocks is None:
        bowls = row + rng.uniform(-1, 1, (BLOCKS, 2)) * _JITTER
        blocks = place_blocks(rng, bowls)

    layout = arrange(rng, bowls, blocks)
    layout = replace(layout, bowl_colors=tuple(layout.block_colors[i] for i in rng.permutation(BLOCKS)))

    # Blocks have their colors by chance, so any order of them is as likely. The other: none comes when it would have.
    first, second, third = layout.block_colors
    sentence = PHRASINGS.draw(rng, split)
    return Scene(layout, _goal((first, second, third), sentence), _goal((second, third, first), sentence))


def _goal(colors: tuple[str, str, str], sentence: str) -> Goal:
    words = dict(zip(("first", "second", "third"), colors, strict=True))
    return Goal(sentence.format(**words), tuple(Placement(color, color, "in") for color in colors), ordered=True)


SORT = Task("sort", "three blocks, each into the bowl of its color, in the order named", _draw, 250, bowls=BLOCKS)
