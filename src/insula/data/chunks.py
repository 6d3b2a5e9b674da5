"""A data set's numbers as the model's state and actions, and its frames as chunks.

frame           t   t+1  t+2 | end of the episode
chunk (H = 5)   a_t a_t+1 a_t+2 a_t+2 a_t+2         clamped at the last action
action_is_pad    0    0    0     1     1            no flow loss there
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import SupportsIndex

import numpy as np

from insula.data.lerobot.info import pick
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import Columns, RobotData
from insula.errors import DatasetError

log = logging.getLogger(__name__)
ASPECTS = frozenset(
    {
        "pos",
        "position",
        "cmd",
        "command",
        "target",
        "goal",
        "state",
        "action",
        "observation",
        "main",
        "follower",
        "leader",
        "qpos",
        "joint",
        "motor",
        "delta",
        "desired",
        "actual",
        "current",
    }
)
"""Words of a dimension's name that do not say which joint it is."""


def joined(dataset: LeRobotDataset, columns: Sequence[Columns], read: Callable[[str], np.ndarray]) -> np.ndarray:
    """float32 [frames, D]: the `columns` side by side, as `read` gives them. Raises DatasetError where a dimension
    does not exist."""
    parts = []
    for entry in columns:
        values = read(entry.column)
        # A column of one number a frame comes as [frames], one of shape [2, 3] as [frames, 2, 3].
        values = values.reshape(len(values), -1).astype(np.float32, copy=False)
        parts.append(values if entry.dims is None else values[:, _checked_dims(dataset, entry, values.shape[1])])

    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def dim_names(dataset: LeRobotDataset, columns: Sequence[Columns]) -> list[str]:
    """What the data set calls each dimension; "column[3]" where it has no name."""
    return [given or usual for given, usual in _named(dataset, columns)]


def _named(dataset: LeRobotDataset, columns: Sequence[Columns]) -> list[tuple[str | None, str]]:
    """For each dimension, the name it was given, None where it has none, and what to call it then."""
    names: list[tuple[str | None, str]] = []
    for entry in columns:
        feature = dataset.numeric(entry.column)
        size = int(np.prod(feature.shape))

        # Names of another number than the dimensions would name the wrong ones.
        given = feature.names if feature.names and len(feature.names) == size else None
        dims = range(size) if entry.dims is None else _checked_dims(dataset, entry, size)
        names += [(given[d] if given else None, entry.column if size == 1 else f"{entry.column}[{d}]") for d in dims]

    return names


def _checked_dims(dataset: LeRobotDataset, entry: Columns, size: int) -> list[int]:
    assert entry.dims is not None
    if outside := [d for d in entry.dims if d >= size]:
        raise DatasetError(
            f"data set {dataset.root}: {entry.column!r} has dimensions 0 to {size - 1}, the mapping asks for {outside}"
        )

    return list(entry.dims)


def check_delta(dataset: LeRobotDataset, data: RobotData) -> None:
    """Raises DatasetError where `delta` names a dimension that the state or the actions lack, or takes another joint's
    state from an action: its own is at another place. Warns where the two merely have different names."""
    if not data.delta:
        return

    state, actions = _named(dataset, data.state), _named(dataset, data.actions)

    # Not below 0, which numpy would count from the end.
    if outside := [d for d in data.delta if not 0 <= d < min(len(state), len(actions))]:
        raise DatasetError(
            f"data set {data.path}: delta names dimension {outside[0]}, but there are {len(state)} of the state and "
            f"{len(actions)} of the actions; order the state's columns as the actions'"
        )

    # By number, "gripper" may be taken from the last quaternion entry: both are numbers, and training would not fail.
    pairs = [(d, actions[d][0], state[d][0]) for d in data.delta]
    different = [(d, a, s) for d, a, s in pairs if a is not None and s is not None and _joint(a) != _joint(s)]
    told = ", ".join(f"{d}: action {a!r}, state {s!r}" for d, a, s in different)

    # Backwards, so that the first of several alike is what the message names.
    at = {_joint(name): d for d, (name, _) in reversed(list(enumerate(state))) if name is not None}

    # An error only where the action's joint is elsewhere in the state: names alone prove nothing, as tools differ.
    elsewhere = [f"{a!r} is {at[_joint(a)]} of the state" for _, a, _ in different if _joint(a) in at]
    if elsewhere:
        raise DatasetError(
            f"data set {data.path}: delta pairs different joints ({told}; {', '.join(elsewhere)}); name the "
            'state\'s dimensions in the order of the actions (state = [{ column = "...", dims = [...] }]), or leave '
            "those out of delta"
        )

    if different:
        _warn_once(f"data set {data.path}: delta pairs different names ({told}); are they the same joint?")


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """Statistics, FAST and samples each ask again."""
    log.warning(message)


def _joint(name: str) -> str:
    """A name without what tells a command from a measurement: "Shoulder_pan.pos" and "shoulder_pan.cmd" are one."""
    words = re.split(r"[^a-z0-9]+", name.lower())

    # A name of such words alone, "joint_position", stays as it is: else all of them would be one joint.
    return "_".join(word for word in words if word and word not in ASPECTS) or name.lower()


def named_cameras(dataset: LeRobotDataset, data: RobotData) -> None:
    """Raises DatasetError when a camera's feature is missing, is no camera, or cannot be read."""
    for name, key in data.cameras.items():
        try:
            pick(key, dataset.features, f"feature for the model's camera {name!r}:", f"data set {dataset.root}")
        except DatasetError as error:
            raise DatasetError(f"{error}; insula data describe writes a mapping of what is there") from None

        # Present is not enough: a column of numbers, or one without files, would fail in the middle of training.
        dataset.camera(key)


def chunk_indices(frames: np.ndarray, stop: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame indices [N, H] of each chunk, clamped before `stop` [N], and where they were clamped, bool [N, H]."""
    # Clamped at the episode's end: what follows in the file is another episode's beginning.
    steps = frames[:, None] + np.arange(horizon)
    return np.minimum(steps, stop[:, None] - 1), steps >= stop[:, None]


def chosen_episodes(dataset: LeRobotDataset, episodes: Iterable[SupportsIndex] | None) -> np.ndarray:
    """`episodes`, or all. Raises DatasetError where one does not exist or there are none."""
    count = len(dataset.episodes)

    # `episodes` may be a generator, or numbers of any integer type.
    chosen = np.arange(count) if episodes is None else np.asarray(list(episodes), np.int64)
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if not len(chosen) or len(outside):
        what = f"episode {outside[0]} does not exist" if len(outside) else "no episode was chosen"
        raise DatasetError(f"data set {dataset.root}: {what}; it has episodes 0 to {count - 1}")

    return chosen


def frames_of(dataset: LeRobotDataset, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frames [N], one past the last frame of each one's episode [N])."""
    start, stop = dataset.episodes.start[episodes], dataset.episodes.stop[episodes]
    frames = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)])
    return frames, np.repeat(stop, stop - start)


def chunk_horizon(data: RobotData, name: str, horizon: int) -> int:
    """Steps of a robot's chunks: the model's `horizon`, which its mapping may shorten. Raises DatasetError where the
    mapping asks for more."""
    if data.horizon is not None and data.horizon > horizon:
        raise DatasetError(
            f"robots.{name}: horizon is {data.horizon}, the model's is {horizon}; shorten it, or raise --model.horizon"
        )

    return data.horizon or horizon
