"""`put`: one block into one bowl. Its scenes and its one sentence are those of the data sets, checkpoints and rates
that were published before there were other tasks, and must not change."""

from __future__ import annotations

import numpy as np

from insula.worlds.tabletop import MAX_EPISODE_STEPS
from insula.worlds.tabletop.scene import draw_layout, draw_pair
from insula.worlds.tabletop.tasks.pairs import PHRASINGS, SENTENCE, other_pair, pair_goal
from insula.worlds.tabletop.tasks.task import Phrasings, Scene, Split, Task

_PHRASINGS = Phrasings(train=(SENTENCE,), held_out=PHRASINGS.held_out)


def _draw(rng: np.random.Generator, split: Split) -> Scene:
    layout = draw_layout(rng)
    pair = draw_pair(rng, layout)
    sentence = _PHRASINGS.draw(rng, split)

    return Scene(layout, pair_goal(pair, sentence), pair_goal(other_pair(layout, pair), sentence))


PUT = Task("put", "one block into one bowl", _draw, MAX_EPISODE_STEPS, takes_pair=True, judge_stacks=False)
