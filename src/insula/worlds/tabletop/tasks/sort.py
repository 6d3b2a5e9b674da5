"""`sort`: three blocks, each into the bowl of its own color."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from insula.worlds.tabletop.goals import Goal, Placement
from insula.worlds.tabletop.instructions import COLORS
from insula.worlds.tabletop.scene import BLOCKS, arrange, place_blocks
from insula.worlds.tabletop.tasks.task import Phrasings, Scene, Split, Task

_SPACING = 0.14  # of the bowls in their row, which are 0.13 wide
_ROW, _JITTER = 0.072, (0.004, 0.012)  # meters: of the row from the middle of the table, along y; of each bowl
PHRASINGS = Phrasings(
    train=(
        "sort the blocks into the bowls of their own color",
        "put each block in the bowl of its own color",
        "move every block to the bowl of the same color",
    ),
    held_out=("sort every block into the bowl of its own color", "put each block in the bowl of the same color"),
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

    # In the order of `COLORS`, which a picture shows, and not in the order in which they were drawn.
    colors = [color for color in COLORS if color in layout.block_colors]
    placements = tuple(Placement(color, color, "in") for color in colors)
    return Scene(layout, Goal(PHRASINGS.draw(rng, split), placements), None)


SORT = Task("sort", "three blocks, each into the bowl of its color", _draw, 250, bowls=BLOCKS, can_swap=False)
