"""`moving`: as `put`, while both bowls drift to and fro. Their ways keep clear of each other and of the blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from insula.worlds.tabletop.scene import (
    BOWL_AREA,
    BOWL_TO_BOWL,
    BOWLS,
    Path,
    arrange,
    draw_pair,
    far_from,
    place_blocks,
)
from insula.worlds.tabletop.tasks.pairs import PHRASINGS, other_pair, pair_goal
from insula.worlds.tabletop.tasks.task import Scene, Split, Task

SPEEDS = (0.08, 0.12)  # meters per second
_HALF_WAYS = (0.05, 0.075)  # of a way's length, meters: a bowl turns round about once in a second
_POINTS = 9  # of a way, by which its distance from others is measured


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    blocks = None
    while blocks is None:
        paths = tuple(_path(rng) for _ in range(BOWLS))
        ways = [np.linspace(path.ends[0], path.ends[1], _POINTS) for path in paths]
        if all(far_from(ways[0], point, BOWL_TO_BOWL) for point in ways[1]):
            blocks = place_blocks(rng, np.concatenate(ways))

    layout = arrange(rng, np.stack([path.at(0.0) for path in paths]), blocks)
    layout = replace(layout, paths=paths)
    pair = draw_pair(rng, layout)
    sentence = PHRASINGS.draw(rng, split)
    return Scene(layout, pair_goal(pair, sentence), pair_goal(other_pair(layout, pair), sentence))


def _path(rng: np.random.Generator) -> Path:
    """A way in any direction, all of it where bowls may stand."""
    while True:
        angle = rng.uniform(0, 2 * np.pi)
        half = rng.uniform(*_HALF_WAYS) * np.array([np.cos(angle), np.sin(angle)])
        middle = rng.uniform(-1, 1, 2) * BOWL_AREA
        ends = np.stack([middle - half, middle + half])
        if np.all(np.abs(ends) <= BOWL_AREA):
            return Path(ends, float(rng.uniform(*SPEEDS)), float(rng.uniform(0, 2)))


MOVING = Task("moving", "one block into one of two bowls that drift", _draw, 100, takes_pair=True)
