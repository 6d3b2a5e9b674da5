"""`insula data convert`: any LeRobot data set we read, written anew as v3.0 with true global statistics.

Images keep their bytes and videos their files, so no picture is coded twice.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from insula.data.images import EncodedImages, EncodedVideo, histogram
from insula.data.lerobot.info import BOOKKEEPING
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.lerobot.video import TOLERANCE
from insula.data.lerobot.writer import LeRobotWriter, Values
from insula.errors import DatasetError

SAMPLED_FRAMES = 64
"""Of a camera and episode, evenly spread: what its pixel statistics are made of."""


def convert(
    source: Path, destination: Path, *, overwrite: bool = False, progress: Callable[[int], Any] | None = None
) -> LeRobotDataset:
    """Write the data set at `source` as v3.0. `progress` is called with the episodes written so far.

    Raises DatasetError where the source is damaged, its timestamps are not at multiples of 1 / fps (v3.0 readers count
    on that), or the destination holds something and `overwrite` is not set.
    """
    dataset = LeRobotDataset(source, cache_bytes=0)
    _check_timestamps(dataset)
    features = {name: feature for name, feature in dataset.features.items() if name not in BOOKKEEPING}
    with LeRobotWriter(destination, dataset.fps, features, dataset.info.robot_type, overwrite=overwrite) as writer:
        for episode in range(len(dataset.episodes)):
            frames = np.arange(dataset.episodes.start[episode], dataset.episodes.stop[episode])
            texts = [dataset.tasks[i] for i in dataset.column("task_index")[frames]]
            writer.add_episode({name: _values(dataset, name, frames) for name in features}, texts)
            if progress:
                progress(episode + 1)
    return LeRobotDataset(destination)


def _values(dataset: LeRobotDataset, name: str, frames: np.ndarray) -> Values:
    feature = dataset.features[name]
    if feature.dtype == "string":
        return dataset.texts(name)[frames[0] : frames[-1] + 1]
    if not feature.is_camera:
        return dataset.column(name)[frames]
    sampled = frames[np.unique(np.linspace(0, len(frames) - 1, SAMPLED_FRAMES).astype(int))]
    counts = histogram(dataset.images(name, sampled))
    if feature.dtype == "image":
        return EncodedImages(tuple(dataset.encoded_images(name, frames)), counts, feature.size)
    clip = dataset.clip(name, int(dataset.episodes.of_frame(frames[:1])[0]))
    if clip.start:
        raise DatasetError(f"{clip.path}: holds several episodes, so it is v3.0 already; nothing to convert")
    return EncodedVideo(clip.path, len(frames), counts, feature.size)


def _check_timestamps(dataset: LeRobotDataset) -> None:
    step = np.concatenate([np.arange(n) for n in dataset.episodes.length])
    off = np.abs(dataset.column("timestamp") - step / dataset.fps)
    if off.max() > TOLERANCE:
        episode, frame = dataset.episodes.locate(int(off.argmax()))
        raise DatasetError(
            f"data set {dataset.root}: episode {episode}, frame {frame} lies {off.max():.4f} s from a multiple of "
            f"1 / fps ({dataset.fps}); correct fps or the timestamps"
        )
