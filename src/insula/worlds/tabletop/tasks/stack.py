"""`stack`: one block on another, or a tower of all three."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from insula.worlds.tabletop.goals import Goal, Placement
from insula.worlds.tabletop.scene import draw_layout
from insula.worlds.tabletop.tasks.task import Phrasings, Scene, Split, Task

_APART = 0.1  # meters between blocks: beside a tower the fingers need more room than beside a block
PHRASINGS = Phrasings(
    train=("stack {tower}", "put {tower}", "place {tower}"),
    held_out=("move {tower}",),
)


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    layout = draw_layout(rng, _APART)
    height = 3 if rng.random() < 0.5 else 2
    colors = [layout.block_colors[i] for i in rng.permutation(len(layout.block_colors))][:height]

    sentence = PHRASINGS.draw(rng, split)
    return Scene(layout, _goal(colors, sentence), _goal(colors[::-1], sentence))


def _goal(colors: Sequence[str], sentence: str) -> Goal:
    """Colors from the top down, as the sentence names them; placements from below."""
    tower = " on ".join(f"the {color} block" for color in colors)
    placements = tuple(Placement(upper, lower, "on") for upper, lower in pairwise(colors))
    return Goal(sentence.format(tower=tower), placements[::-1])


STACK = Task("stack", "a block on another, or a tower of three", _draw, 200)
