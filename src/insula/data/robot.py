"""What a robot's numbers mean to the model, in both directions. A `Robot` travels inside every checkpoint.

    training   actions − state, for the dimensions in `delta`  ─►  normalize  ─►  clip
    serving    un-normalize  ─►  + state, for the dimensions in `delta`

robots/NAME/robot.json         cameras, horizon, delta, units, forms, losses
robots/NAME/norm_stats.json    normalization, openpi's format
"""

import enum
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from insula.batch import LossName
from insula.checks import check_integer
from insula.data import normalize as normalize
from insula.data.normalize import NormStats
from insula.errors import InputError
from insula.files import read_json, write_json
from insula.shapes import Float
from insula.tokens.dialects import Form

_Name = TypeVar("_Name", bound=enum.StrEnum)
ROBOT_FILE, STATS_FILE = "robot.json", "norm_stats.json"
ACTION_CLIP = {"quantiles": 2.0, "min_max": 2.0, "none": 2.0, "mean_std": 5.0}
"""Normalized actions are clipped to ± this, for both losses alike. By quantiles 98 % of them are inside ±1, a
Gaussian's four deviations inside ±1.7: only outliers are touched, which would cost many FAST tokens and dominate a
squared error."""


@dataclass(frozen=True, eq=False)
class Robot:
    """`stats` holds "state" and "actions"; `cameras` are those of the model's that this robot has; its chunks have
    `horizon` steps; action dimensions in `delta` are learned relative to the state's dimension of the same number;
    `units` say what "state" and "actions" are measured in; `forms` are those of its samples (`insula.tokens.dialects`),
    and `losses` what they taught, None where they are not known."""

    stats: dict[str, NormStats]
    cameras: tuple[str, ...]
    horizon: int
    delta: tuple[int, ...] = ()
    units: dict[str, str] = field(default_factory=dict)
    forms: tuple[Form, ...] | None = None
    losses: tuple[LossName, ...] | None = None

    @property
    def state_dim(self) -> int:
        """Dimensions of its state; 0 where it reports none."""
        return self.stats["state"].dim

    @property
    def action_dim(self) -> int:
        """Dimensions of its actions, without the model's padding."""
        return self.stats["actions"].dim

    @property
    def clip(self) -> float:
        """The largest normalized action, either way."""
        return ACTION_CLIP[self.stats["actions"].kind]

    def normalize_actions(
        self, actions: Float[np.ndarray, "*b H D"], state: Float[np.ndarray, "*b S"]
    ) -> Float[np.ndarray, "*b H D"]:
        """What the model learns, not yet clipped. Raises InputError on NaN or infinity."""
        # First relative, then normalized: the statistics are of relative values where `delta` says so.
        return self.stats["actions"].normalize(relative(actions, state, self.delta))

    def unnormalize_actions(
        self, chunk: Float[np.ndarray, "*b H D"], state: Float[np.ndarray, "*b S"]
    ) -> Float[np.ndarray, "*b H D"]:
        """The inverse, in the robot's units; `state` as observed."""
        actions = self.stats["actions"].unnormalize(chunk)

        # In the data's units, so after normalization is undone. The state is the one the chunk was predicted from.
        for dim in self.delta:
            actions[..., dim] += state[..., None, dim]

        return actions

    def write(self, directory: Path) -> None:
        """robot.json and norm_stats.json in `directory`, which is made where it is missing."""
        directory.mkdir(parents=True, exist_ok=True)

        # Apart, in openpi's format, so that other tools read the statistics.
        written = {key: value for key, value in asdict(self).items() if key != "stats"}
        write_json(directory / ROBOT_FILE, written)
        normalize.save_stats(directory / STATS_FILE, self.stats)


def relative(actions: np.ndarray, state: np.ndarray, delta: tuple[int, ...]) -> np.ndarray:
    """Chunks [..., H, D] with the state [..., S] at their start taken from the dimensions in `delta`."""
    if not delta:
        return actions

    # A copy: what is handed in stays the caller's.
    out = np.array(actions, np.float32)
    for dim in delta:
        out[..., dim] -= state[..., None, dim]

    return out


def read_robot(directory: Path) -> Robot:
    """Raises MissingFileError, FileError, or InputError naming the file and what is wrong in it."""
    path = directory / ROBOT_FILE
    raw = read_json(path, "cameras", "horizon", "delta", "units")
    stats = normalize.load_stats(directory / STATS_FILE)
    if missing := [part for part in ("state", "actions") if part not in stats]:
        raise InputError(f"{directory / STATS_FILE}: no {' and '.join(missing)}; it was not written by insula")

    cameras, delta, units = raw["cameras"], raw["delta"], raw["units"]
    if not isinstance(cameras, list) or not all(isinstance(camera, str) for camera in cameras):
        raise InputError(f"{path}: cameras is {cameras!r:.80}, expected a list of names")

    check_integer(f"{path}: horizon", raw["horizon"], 1)

    # A checkpoint may come from elsewhere: checked now, and not when the first action is asked for.
    dims = min(stats["state"].dim, stats["actions"].dim)
    if not isinstance(delta, list):
        raise InputError(f"{path}: delta is {delta!r:.80}, expected a list of action dimensions")

    for dim in delta:
        check_integer(f"{path}: delta has a dimension that", dim, 0, dims - 1)

    if not isinstance(units, dict) or not all(isinstance(unit, str) for unit in units.values()):
        raise InputError(f"{path}: units is {units!r:.80}, expected names of units by part")

    forms, losses = _read_names(path, raw, "forms", Form), _read_names(path, raw, "losses", LossName)
    return Robot(stats, tuple(cameras), raw["horizon"], tuple(delta), units, forms, losses)


def _read_names(path: Path, raw: dict[str, Any], key: str, kind: type[_Name]) -> tuple[_Name, ...] | None:
    """None in files of before there were several."""
    if (names := raw.get(key)) is None:
        return None
    if not isinstance(names, list) or not names or not all(name in list(kind) for name in names):
        raise InputError(f"{path}: {key} is {names!r:.80}, expected a list of {', '.join(kind)}")

    return tuple(kind(name) for name in names)
