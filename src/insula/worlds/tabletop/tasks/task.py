"""What a task is: a way to draw a scene and what is asked of it, in the words of training or in others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from insula.worlds.tabletop.goals import Goal
from insula.worlds.tabletop.scene import BOWLS, SceneLayout

Split = Literal["train", "held_out"]
"""Which words, and which pairs of colors, are asked for: those of demonstrations, or those kept for evaluation."""
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Scene:
    """A scene's `layout`, its `goal`, and `other`: another goal of that same scene, in the same words, with no
    placement in common, or none at the same turn, to tell a policy that listens from one that only looks."""

    layout: SceneLayout
    goal: Goal
    other: Goal


@dataclass(frozen=True)
class Phrasings:
    """Sentences with gaps, as `str.format` has them: those of training, and those that are kept for evaluation."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def draw(self, rng: np.random.Generator, split: Split) -> str:
        """One of the sentences of a split. A single one takes no random number: `put` must draw none that it did not
        draw before it had other words."""
        sentences = self.train if split == "train" else self.held_out
        return sentences[0] if len(sentences) == 1 else sentences[rng.integers(len(sentences))]


@dataclass(frozen=True)
class Task:
    """`about` in one line; `max_steps` until an episode is cut off, about three times what the expert takes.

    `bowls` and `distractors` (their shapes) decide the MuJoCo model. `takes_pair`: the goal is a pair of colors, which
    the reset option `task` may name. `judge_stacks`: a block that comes to rest on another unasked is a wrong object.
    """

    name: str
    about: str
    draw: Callable[[np.random.Generator, Split], Scene]
    max_steps: int
    bowls: int = BOWLS
    distractors: tuple[str, ...] = ()
    takes_pair: bool = False
    judge_stacks: bool = True
