"""Normalization: every dimension to about [-1, 1], by default by its 1 % and 99 % quantiles, and exactly back.

    normalized = 2 · (x − low) / (high − low) − 1

    quantiles   low, high = q01, q99
    min_max     low, high = min, max
    mean_std    low, high = mean − std, mean + std       which is (x − mean) / std
    none        low, high = −1, 1                        the data is normalized already

Nothing is clipped here, so the inverse is exact; by quantiles, about 2 % of the values lie outside [-1, 1].
Guard: where high − low is below EPSILON, the formula would blow up noise (values of −3200 have been seen).
- A dimension that rests almost always but does move (its min and max differ) uses low, high = min, max.
- A dimension that never moves maps to 0, and back to its constant.
File format: openpi's norm_stats.json, {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}, with min, max
and kind.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from insula.errors import InputError
from insula.files import read_json, write_json

EPSILON = 1e-4
"""A range below this (in the units of the data) counts as constant."""
Kind = Literal["quantiles", "min_max", "mean_std", "none"]


@dataclass(frozen=True)
class NormStats:
    """Per dimension, each float64 [D]. Quantiles and extremes are None in files that only know mean and std."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None
    kind: Kind = "quantiles"

    @property
    def dim(self) -> int:
        return len(self.mean)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each [D], after the guard; low == high marks a constant dimension."""
        if self.kind == "none":
            return -np.ones(self.dim), np.ones(self.dim)
        if self.kind == "mean_std":
            low, high = self.mean - self.std, self.mean + self.std
        elif self.kind == "min_max":
            low, high = self._known("min", "max")
        else:
            low, high = self._known("q01", "q99")
            if self.min is not None and self.max is not None:
                narrow = high - low < EPSILON
                low, high = np.where(narrow, self.min, low), np.where(narrow, self.max, high)
        middle = (low + high) / 2
        constant = high - low < EPSILON
        return np.where(constant, middle, low), np.where(constant, middle, high)

    def _known(self, low: str, high: str) -> tuple[np.ndarray, np.ndarray]:
        pair = getattr(self, low), getattr(self, high)
        if pair[0] is None or pair[1] is None:
            raise InputError(f"normalization: these statistics have no {low} and {high}; fit them again on the data")
        return pair

    @property
    def constant(self) -> np.ndarray:
        """bool [D]: dimensions that carry no information."""
        low, high = self.bounds()
        return low == high

    @property
    def rarely_moves(self) -> np.ndarray:
        """bool [D]: dimensions scaled by min and max because their quantiles coincide."""
        if self.kind != "quantiles" or self.q01 is None or self.q99 is None:
            return np.zeros(self.dim, bool)
        return (self.q99 - self.q01 < EPSILON) & ~self.constant

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """[..., D] in the data's units to float32 [..., D], about [-1, 1]. Raises ValueError on NaN or infinity."""
        low, high = self.bounds()
        array = self._checked(values)
        span = np.where(high > low, high - low, 1.0)
        return np.where(high > low, 2 * (array - low) / span - 1, 0.0).astype(np.float32)

    def unnormalize(self, values: np.ndarray) -> np.ndarray:
        """The inverse, float32 [..., D] in the data's units; a constant dimension gives its constant."""
        low, high = self.bounds()
        array = self._checked(values)
        return np.where(high > low, (array + 1) / 2 * (high - low) + low, low).astype(np.float32)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        array = np.asarray(values, np.float64)
        if array.shape[-1:] != (self.dim,):
            raise InputError(f"normalization: got shape {array.shape}, expected [..., {self.dim}]")
        refuse_non_finite(array)
        return array


