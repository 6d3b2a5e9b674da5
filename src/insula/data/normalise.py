"""Normalisation: every dimension to about [-1, 1] by its 1 % and 99 % quantiles, and exactly back.

    normalised = 2 · (x − low) / (high − low) − 1          low, high = q01, q99

Nothing is clipped here, so the inverse is exact; about 2 % of the values lie outside [-1, 1].
Guard: where q99 − q01 is below EPSILON, the formula would blow up noise (values of −3200 have been seen).
- A dimension that rests almost always but does move (its min and max differ) uses low, high = min, max.
- A dimension that never moves maps to 0, and back to its constant.
File format: openpi's norm_stats.json, {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}, and min, max.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

EPSILON = 1e-4
"""A range below this (in the units of the data) counts as constant."""


@dataclass(frozen=True)
class NormStats:
    """Per dimension, each float64 [D]. Quantiles and extremes are None in files that only know mean and std."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each [D], after the guard; low == high marks a constant dimension."""
        if self.q01 is None or self.q99 is None:
            raise ValueError("normalisation: these statistics have no q01 and q99; fit them again on the data")
        low, high = self.q01, self.q99
        if self.min is not None and self.max is not None:
            narrow = high - low < EPSILON
            low, high = np.where(narrow, self.min, low), np.where(narrow, self.max, high)
        middle = (low + high) / 2
        constant = high - low < EPSILON
        return np.where(constant, middle, low), np.where(constant, middle, high)

    @property
    def constant(self) -> np.ndarray:
        """bool [D]: dimensions that carry no information."""
        low, high = self.bounds()
        return low == high

    def normalise(self, values: np.ndarray) -> np.ndarray:
        """[..., D] in the data's units to float32 [..., D], about [-1, 1]. Raises ValueError on NaN or infinity."""
        low, high = self.bounds()
        array = self._checked(values)
        span = np.where(high > low, high - low, 1.0)
        return np.where(high > low, 2 * (array - low) / span - 1, 0.0).astype(np.float32)

    def unnormalise(self, values: np.ndarray) -> np.ndarray:
        """The inverse, float32 [..., D] in the data's units; a constant dimension gives its constant."""
        low, high = self.bounds()
        array = self._checked(values)
        return np.where(high > low, (array + 1) / 2 * (high - low) + low, low).astype(np.float32)

    def _checked(self, values: np.ndarray) -> np.ndarray:
        array = np.asarray(values, np.float64)
        if array.shape[-1:] != (self.dim,):
            raise ValueError(f"normalisation: got shape {array.shape}, expected [..., {self.dim}]")
        refuse_non_finite(array)
        return array


def fit(values: np.ndarray, names: Sequence[str] | None = None, what: str = "values") -> NormStats:
    """Statistics of [N, D]. Warns by name of every dimension the guard changes.

    Raises ValueError for another shape, no rows, and for NaN or infinity, naming the dimension and the first row.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not len(array):
        raise ValueError(f"statistics of {what}: got shape {array.shape}, expected [samples, dimensions] with samples")
    refuse_non_finite(array, names, what)
    q01, q99 = np.quantile(array, [0.01, 0.99], axis=0)
    stats = NormStats(array.mean(0), array.std(0), q01, q99, array.min(0), array.max(0))
    label = names or [str(i) for i in range(stats.dim)]
    constant, narrow = stats.constant, q99 - q01 < EPSILON
    if constant.any():
        which = ", ".join(label[i] for i in np.flatnonzero(constant).tolist())
        warnings.warn(f"{what}: near-constant dimensions are mapped to 0: {which}", stacklevel=2)
    if (narrow & ~constant).any():
        which = ", ".join(label[i] for i in np.flatnonzero(narrow & ~constant).tolist())
        warnings.warn(f"{what}: dimensions that rarely move are scaled by min and max: {which}", stacklevel=2)
    return stats


def refuse_non_finite(values: np.ndarray, names: Sequence[str] | None = None, what: str = "normalisation") -> None:
    """Raises ValueError naming the first row and dimension of [..., D] that is NaN or infinite."""
    rows = values.reshape(-1, values.shape[-1])
    if np.isfinite(rows).all():
        return
    bad = np.argwhere(~np.isfinite(rows))
    row, dim = bad[0].tolist()
    label = names[dim] if names else dim
    raise ValueError(
        f"{what}: {rows[row, dim]} in dimension {label}, row {row} ({len(bad)} such values); expected finite numbers"
    )


def to_json(stats: Mapping[str, NormStats]) -> dict[str, Any]:
    """openpi's layout, keyed "state" and "actions"."""
    return {"norm_stats": {key: {f.name: _list(getattr(s, f.name)) for f in fields(s)} for key, s in stats.items()}}


def from_json(raw: Any, where: str = "norm_stats.json") -> dict[str, NormStats]:
    """The inverse of `to_json`; reads openpi's own files too. Raises ValueError naming what is missing or wrong."""
    if not isinstance(raw, dict) or not isinstance(raw.get("norm_stats"), dict):
        raise ValueError(f"{where}: expected an object with the key 'norm_stats'")
    return {key: _parse(entry, f"{where}: {key!r}") for key, entry in raw["norm_stats"].items()}


def save(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    Path(path).write_text(json.dumps(to_json(stats), indent=2) + "\n", encoding="utf-8")


def load(path: str | Path) -> dict[str, NormStats]:
    """Raises FileNotFoundError, or ValueError naming what is wrong in the file."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    return from_json(raw, str(path))


def _list(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else values.tolist()


def _parse(entry: Any, where: str) -> NormStats:
    if not isinstance(entry, dict) or entry.get("mean") is None or entry.get("std") is None:
        raise ValueError(f"{where}: expected an object with mean, std, q01 and q99")
    try:
        known = [f.name for f in fields(NormStats) if entry.get(f.name) is not None]
        arrays = {name: np.asarray(entry[name], np.float64) for name in known}
    except (TypeError, ValueError):
        raise ValueError(f"{where}: expected lists of numbers") from None
    for name, array in arrays.items():
        if array.ndim != 1 or array.shape != arrays["mean"].shape or not np.isfinite(array).all():
            raise ValueError(f"{where}: {name} has shape {array.shape}, expected {arrays['mean'].shape} finite numbers")
    return NormStats(**arrays)
