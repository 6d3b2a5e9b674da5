"""Reading LeRobot v2.1 and v3.0, images in parquet or video: columns as numpy, frames decoded when asked for."""

import logging
import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from insula.data.images import NOT_COLOR, decode_image
from insula.data.lerobot import bookkeeping, crosscheck
from insula.data.lerobot.clip_reader import ClipReader
from insula.data.lerobot.info import BOOKKEEPING, Feature, Info, pick
from insula.data.lerobot.layout import read_layout
from insula.data.lerobot.places import Clip, Episodes
from insula.data.lerobot.shards import Shards
from insula.data.lerobot.tables import Tasks
from insula.errors import DatasetError, InputError

log = logging.getLogger(__name__)

GIB = 2**30
DECODE_FRAMES = 256  # at a time into the cache
TasksFrom = Literal["rows", "episodes"]


class LeRobotDataset:
    """A data set on disk, frames addressed by their global index. Safe to use from several threads.

        dataset.column("action")                                float32 [frames, D], read once
        dataset.images("observation.images.front", [3, 14])     uint8 [2, h, w, 3]
        dataset.episodes.start, .stop, .tasks;  dataset.tasks[dataset.column("task_index")[i]]

    Episodes, frames and tasks are numbered from 0 without gaps here, whatever the files call them (`episodes.number`,
    `task_table.number`). Where tables and rows contradict each other, the rows are believed, and `contradictions` says
    so. Decoded frames are kept while all frames of a camera fit under `cache_bytes` (cameras count together); a camera
    that does not fit is decoded again each time. Of a video, the frame nearest to its timestamp is shown, where that is
    beyond doubt (`insula.data.lerobot.timing`). Raises DatasetError for whatever is missing, damaged or inconsistent
    beyond that. `tasks_from`: whom to believe where the rows mean another task than the episode table says; an error
    unless given.
    """

    def __init__(self, root: str | Path, cache_bytes: int = 4 * GIB, tasks_from: TasksFrom | None = None):
        self.root = Path(root)
        layout = read_layout(self.root)
        self.info: Info = layout.info
        self.task_table = layout.task_table
        self.tasks: tuple[str, ...] = layout.tasks
        self.episodes: Episodes = layout.episodes
        self.contradictions = layout.contradictions
        self._believe_rows()

        self._shards = Shards(layout.spans, layout.episodes)
        self._tasks_from = tasks_from
        self._videos = ClipReader(layout.info, layout.episodes, layout.clips)
        self._columns: dict[str, np.ndarray] = {}
        self._annotations: dict[str, list[list[dict[str, Any]]]] = {}
        self._decoded: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
        self._cache_bytes = cache_bytes
        self._cache_left = cache_bytes
        self._lock = threading.RLock()

    def _believe_rows(self) -> None:
        # What is true is open: whatever is read might be another episode's.
        fatal = next((found for found in self.contradictions if found.fatal), None)
        if fatal is not None:
            raise fatal.error(self.root)
        if self.contradictions:
            count = len(self.contradictions)
            more = f" (and {count - 1} more; insula data doctor lists them)" if count > 1 else ""
            _warn_once(f"data set {self.root}: the rows are believed: {self.contradictions[0]}{more}")

    def __reduce__(self) -> tuple:
        """Another process opens it again."""
        return type(self), (self.root, self._cache_bytes, self._tasks_from)

    def __len__(self) -> int:
        return self.info.total_frames

    @property
    def fps(self) -> float | int:
        return self.info.fps

    @property
    def features(self) -> dict[str, Feature]:
        return self.info.features

    @property
    def cameras(self) -> tuple[str, ...]:
        """The feature names of all cameras that can be read."""
        return tuple(name for name, feature in self.features.items() if feature.is_camera)

    def feature(self, name: str) -> Feature:
        """Raises DatasetError with the nearest name when there is no such feature."""
        return self.features[pick(name, self.features, "feature", f"data set {self.root}")]

    def readable(self, name: str) -> Feature:
        """Raises DatasetError where there is no such feature, or it cannot be read."""
        feature = self.feature(name)
        if feature.problem is not None:
            raise DatasetError(f"data set {self.root}: {name!r} cannot be read: {feature.problem}")
        return feature

    def camera(self, name: str) -> Feature:
        """Raises DatasetError unless it holds pictures."""
        feature = self.readable(name)
        if not feature.is_camera:
            have = ", ".join(self.cameras) or "none"
            raise DatasetError(
                f"data set {self.root}: {name!r} is no camera, it holds {feature.dtype} values; its cameras: {have}"
            )

        return feature

    def numeric(self, name: str) -> Feature:
        """Raises DatasetError unless it holds numbers."""
        feature = self.readable(name)
        if not feature.is_numeric:
            way = "ask images() for frames" if feature.is_camera else "only numbers are read as columns"
            raise DatasetError(f"data set {self.root}: {name!r} holds {feature.dtype} values; {way}")

        return feature

    # --- numbers -----------------------------------------------------------------------------------------------------

    def column(self, name: str) -> np.ndarray:
        """All frames of a numeric feature, [frames] (shape (1,)) or [frames, *shape], read-only. Bookkeeping (`index`,
        `frame_index`, `episode_index`, `task_index`) is numbered as here, from 0 without gaps."""
        self.numeric(name)
        with self._lock:
            if name not in self._columns:
                values = self._counted(name)
                if values is None:
                    values = np.concatenate([self._read_column(name, file) for file in range(self.files)])
                self._columns[name] = values
                # Shared by all threads: somebody's -= would change it for everybody.
                self._columns[name].flags.writeable = False
            return self._columns[name]

    @property
    def files(self) -> int:
        """How many data files there are."""
        return len(self._shards)

    def frames_of(self, file: int) -> tuple[int, int]:
        """(first frame, one past the last) of a data file."""
        return self._shards.frames_of(file)

    def read_column(self, name: str, file: int) -> np.ndarray:
        """A numeric feature as one data file holds it, read again: for passes over more than fits into memory."""
        self.numeric(name)
        if name in BOOKKEEPING:
            start, stop = self.frames_of(file)
            return self.column(name)[start:stop]

        return self._read_column(name, file)

    def texts(self, name: str) -> list[str]:
        """All frames of a string feature. Raises DatasetError where one is null, with their number."""
        found = self.nullable_texts(name)
        if None in found:
            episode, frame = self.episodes.locate(found.index(None))
            raise DatasetError(
                f"data set {self.root}, episode {episode}, frame {frame}: {name!r} is null, expected a text "
                f"({found.count(None)} of {len(found)} frames)",
                "null",
            )

        return [text for text in found if text is not None]

    def nullable_texts(self, name: str) -> list[str | None]:
        """The same, with None where there is no text."""
        if not self.readable(name).is_text:
            raise DatasetError(f"data set {self.root}: {name!r} holds {self.features[name].dtype} values, not strings")
        return [text for file in range(self.files) for text in self._shards.texts(name, file)]

    def annotations(self, name: str) -> list[list[dict[str, Any]]]:
        """Of each episode, the entries {style, content, timestamp} of a column of annotations, as they are written
        there. Raises DatasetError where there is none, or the frames of an episode do not hold the same ones."""
        if not self.feature(name).is_language:
            dtype = self.features[name].dtype
            raise DatasetError(f"data set {self.root}: {name!r} holds {dtype} values, no annotations")

        with self._lock:
            if name not in self._annotations:
                self._annotations[name] = self._shards.annotations(name)
            return self._annotations[name]

    def task_positions(self, numbers: np.ndarray, name: str) -> np.ndarray:
        """Which of `tasks` each frame means, int64 [frames], where a column `name` holds numbers of the task table.
        Raises DatasetError for a number without a text."""
        return self.positions(self.task_table, numbers, name, "the task table")

    def positions(self, table: Tasks, numbers: np.ndarray, name: str, called: str) -> np.ndarray:
        """The same for any table of texts, `called` so in an error."""
        positions = table.positions(numbers)
        # A number without a text must not become the last text, as -1 would.
        if len(wrong := np.flatnonzero(positions < 0)):
            episode, frame = self.episodes.locate(int(wrong[0]))
            have = table.number
            raise DatasetError(
                f"data set {self.root}, episode {episode}, frame {frame}: {name!r} is {numbers[wrong[0]]}, {called} "
                f"has {have[0]} to {have[-1]} ({len(wrong)} such frames)"
            )

        return positions

    def _counted(self, name: str) -> np.ndarray | None:
        """Bookkeeping, which is counted rather than read; None for any other column."""
        if name not in BOOKKEEPING:
            return None
        if name == "task_index":
            return self._task_index()
        # Where it is stored it is read: recorders may start late, or at the camera's clock.
        if name == "timestamp" and self._shards.all_have(name):
            return None

        return bookkeeping.counted(name, self.episodes, self.fps)

    def _task_index(self) -> np.ndarray:
        """Positions in `tasks`. Without a column, what the episode table says, where that is one task for each."""
        if not self._shards.all_have("task_index"):
            return self._told_tasks("there is no task_index in the rows, and")

        numbers = np.concatenate([self._read_column("task_index", file) for file in range(self.files)])
        for found in crosscheck.tasks(self.task_table, self.episodes, 0, numbers):
            if found.fault == "task index" or self._tasks_from is None:
                raise found.error(self.root)
            # Asked for by name; unless it is, nobody can know which of the two is right.
            if self._tasks_from == "episodes":
                return self._told_tasks("the episode table is to be believed, but")

        return self.task_table.positions(numbers)

    def _told_tasks(self, why: str) -> np.ndarray:
        return bookkeeping.told_tasks(self.tasks, self.episodes, f"data set {self.root}: {why}")

    def _read_column(self, name: str, file: int) -> np.ndarray:
        return self._shards.numbers(name, self.features[name], file)

    # --- images ------------------------------------------------------------------------------------------------------

    def image(self, key: str, index: int) -> np.ndarray:
        """One frame of a camera, uint8 [h, w, 3]."""
        return self.images(key, [index])[0]

    def images(self, key: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Frames of a camera, uint8 [n, h, w, 3], decoded now or found in the cache."""
        wanted = np.asarray(indices, np.int64)
        self._check_indices(wanted)
        self.camera(key)
        # All of a camera or nothing: half a cache would make a step slow at random.
        cache = self._frame_cache(key)
        if cache is None:
            return self._decode(key, wanted)

        frames, known = cache
        missing = np.unique(wanted[~known[wanted]])
        # A frame of a video costs its whole group; a picture costs itself.
        if len(missing) and key in self._videos:
            self._decode_episodes(key, missing, frames, known)
            missing = missing[~known[missing]]

        for part in np.array_split(missing, -(-len(missing) // DECODE_FRAMES)) if len(missing) else []:
            # Bounded: decoding copies each frame once more.
            frames[part] = self._decode(key, part)
            known[part] = True  # after the pixels: another thread may look at any moment

        return frames[wanted]

    def _decode_episodes(self, key: str, missing: np.ndarray, frames: np.ndarray, known: np.ndarray) -> None:
        """A video is read in order, so that all of an episode costs little more than one frame. Where part of it cannot
        be read, nothing is kept: the frames that were asked for may still be sound."""
        for episode in np.unique(self.episodes.of_frame(missing)).tolist():
            whole = np.arange(self.episodes.start[episode], self.episodes.stop[episode])
            try:
                for part in np.array_split(whole, -(-len(whole) // DECODE_FRAMES)):
                    frames[part] = self._decode(key, part)
                    known[part] = True
            except DatasetError as error:
                log.debug("%s", error)  # raised again for whoever asked for a frame that is not sound

    def encoded_images(self, key: str, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The stored files of frames of a camera of dtype "image"."""
        return [self._image_bytes(key, i)[0] for i in np.asarray(indices, np.int64).tolist()]

    def clip(self, key: str, episode: int) -> Clip:
        """Where a camera of dtype "video" shows an episode, with the start that its frames really have."""
        start, stop = self.episodes.start[episode], self.episodes.stop[episode]
        return self._videos.aligned(key, episode, self.column("timestamp")[start:stop])

    def _check_indices(self, indices: np.ndarray) -> None:
        # Negative ones would count from the end, and hide a mistake.
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise InputError(f"data set {self.root}: got frame {outside[0]}, expected 0 to {len(self) - 1}")

    def _frame_cache(self, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(frames, which are decoded), or None when they do not fit. Untouched pages cost no memory."""
        if key not in self._decoded:
            feature = self.camera(key)
            with self._lock:
                shape = (len(self), *feature.size, 3)
                fits = math.prod(shape) <= self._cache_left
                if key not in self._decoded and fits:
                    self._cache_left -= math.prod(shape)
                if key not in self._decoded:
                    self._decoded[key] = (np.empty(shape, np.uint8), np.zeros(len(self), bool)) if fits else None
        return self._decoded[key]

    def _decode(self, key: str, indices: np.ndarray) -> np.ndarray:
        if key not in self._videos:
            return np.stack([self._decode_image(key, i) for i in indices.tolist()])

        timestamps = self.column("timestamp")
        out = np.empty((len(indices), *self.features[key].size, 3), np.uint8)
        episodes = self.episodes.of_frame(indices)
        for episode in np.unique(episodes).tolist():
            here = np.flatnonzero(episodes == episode)
            start, stop = int(self.episodes.start[episode]), int(self.episodes.stop[episode])
            out[here] = self._videos.frames(key, episode, timestamps[start:stop], indices[here] - start)

        return out

    def _decode_image(self, key: str, index: int) -> np.ndarray:
        data, where = self._image_bytes(key, index)
        return decode_image(data, self.features[key].size, where)

    def _image_bytes(self, key: str, index: int) -> tuple[bytes, str]:
        data, path = self._shards.encoded_image(key, index)
        episode, step = self.episodes.locate(index)
        where = f"{path}: {key!r}, episode {episode}, frame {step}"
        if data is None:
            raise DatasetError(f"{where}: no image bytes; only images stored inside the parquet files are read")

        return data, where


def camera_problems(dataset: LeRobotDataset) -> dict[str, str]:
    """Why a camera's pictures are no 8-bit color, as its first one shows, whatever meta/info.json says: nobody should
    be offered a depth map as a picture. Other damage is not looked for."""
    problems = {}
    for name in dataset.cameras:
        try:
            # A recorder writes all of a camera's pictures alike.
            dataset.image(name, 0)
        except DatasetError as error:
            if error.fault == NOT_COLOR:
                problems[name] = str(error)

    return problems


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    """A data set is opened several times on the way to training."""
    log.warning(message)
