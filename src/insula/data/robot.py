"""What a robot's numbers mean to the model, in both directions. A `Robot` travels inside every checkpoint.

    training   actions − state, for the dimensions in `delta`  ─►  normalize  ─►  clip
    serving    un-normalize  ─►  + state, for the dimensions in `delta`

robots/NAME/robot.json         cameras, horizon, delta, units
robots/NAME/norm_stats.json    normalization, openpi's format
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from insula.data import normalize as normalize
from insula.data.normalize import NormStats
from insula.errors import InputError
from insula.files import write_json
from insula.shapes import Float

ROBOT_FILE, STATS_FILE = "robot.json", "norm_stats.json"
ACTION_CLIP = {"quantiles": 2.0, "min_max": 2.0, "none": 2.0, "mean_std": 5.0}
"""Normalized actions are clipped to ± this, for both losses alike. By quantiles 98 % of them are inside ±1, a
Gaussian's four deviations inside ±1.7: only outliers are touched, which would cost many FAST tokens and dominate a
squared error."""


@dataclass(frozen=True, eq=False)
class Robot:
    """`stats` holds "state" and "actions"; `cameras` are those of the model's that this robot has; its chunks have
    `horizon` steps; action dimensions in `delta` are learned relative to the state's dimension of the same number;
    `units` say what "state" and "actions" are measured in."""

    stats: dict[str, NormStats]
    cameras: tuple[str, ...]
    horizon: int
    delta: tuple[int, ...] = ()
    units: dict[str, str] = field(default_factory=dict)

    @property
    def state_dim(self) -> int:
        return self.stats["state"].dim

    @property
    def action_dim(self) -> int:
        return self.stats["actions"].dim

    @property
    def clip(self) -> float:
        return ACTION_CLIP[self.stats["actions"].kind]

    def normalize_actions(
        self, actions: Float[np.ndarray, "*b H D"], state: Float[np.ndarray, "*b S"]
    ) -> Float[np.ndarray, "*b H D"]:
        """What the model learns, not yet clipped. Raises ValueError on NaN or infinity."""
        return self.stats["actions"].normalize(relative(actions, state, self.delta))

    def unnormalize_actions(
        self, chunk: Float[np.ndarray, "*b H D"], state: Float[np.ndarray, "*b S"]
    ) -> Float[np.ndarray, "*b H D"]:
        """The inverse, in the robot's units; `state` as observed."""
        actions = self.stats["actions"].unnormalize(chunk)
        for dim in self.delta:
            actions[..., dim] += state[..., None, dim]
        return actions

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        written = {key: value for key, value in asdict(self).items() if key != "stats"}
        write_json(directory / ROBOT_FILE, written)
        normalize.save_stats(directory / STATS_FILE, self.stats)


def relative(actions: np.ndarray, state: np.ndarray, delta: tuple[int, ...]) -> np.ndarray:
    """Chunks [..., H, D] with the state [..., S] at their start taken from the dimensions in `delta`."""
    if not delta:
        return actions
    out = np.array(actions, np.float32)
    for dim in delta:
        out[..., dim] -= state[..., None, dim]
    return out


def read_robot(directory: Path) -> Robot:
    """Raises FileNotFoundError, or ValueError naming the file and what is wrong in it."""
    path = directory / ROBOT_FILE
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        cameras, delta = tuple(map(str, raw["cameras"])), tuple(map(int, raw["delta"]))
        horizon, units = int(raw["horizon"]), dict(raw["units"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected cameras, horizon, delta and units ({error!r})") from None
    return Robot(normalize.load_stats(directory / STATS_FILE), cameras, horizon, delta, units)
