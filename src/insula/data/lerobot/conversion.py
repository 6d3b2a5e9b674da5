"""`insula data convert`: any LeRobot data set we read, written again as v3.0 with true global statistics.

Images keep their bytes and videos their files, so no picture is coded twice. Episodes, frames and tasks are numbered
from 0 without gaps, and what the format cannot hold is left out; both are said.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from insula.data.images import EncodedImages, EncodedVideo, histogram
from insula.data.lerobot import bookkeeping
from insula.data.lerobot.info import BOOKKEEPING, Feature
from insula.data.lerobot.reader import LeRobotDataset, TasksFrom, camera_problems
from insula.data.lerobot.tables import SUBTASKS
from insula.data.lerobot.timing import EXACT, NEAREST_WITHIN
from insula.data.lerobot.writable import Values
from insula.data.lerobot.writer import LeRobotWriter
from insula.errors import DatasetError, InputError
from insula.files import is_named, read_bytes

log = logging.getLogger(__name__)
SAMPLED_FRAMES = 64
"""Of a camera and episode, evenly spread: what its pixel statistics are made of."""


def convert_dataset(
    source: Path,
    destination: Path,
    *,
    overwrite: bool = False,
    tasks_from: TasksFrom | None = None,
    leave_out: Sequence[str] = (),
    drop_episodes: Sequence[int] = (),
    progress: Callable[[int], Any] | None = None,
) -> LeRobotDataset:
    """Write the data set at `source` as v3.0. `progress` is called with the episodes written so far; `tasks_from` says
    whom to believe where the rows mean another task than the episode table. What the format cannot hold is left out
    and logged; so are the columns `leave_out` and the episodes `drop_episodes`, as the files number them.

    Raises DatasetError where the source is damaged, the timestamps of its videos are not at multiples of 1 / fps (v3.0
    readers count on that), or the destination holds something and `overwrite` is not set.
    """
    # Each picture is looked at once: keeping decoded ones would only cost memory.
    dataset = LeRobotDataset(source, cache_bytes=0, tasks_from=tasks_from)
    episodes = _episodes(dataset, drop_episodes)
    features = _features(dataset, leave_out)
    _check_timestamps(dataset, features, episodes)

    options: dict[str, Any] = {"overwrite": overwrite, "keep_non_finite": True}
    with LeRobotWriter(destination, dataset.fps, features, dataset.info.robot_type, **options) as writer:
        for written, episode in enumerate(episodes):
            frames = np.arange(dataset.episodes.start[episode], dataset.episodes.stop[episode])
            # The rows' own tasks: they may change within an episode.
            texts = [dataset.tasks[i] for i in dataset.column("task_index")[frames]]
            writer.add_episode({name: _values(dataset, name, frames) for name in features}, texts)
            if progress:
                progress(written + 1)

    # The numbers of a column mean nothing without their texts.
    if is_named(source / SUBTASKS):
        (destination / SUBTASKS).write_bytes(read_bytes(source / SUBTASKS))

    if writer.non_finite:
        log.warning("data set %s: %d values are NaN or infinite, and are kept as they are", source, writer.non_finite)

    return LeRobotDataset(destination)


def _episodes(dataset: LeRobotDataset, dropped: Sequence[int]) -> list[int]:
    """Those that are written, as they are numbered here."""
    known = dataset.episodes.number.tolist()
    if unknown := sorted(set(dropped) - set(known)):
        raise InputError(
            f"drop_episodes: no episode {unknown[0]}; data set {dataset.root} has {known[0]} to {known[-1]}"
        )

    kept = [episode for episode, number in enumerate(known) if number not in set(dropped)]
    if not kept:
        raise InputError(f"drop_episodes: all {len(known)} episodes, so that nothing is left to write")

    return kept


def _features(dataset: LeRobotDataset, leave_out: Sequence[str]) -> dict[str, Feature]:
    """Those that are written."""
    # A name that is mistyped would leave in what was to go.
    for name in leave_out:
        dataset.feature(name)
    problems = camera_problems(dataset)
    features = {}
    for name, feature in dataset.features.items():
        if name in BOOKKEEPING or name in leave_out:
            continue
        # Of a kind nobody reads is one thing; recorded and spoiled is another: that is not left out unasked.
        if feature.is_damaged:
            raise DatasetError(
                f"data set {dataset.root}: {name!r} cannot be read: {feature.problem}; mend it, or convert without it: "
                f"--leave-out {name}",
                "null",
            )

        if why := _cannot_be_written(name, feature) or problems.get(name):
            log.warning("data set %s: %r is left out: %s", dataset.root, name, why)
        else:
            features[name] = feature

    return features


def _cannot_be_written(name: str, feature: Feature) -> str | None:
    if feature.problem is not None:
        return feature.problem
    if not name or "/" in name:
        return "a name must not be empty nor contain '/'"
    if not feature.is_camera and len(feature.shape) != 1:
        return f"shape is {list(feature.shape)}, only lists of numbers are written"

    return None


def _values(dataset: LeRobotDataset, name: str, frames: np.ndarray) -> Values:
    feature = dataset.features[name]
    if feature.dtype == "string":
        return dataset.nullable_texts(name)[frames[0] : frames[-1] + 1]
    if not feature.is_camera:
        return dataset.column(name)[frames]

    # Statistics of pictures need no more than a sample; LeRobot samples as well.
    sampled = frames[np.unique(np.linspace(0, len(frames) - 1, SAMPLED_FRAMES).astype(int))]
    # Decoding them is also what refuses a picture that is damaged or of another kind.
    counts = histogram(dataset.images(name, sampled))
    if feature.dtype == "image":
        return EncodedImages(tuple(dataset.encoded_images(name, frames)), counts, feature.size)

    clip = dataset.clip(name, int(dataset.episodes.of_frame(frames[:1])[0]))

    return EncodedVideo(clip.path, len(frames), counts, feature.size, clip.start)


def _check_timestamps(dataset: LeRobotDataset, features: Mapping[str, Feature], episodes: Sequence[int]) -> None:
    """Those of videos must say which frame is whose; which frames that are is looked up clip by clip."""
    if not any(feature.dtype == "video" for feature in features.values()):
        _check_rate(dataset)
        return

    step = np.concatenate([np.arange(n) for n in dataset.episodes.length])
    off = bookkeeping.off_the_grid(dataset.column("timestamp"), step, dataset.fps)
    # Episodes that are not written may have any times.
    off[~np.isin(dataset.episodes.of_frame(np.arange(len(dataset))), episodes)] = 0.0
    if off.max() > max(EXACT, NEAREST_WITHIN / dataset.fps):
        episode, frame = dataset.episodes.locate(int(off.argmax()))
        raise DatasetError(
            f"data set {dataset.root}: episode {episode}, frame {frame} lies {off.max():.4f} s from a multiple of "
            f"1 / fps ({dataset.fps}); correct fps or the timestamps"
        )

    if off.max() > EXACT:
        log.warning("data set %s: timestamps are written again, as frame_index / fps", dataset.root)


def _check_rate(dataset: LeRobotDataset) -> None:
    """Pictures need no clock: their timestamps are written again, unless they say that fps is wrong."""
    try:
        times = dataset.column("timestamp").astype(np.float64)
    except DatasetError as error:
        # A clock that was never set is no matter for pictures; a file that cannot be read is.
        if error.fault not in ("null", "wrong dtype", "wrong shape"):
            raise
        log.warning("%s; timestamps are written again, as frame_index / fps", error)
        return

    episode = dataset.episodes.of_frame(np.arange(len(dataset)))
    apart = bookkeeping.other_rate(times, episode, dataset.fps)
    if apart is not None:
        raise DatasetError(
            f"data set {dataset.root}: frames are {apart:.4f} s apart, but fps is {dataset.fps}: write "
            f'"fps": {1 / apart:.4g} into meta/info.json, or correct the timestamps'
        )

    step = np.arange(len(dataset)) - dataset.episodes.start[episode]
    off = bookkeeping.off_the_grid(times, step, dataset.fps)
    if not (off <= EXACT).all():
        log.warning("data set %s: timestamps are written again, as frame_index / fps", dataset.root)
