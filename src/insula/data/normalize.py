"""Normalization: every dimension to about [-1, 1], by default by its 1 % and 99 % quantiles, and exactly back.

    normalized = 2 · (x − low) / (high − low) − 1

    quantiles   low, high = q01, q99
    min_max     low, high = min, max
    mean_std    low, high = mean − std, mean + std       which is (x − mean) / std
    none        low, high = −1, 1                        the data is normalized already

Nothing is clipped here, so the inverse is exact; by quantiles, about 2 % of the values lie outside [-1, 1].
Guard: where high − low is next to nothing, the formula would blow up noise (values of −3200 have been seen).
- A dimension that rests almost always but does move (its min and max differ) uses low, high = min, max.
- A dimension that never moves maps to 0, and back to its constant. Next to nothing is relative to the dimension's own
  magnitude: steps of 1e-5 m at 1 kHz are motion, 1e-5 rad around 1.57 are noise.

What counts is the normalization the mapping asks for: a file of statistics that says another one is refused.
File format: openpi's norm_stats.json, {"norm_stats": {"state": {mean, std, q01, q99}, "actions": {...}}}, with min, max
and kind.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from insula.errors import InputError, did_you_mean
from insula.files import read_json, write_json

EPSILON = 1e-4
"""A range below this counts as constant: as a share of the dimension's own magnitude, which counts for at most 1."""
ROUNDING = 1e-8
"""Whatever the magnitude, a range below this is rounding."""
RESTING = 0.01
"""A dimension rests almost always where its quantiles span less than this share of all its values."""
Kind = Literal["quantiles", "min_max", "mean_std", "none"]
NEEDED: dict[Kind, tuple[str, ...]] = {
    "quantiles": ("q01", "q99"),
    "min_max": ("min", "max"),
    "mean_std": ("mean", "std"),
    "none": (),
}
"""The figures each kind is made of."""
ARRAYS = ("mean", "std", "q01", "q99", "min", "max")
LARGEST = 1e300
"""Beyond this the formulas overflow."""
FAR, NARROW = 2.0, 0.02
"""Normalized values beyond the first are outliers; a dimension that spans less than the second uses 1 % of its
range."""


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
        """How many dimensions there are."""
        return len(self.mean)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each [D], after the guard; low == high marks a constant dimension."""
        # As if measured: from a range of −1 to 1 the formula makes the values themselves.
        if self.kind == "none":
            return -np.ones(self.dim), np.ones(self.dim)

        if self.kind == "mean_std":
            low, high = self.mean - self.std, self.mean + self.std
        elif self.kind == "min_max":
            low, high = self._known("min", "max")
        else:
            low, high = self._known("q01", "q99")
            # openpi's files have no extremes, and so no guard for what rarely moves.
            if self.min is not None and self.max is not None:
                rests = self._rests()
                low, high = np.where(rests, self.min, low), np.where(rests, self.max, high)

        middle = (low + high) / 2

        # At most 1, else half a unit around 10,000, a motion, would pass for noise.
        magnitude = np.minimum(np.maximum(np.abs(low), np.abs(high)), 1.0)
        constant = high - low < np.maximum(EPSILON * magnitude, ROUNDING)

        # One value for both bounds, so that the inverse gives the middle and not an edge of the noise.
        return np.where(constant, middle, low), np.where(constant, middle, high)

    def _rests(self) -> np.ndarray:
        """bool [D]: quantiles coincide, while some values lie far outside. Without the second half, a dimension in tiny
        units would be scaled by its outliers."""
        assert self.q01 is not None and self.q99 is not None and self.min is not None and self.max is not None
        span = self.q99 - self.q01
        return (span < EPSILON) & (span < RESTING * (self.max - self.min))

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
        if self.kind != "quantiles" or any(getattr(self, name) is None for name in ("q01", "q99", "min", "max")):
            return np.zeros(self.dim, bool)

        return self._rests() & ~self.constant

    def normalize(self, values: np.ndarray) -> np.ndarray:
        """[..., D] in the data's units to float32 [..., D], about [-1, 1]. Raises InputError on NaN or infinity."""
        # Computed in float64 and rounded at the end: the inverse is exact to float32, also far outside.
        low, high = self.bounds()
        array = self._checked(values)

        # Not 0 for a constant dimension: `where` computes both of its sides.
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

        # A NaN would go through the formula unseen, and reach the motors as one.
        refuse_non_finite(array)

        return array