def fit_stats_of(
    values: np.ndarray, names: Sequence[str] | None = None, what: str = "values", kind: Kind = "quantiles"
) -> NormStats:
    """Statistics of [N, D]. Warns by name of every dimension the guard changes.

    Raises ValueError for another shape, no rows, and for NaN or infinity, naming the dimension and the first row.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not len(array):
        raise InputError(f"statistics of {what}: got shape {array.shape}, expected [samples, dimensions] with samples")
    refuse_non_finite(array, names, what)
    q01, q99 = np.quantile(array, [0.01, 0.99], axis=0)
    stats = NormStats(array.mean(0), array.std(0), q01, q99, array.min(0), array.max(0), kind)
    warn_of_constants(stats, names, what)
    return stats


def nothing(kind: Kind) -> NormStats:
    """Of no dimension at all: a robot that reports no state."""
    none = np.zeros(0)
    return NormStats(none, none, none, none, none, none, kind)


def warn_of_constants(stats: NormStats, names: Sequence[str] | None, what: str) -> None:
    """Name every dimension the guard changes."""
    label = names or [str(i) for i in range(stats.dim)]
    if stats.constant.any():
        which = ", ".join(label[i] for i in np.flatnonzero(stats.constant).tolist())
        warnings.warn(f"{what}: near-constant dimensions are mapped to 0: {which}", stacklevel=3)
    if stats.rarely_moves.any():
        which = ", ".join(label[i] for i in np.flatnonzero(stats.rarely_moves).tolist())
        warnings.warn(f"{what}: dimensions that rarely move are scaled by min and max: {which}", stacklevel=3)


def refuse_non_finite(values: np.ndarray, names: Sequence[str] | None = None, what: str = "normalization") -> None:
    """Raises ValueError naming the first row and dimension of [..., D] that is NaN or infinite."""
    if np.isfinite(values).all():
        return
    rows = values.reshape(-1, values.shape[-1])
    bad = np.argwhere(~np.isfinite(rows))
    row, dim = bad[0].tolist()
    label = names[dim] if names else dim
    raise InputError(
        f"{what}: {rows[row, dim]} in dimension {label}, row {row} ({len(bad)} such values); expected finite numbers"
    )


def stats_to_json(stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """openpi's layout, keyed "state" and "actions"."""
    return {"norm_stats": {key: {f.name: _plain(getattr(s, f.name)) for f in fields(s)} for key, s in stats.items()}}


def stats_from_json(raw: Any, where: str = "norm_stats.json") -> dict[str, NormStats]:
    """The inverse of `to_json`; reads openpi's own files too. Raises ValueError naming what is missing or wrong."""
    if not isinstance(raw, dict) or not isinstance(raw.get("norm_stats"), dict):
        raise InputError(f"{where}: expected an object with the key 'norm_stats'")
    return {key: _parse(entry, f"{where}: {key!r}") for key, entry in raw["norm_stats"].items()}


def save_stats(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    write_json(Path(path), stats_to_json(stats))


def load_stats(path: str | Path) -> dict[str, NormStats]:
    """Raises FileNotFoundError, or ValueError naming what is wrong in the file."""
    return stats_from_json(read_json(Path(path)), str(path))


def _plain(value: np.ndarray | str | None) -> list[float] | str | None:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _parse(entry: Any, where: str) -> NormStats:
    if not isinstance(entry, dict) or entry.get("mean") is None or entry.get("std") is None:
        raise InputError(f"{where}: expected an object with mean, std, q01 and q99")
    kind: Any = entry.get("kind") or "quantiles"
    if kind not in get_args(Kind):
        raise InputError(f"{where}: kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")
    try:
        known = [f.name for f in fields(NormStats) if f.name != "kind" and entry.get(f.name) is not None]
        arrays = {name: np.asarray(entry[name], np.float64) for name in known}
    except (TypeError, ValueError):
        raise InputError(f"{where}: expected lists of numbers") from None
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape != arrays["mean"].shape or not np.isfinite(array).all():
            raise InputError(f"{where}: {name} has shape {array.shape}, expected {arrays['mean'].shape} finite numbers")
    return NormStats(**arrays, kind=kind)
