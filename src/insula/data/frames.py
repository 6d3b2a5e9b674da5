"""The numbers of one robot's samples: which frames they are, and the state and actions of the whole data set."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import SupportsIndex

import numpy as np

from insula.data.chunks import check_delta, chosen_episodes, chunk_indices, dim_names, frames_of, joined
from insula.data.fitting import refuse_non_finite_frames
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import RobotData
from insula.data.robot import Robot
from insula.errors import DatasetError
from insula.shapes import Bool

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Frames:
    """N samples of a data set with F frames, in the data's units.

    `index` [N]: the frame of each sample. `stop` [N]: one past its episode's last frame. `state` float32 [F, S] and
    `actions` float32 [F, D] are of all frames. `left_out`: samples that would have had a NaN or infinity.
    """

    index: np.ndarray
    stop: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    left_out: int = 0

    def chunks(self, rows: np.ndarray, robot: Robot) -> tuple[np.ndarray, np.ndarray]:
        """Normalized and clipped chunks float32 [B, H, D] of the robot's own sizes, and which steps are past the end of
        the episode, bool [B, H]."""
        # Relative to the state at the chunk's start, also for its last step: serving knows no later state.
        steps, is_pad = chunk_indices(self.index[rows], self.stop[rows], robot.horizon)
        chunk = robot.normalize_actions(self.actions[steps], self.state[self.index[rows]])
        return np.clip(chunk, -robot.clip, robot.clip), is_pad

    def taken(self, which: Bool[np.ndarray, "n"]) -> "Frames":
        """Those samples alone."""
        return replace(self, index=self.index[which], stop=self.stop[which])


def read_frames(
    dataset: LeRobotDataset,
    data: RobotData,
    robot: Robot,
    episodes: Iterable[SupportsIndex] | None = None,
    skip_non_finite: bool = False,
) -> Frames:
    """The samples of `episodes`, all unless given, as `data` maps them.

    Raises DatasetError where columns and statistics do not fit each other, InputError for a NaN or infinity: naming
    episode, frame and dimension. With `skip_non_finite` such samples are left out, counted and logged.
    """
    # All of it in memory: numbers are small beside pictures, and a batch looks its chunks up at random.
    actions = joined(dataset, data.actions, dataset.column)
    state = joined(dataset, data.state, dataset.column) if data.state else np.zeros((len(dataset), 0), np.float32)
    _check_statistics(dataset, data, robot, state, actions)

    index, stop = frames_of(dataset, chosen_episodes(dataset, episodes))
    finite = _all_finite(index, stop, state, actions, robot.horizon)
    left_out = int((~finite).sum())
    if left_out and not skip_non_finite:
        # Raises: the first bad number of the whole data set is as good as any to begin mending with.
        for values, columns in ((state, data.state), (actions, data.actions)):
            refuse_non_finite_frames(dataset, values, 0, dim_names(dataset, columns))

    if left_out:
        log.warning("data set %s: %d samples with a NaN or infinity are left out", dataset.root, left_out)

    # An empty source would fail in the loader, where nobody knows why it is empty.
    if not finite.any():
        raise DatasetError(f"data set {dataset.root}: no sample has finite numbers throughout")

    return Frames(index[finite], stop[finite], state, actions, left_out)


def _all_finite(
    index: np.ndarray, stop: np.ndarray, state: np.ndarray, actions: np.ndarray, horizon: int
) -> np.ndarray:
    """Of each sample, bool [N]: are its state and every action of its chunk finite?"""
    finite_actions = np.isfinite(actions).all(1)
    finite_state = np.isfinite(state).all(1)
    if finite_actions.all() and finite_state.all():  # nearly always, and then no chunk need be looked up
        return np.ones(len(index), bool)

    # A NaN spoils all chunks that reach it, the horizon's worth of samples before its frame.
    return finite_actions[chunk_indices(index, stop, horizon)[0]].all(1) & finite_state[index]


def _check_statistics(
    dataset: LeRobotDataset, data: RobotData, robot: Robot, state: np.ndarray, actions: np.ndarray
) -> None:
    # Again here, and not while fitting alone: statistics may come from a file.
    check_delta(dataset, data)
    for name, values in (("state", state), ("actions", actions)):
        dim = robot.stats[name].dim
        if values.shape[1] != dim:
            source = f" ({data.statistics})" if data.statistics else ""
            raise DatasetError(
                f"statistics of {name!r}{source} have {dim} dimensions, data set {dataset.root} has "
                f"{values.shape[1]}; fit them on this data set"
            )