def fit_stats_of(
    values: np.ndarray, names: Sequence[str] | None = None, what: str = "values", kind: Kind = "quantiles"
) -> NormStats:
    """Statistics of [N, D]. Warns by name of every dimension the guard changes.

    Raises InputError for another shape, no rows, and for NaN or infinity, naming the dimension and the first row.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not len(array):
        raise InputError(f"statistics of {what}: got shape {array.shape}, expected [samples, dimensions] with samples")

    refuse_non_finite(array, names, what)

    # As openpi fits them: an outlier then stretches no range.
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
    """Raises InputError naming the first row and dimension of [..., D] that is NaN or infinite."""
    if np.isfinite(values).all():
        return

    # Chunks and single frames alike: a row is whatever has one value of each dimension.
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
    """The inverse of `stats_to_json`; reads openpi's own files too. Raises InputError naming what is wrong."""
    if not isinstance(raw, dict) or not isinstance(raw.get("norm_stats"), dict):
        have = ", ".join(map(repr, list(raw)[:8])) if isinstance(raw, dict) else f"a {type(raw).__name__}"
        raise InputError(
            f"{where}: expected an object with the key 'norm_stats', and in it 'state' and 'actions', as openpi and "
            f"insula data stats --out write it; got {have or 'nothing'}"
        )

    return {key: _parse(entry, f"{where}: {key!r}") for key, entry in raw["norm_stats"].items()}


def save_stats(path: str | Path, stats: Mapping[str, NormStats]) -> None:
    """Write them as openpi does, whole or not at all."""
    write_json(Path(path), stats_to_json(stats))


def load_stats(path: str | Path) -> dict[str, NormStats]:
    """Raises MissingFileError, FileError, or InputError naming what is wrong in the file."""
    return stats_from_json(read_json(Path(path)), str(path))


def load_mapped_stats(path: Path, kind: Kind, sizes: Mapping[str, int]) -> dict[str, NormStats]:
    """The statistics of a file as a mapping means them: of these dimensions (`sizes` by part, "state" and "actions"),
    normalized by `kind`.

    Raises as `load_stats`, and InputError where the file lacks a part or what `kind` is made of, has other dimensions,
    or says another kind.
    """
    raw = read_json(path)
    found = stats_from_json(raw, str(path))
    mapped = {}
    for part, size in sizes.items():
        # A robot without a state needs no entry in the file.
        if not size:
            mapped[part] = nothing(kind)
            continue

        if part not in found:
            raise InputError(
                f"{path}: no {part!r}{did_you_mean(part, found)}; it has {', '.join(map(repr, found)) or 'nothing'}, "
                f"expected {' and '.join(map(repr, sizes))}"
            )

        mapped[part] = _mapped(found[part], raw["norm_stats"][part], kind, size, f"{path}: {part!r}")

    return mapped


