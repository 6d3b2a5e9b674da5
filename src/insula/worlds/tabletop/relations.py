"""Which block is the largest, left of a bowl, or nearest to it: only what is plainly true of exactly one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from insula.worlds.tabletop.facts import Block, Bowl

KINDS = ("largest", "smallest", "left", "right", "nearest", "farthest")
# Meters. The front camera draws far things nearer to its middle: a smaller step aside may show as one the other way.
SIDE_MARGIN = 0.05
DISTANCE_MARGIN = 0.04
SIZE_MARGIN = 0.003  # of half a side


@dataclass(frozen=True)
class Description:
    """`words` that are true of the `block` (its color) alone: "largest", or "left of the blue bowl". `kind`: of
    `KINDS`."""

    kind: str
    words: str
    block: str

    @property
    def noun(self) -> str:
        """As a thing to move: "the largest block", "the block left of the blue bowl"."""
        return f"the {self.words} block" if self.words == self.kind else f"the block {self.words}"

    @property
    def question(self) -> str:
        """As a question for the block's color: "which block is the largest"."""
        return f"which block is {'the ' if self.words == self.kind else ''}{self.words}"


def describe(blocks: Sequence[Block], bowls: Sequence[Bowl]) -> list[Description]:
    """Everything that is plainly true of one of these blocks and of none of the others."""
    return [*_sizes(blocks), *(found for bowl in bowls for found in _places(blocks, bowl))]


def _sizes(blocks: Sequence[Block]) -> Iterator[Description]:
    halves = np.array([block.half for block in blocks])
    for kind, values in (("largest", -halves), ("smallest", halves)):
        if (least := _plainly_least(values, SIZE_MARGIN)) is not None:
            yield Description(kind, kind, blocks[least].color)


def _places(blocks: Sequence[Block], bowl: Bowl) -> Iterator[Description]:
    offsets = np.stack([block.position - bowl.position for block in blocks])[:, :2]
    aside = offsets[:, 0]  # x grows to the right of the front image

    # Every block on a plain side, and one of them alone on it.
    if (np.abs(aside) >= SIDE_MARGIN).all():
        for kind, there in (("left", np.flatnonzero(aside < 0)), ("right", np.flatnonzero(aside > 0))):
            if len(there) == 1:
                yield Description(kind, f"{kind} of the {bowl.color} bowl", blocks[there[0]].color)

    distances = np.hypot(*offsets.T)
    for kind, values, word in (("nearest", distances, "to"), ("farthest", -distances, "from")):
        if (least := _plainly_least(values, DISTANCE_MARGIN)) is not None:
            yield Description(kind, f"{kind} {word} the {bowl.color} bowl", blocks[least].color)


def _plainly_least(values: np.ndarray, margin: float) -> int | None:
    """Index of the least of `values` [n], where the next one is at least `margin` more."""
    first, second = np.argsort(values)[:2]
    return int(first) if values[second] - values[first] >= margin else None
