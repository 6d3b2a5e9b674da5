"""Exact quantiles of more values than fit into memory, in three passes over blocks [n, D] that may run in parallel.

1  moments         count, mean, spread, extremes
2  counts          a histogram between the extremes: in which bin each wanted order statistic lies
3  candidates      the values of those bins, and nothing else, sorted
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

# So many that the last pass keeps little, and few enough that a file's counts are small to send back.
HISTOGRAM_BINS = 4096


@dataclass(frozen=True)
class Moments:
    """Per dimension, float64 [D]; `square` is the sum of squared distances from the mean."""

    count: int
    mean: np.ndarray
    square: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """float64 [D], of the values themselves: divided by their number, as numpy does."""
        return np.sqrt(self.square / self.count)


def moments(rows: np.ndarray) -> Moments:
    """Of one block, n ≥ 1."""
    # In float64: float32 sums over many frames would lose the last digits of the mean.
    values = rows.astype(np.float64)
    mean = values.mean(0)
    return Moments(len(values), mean, np.square(values - mean).sum(0), values.min(0), values.max(0))


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Of all blocks together (Chan et al. 1979)."""

    def merge(a: Moments, b: Moments) -> Moments:
        # Squares are of distances from the mean: those of the values themselves lose all digits beside a large mean.
        count, shift = a.count + b.count, b.mean - a.mean
        return Moments(
            count,
            a.mean + shift * b.count / count,
            a.square + b.square + np.square(shift) * a.count * b.count / count,
            np.minimum(a.min, b.min),
            np.maximum(a.max, b.max),
        )

    return reduce(merge, parts)


def counts(rows: np.ndarray, whole: Moments) -> np.ndarray:
    """How many values of a block lie in each bin, int64 [D, BINS]."""
    bins = _bins(rows, whole)
    return np.stack([np.bincount(bins[:, d], minlength=HISTOGRAM_BINS) for d in range(rows.shape[1])])


Wanted = dict[tuple[int, int], int]
"""(dimension, bin): how many values lie in the bins before it."""


def wanted_bins(histogram: np.ndarray, quantiles: Sequence[float]) -> Wanted:
    """The bins that hold the neighbors of each quantile, from the sum of all `counts`."""
    below = np.cumsum(histogram, axis=1)
    found: Wanted = {}
    for dim in range(len(histogram)):
        # Both neighbors of a quantile, which may lie in different bins with empty ones between.
        for rank in {rank for q in quantiles for rank in _neighbors(q, int(below[dim, -1]))[:2]}:
            # The first bin with more values up to its end than the rank counts: ranks are from 0, so "right".
            bin = int(np.searchsorted(below[dim], rank, side="right"))
            found[dim, bin] = int(below[dim, bin] - histogram[dim, bin])

    return found


def candidates(rows: np.ndarray, whole: Moments, wanted: Wanted) -> dict[tuple[int, int], np.ndarray]:
    """The values of a block that lie in the wanted bins."""
    bins = _bins(rows, whole)
    return {(dim, bin): rows[bins[:, dim] == bin, dim] for dim, bin in wanted}


def quantiles(
    parts: Sequence[dict[tuple[int, int], np.ndarray]], wanted: Wanted, whole: Moments, of: Sequence[float]
) -> np.ndarray:
    """float64 [len(of), D], interpolated between neighbors as numpy does."""
    # Only now sorted, and together: the bins of all blocks hold one sorted stretch of all values.
    ordered = {key: np.sort(np.concatenate([part[key] for part in parts])).astype(np.float64) for key in wanted}

    def value(dim: int, rank: int) -> float:
        for (d, bin), before in wanted.items():
            if d == dim and before <= rank < before + len(ordered[d, bin]):
                return float(ordered[d, bin][rank - before])

        raise AssertionError("every wanted rank lies in a wanted bin")

    out = np.empty((len(of), len(whole.mean)))
    for row, q in enumerate(of):
        low, high, fraction = _neighbors(q, whole.count)
        for dim in range(out.shape[1]):
            a, b = value(dim, low), value(dim, high)
            out[row, dim] = a + (b - a) * fraction

    return out


def _neighbors(q: float, count: int) -> tuple[int, int, float]:
    """(rank below, rank above, how far between) of a quantile among `count` sorted values."""
    # numpy's own rule, "linear": the result is what it finds with all values in memory.
    position = q * (count - 1)
    low = int(np.floor(position))
    return low, min(low + 1, count - 1), position - low


def _bins(rows: np.ndarray, whole: Moments) -> np.ndarray:
    # One formula for counting and for collecting: a value must fall into the same bin both times.
    span = np.where(whole.max > whole.min, whole.max - whole.min, 1.0)
    # Clipped, as the largest value lies on the end of the last bin.
    return np.clip((rows.astype(np.float64) - whole.min) / span * HISTOGRAM_BINS, 0, HISTOGRAM_BINS - 1).astype(
        np.int64
    )