def _mapped(stats: NormStats, raw: Mapping[str, Any], kind: Kind, size: int, where: str) -> NormStats:
    if stats.dim != size:
        raise InputError(
            f"{where} has {stats.dim} dimensions, expected the {size} that the mapping takes from the data set; fit it "
            "on this data set (insula data stats --out), or correct the mapping's columns"
        )

    # openpi's files say none: the config does, as the mapping does here.
    said = raw.get("kind")
    if said is not None and said != kind:
        raise InputError(
            f'{where} says kind {said!r}, the mapping normalization {kind!r}; write normalization = "{said}", or take '
            '"kind" out of the file'
        )

    # Filled in by another kind's figures, actions would come out in another range, and nothing would fail.
    missing = [name for name in NEEDED[kind] if getattr(stats, name) is None]
    if missing:
        have = [name for name in ARRAYS if getattr(stats, name) is not None]
        able = [f'"{other}"' for other, needed in NEEDED.items() if needed and set(needed) <= set(have)]
        raise InputError(
            f"{where} has no {' and '.join(missing)}, which normalization {kind!r} is made of; it has "
            f"{', '.join(have)}: write normalization = {' or '.join(able)}, or fit it again (insula data stats --out)"
        )

    return dataclasses.replace(stats, kind=kind)


def strangers(stats: NormStats, values: np.ndarray) -> np.ndarray:
    """bool [D]: dimensions of `values` [n, D] that these statistics do not describe, because most values lie beyond
    twice their range, or all of them within a hundredth of it. Statistics of another robot, or in other units, look
    like this; values that are not finite are left aside."""
    rows = values[np.isfinite(values).all(1)]
    if not len(rows):
        return np.zeros(stats.dim, bool)

    # By most values, and not by the largest: single outliers are no sign of another robot.
    normalized = stats.normalize(rows)
    outside = (np.abs(normalized) > FAR).mean(0) > 0.5

    # A joint that rests in all that was looked at says nothing about its unit.
    moves = np.ptp(rows, axis=0) > 0
    tiny = np.ptp(normalized, axis=0) < NARROW

    return outside | (moves & tiny & ~stats.constant)


def _plain(value: np.ndarray | str | None) -> list[float] | str | None:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _parse(entry: Any, where: str) -> NormStats:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {_shown(entry)}, expected an object with mean, std, q01 and q99")

    kind: Any = entry.get("kind") or "quantiles"
    if kind not in get_args(Kind):
        raise InputError(f"{where}: kind is {kind!r}, expected one of {', '.join(get_args(Kind))}")

    # null is how a file says that it does not know a figure, `save_stats` too.
    arrays = {name: _numbers(entry[name], f"{where}: {name}") for name in ARRAYS if entry.get(name) is not None}
    unknown = [key for key in entry if key not in ARRAYS]
    for name in ("mean", "std"):
        if name not in arrays:
            have = ", ".join(map(str, entry)) or "nothing"
            raise InputError(f"{where}: no {name}{did_you_mean(name, unknown)}; it has {have}, expected mean and std")

    for name, array in arrays.items():
        if array.shape != arrays["mean"].shape:
            raise InputError(f"{where}: {name} has {len(array)} numbers, mean has {len(arrays['mean'])}")

    # A range the wrong way round would pass for a constant one, and the dimension be lost.
    low_high = [("q01", "q99"), ("min", "max")]
    ranges = [(low, high) for low, high in low_high if low in arrays and high in arrays]
    for low, high in ranges:
        if len(wrong := np.flatnonzero(arrays[high] < arrays[low])):
            at = int(wrong[0])
            raise InputError(f"{where}: {low}[{at}] is {arrays[low][at]:g}, above {high}[{at}], {arrays[high][at]:g}")

    if len(wrong := np.flatnonzero(arrays["std"] < 0)):
        raise InputError(f"{where}: std[{wrong[0]}] is {arrays['std'][wrong[0]]:g}, expected at least 0")

    return NormStats(**arrays, kind=kind)


def _numbers(raw: Any, where: str) -> np.ndarray:
    """A list of finite numbers. Text is no number, even where it looks like one: whoever wrote it meant a table."""
    if not isinstance(raw, list):
        raise InputError(f"{where} is {_shown(raw)}, expected a list of numbers")

    for at, value in enumerate(raw):
        # To Python true is a number; in a file of statistics it is a slip.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST:  # NaN is not at most anything
            raise InputError(f"{where}[{at}] is {_shown(value)}, expected a finite number")

    return np.array(raw, np.float64)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
