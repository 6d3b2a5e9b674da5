"""Seed ranges. Scenes of demonstrations, evaluation and pretraining never share a seed, so they never share a scene.

>>> EVALUATION.take(3)
range(1000000, 1000003)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from insula.errors import InputError


@dataclass(frozen=True)
class SeedRange:
    """The seeds `start .. start + size - 1`, kept for one purpose."""

    name: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        """The first seed after the range."""
        return self.start + self.size

    def __contains__(self, seed: int) -> bool:
        return self.start <= seed < self.stop

    def take(self, count: int, offset: int = 0) -> range:
        """`count` seeds of this range, from `offset` on. Raises InputError when they would leave the range."""
        if count < 0 or offset < 0 or offset + count > self.size:
            raise InputError(
                f"{self.name} seeds: asked for {count} from offset {offset}, but the range holds {self.size} "
                f"({self.start} to {self.stop - 1}); beyond it lie seeds kept for another purpose"
            )

        return range(self.start + offset, self.start + offset + count)


# Never to be moved: data sets, checkpoints and published rates were made with these.
DEMONSTRATIONS = SeedRange("demonstrations", 0, 1_000_000)
EVALUATION = SeedRange("evaluation", 1_000_000, 1_000_000)
PRETRAINING = SeedRange("pretraining", 2_000_000, 1_000_000_000)  # the last seed stays below 2³¹
RANGES = (DEMONSTRATIONS, EVALUATION, PRETRAINING)


def refuse_overlap(ranges: Iterable[SeedRange]) -> None:
    """Raises InputError naming the first two ranges that share a seed."""
    ordered = sorted(ranges, key=lambda r: r.start)
    for left, right in pairwise(ordered):
        if left.stop > right.start:
            raise InputError(
                f"seed ranges overlap: {left.name} ends at {left.stop - 1}, {right.name} starts at {right.start}; "
                f"a scene would be seen both ways. Shrink {left.name} to at most {right.start - left.start} seeds"
            )


def refuse_seen(seeds: Iterable[int], used: Iterable[int], purpose: str) -> None:
    """Raises InputError when any of `seeds` (meant for `purpose`) is in `used`."""
    shared = sorted(set(seeds) & set(used))
    if shared:
        raise InputError(f"{purpose}: {len(shared)} seeds were used before, first {shared[0]}; choose fresh ones")


refuse_overlap(RANGES)  # at import: a range that grows into another is noticed before a scene is seen both ways
