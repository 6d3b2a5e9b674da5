"""Reading LeRobot v2.1 and v3.0, images in parquet or video: columns as numpy, frames decoded when asked for."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.data.images import decode_image
from insula.data.lerobot.info import Feature, Info, pick
from insula.data.lerobot.layout import Clip, Episodes, open_parquet, read_layout
from insula.data.lerobot.video import VideoReader
from insula.errors import DatasetError, InputError

GIB = 2**30
ENCODED_BYTES = GIB // 4  # PNG bytes of recently read row groups, kept so that neighbors need no second read
OPEN_FILES = 64  # v2.1 has a file per episode
DECODE_FRAMES = 256  # at a time into the cache


@dataclass(frozen=True)
class _Shard:
    """One data file: the frames start .. stop - 1, and the first frame of each of its row groups."""

    path: Path
    start: int
    stop: int
    file: pq.ParquetFile
    groups: np.ndarray


class LeRobotDataset:
    """A data set on disk, frames addressed by their global index. Safe to use from several threads.

        dataset.column("action")                                float32 [frames, D], read once
        dataset.images("observation.images.front", [3, 14])     uint8 [2, h, w, 3]
        dataset.episodes.start, .stop, .tasks;  dataset.tasks[dataset.column("task_index")[i]]

    Decoded frames are kept while all frames of a camera fit under `cache_bytes` (cameras count together); a camera that
    does not fit is decoded anew each time. Of a video, the frame at exactly its timestamp is decoded. Raises
    DatasetError for whatever is missing, damaged or inconsistent.
    """

    def __init__(self, root: str | Path, cache_bytes: int = 4 * GIB):
        self.root = Path(root)
        layout = read_layout(self.root)
        self.info: Info = layout.info
        self.tasks: tuple[str, ...] = layout.tasks
        self.episodes: Episodes = layout.episodes
        self._spans, self._clips = layout.spans, layout.clips
        self._stops = [span.stop for span in layout.spans]
        self._videos = VideoReader()
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._columns: dict[str, np.ndarray] = {}
        self._decoded: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
        self._encoded: OrderedDict[tuple[str, int, int], pa.BinaryArray] = OrderedDict()
        self._encoded_bytes, self._cache_bytes, self._cache_left = 0, cache_bytes, cache_bytes
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        """Another process opens it anew."""
        return type(self), (self.root, self._cache_bytes)

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
        """The feature names of all cameras."""
        return tuple(name for name, feature in self.features.items() if feature.is_camera)

    def feature(self, name: str) -> Feature:
        """Raises DatasetError with the nearest name when there is no such feature."""
        return self.features[pick(name, self.features, "feature", f"data set {self.root}")]

    def numeric(self, name: str) -> Feature:
        """Raises DatasetError unless it holds numbers."""
        feature = self.feature(name)
        if not feature.is_numeric:
            way = "ask images() for frames" if feature.is_camera else "only numbers are read as columns"
            raise DatasetError(f"data set {self.root}: {name!r} holds {feature.dtype} values; {way}")
        return feature

    # --- numbers -----------------------------------------------------------------------------------------------------

    def column(self, name: str) -> np.ndarray:
        """All frames of a numeric feature, [frames] (shape (1,)) or [frames, *shape], read-only."""
        self.numeric(name)
        with self._lock:
            if name not in self._columns:
                parts = [self.read_column(name, i) for i in range(self.files)]
                self._columns[name] = np.concatenate(parts)
                self._columns[name].flags.writeable = False
            return self._columns[name]

    @property
    def files(self) -> int:
        """How many data files there are."""
        return len(self._spans)

    def frames_of(self, file: int) -> tuple[int, int]:
        """(first frame, one past the last) of a data file."""
        return self._spans[file].start, self._spans[file].stop

    def read_column(self, name: str, file: int) -> np.ndarray:
        """A numeric feature as one data file holds it, read anew: for passes over more than fits into memory."""
        feature = self.numeric(name)
        with self._lock:
            shard = self._shard(file)
        table = _read(shard, [name, "index"])
        index = table["index"].to_numpy()
        if not np.array_equal(index, np.arange(shard.start, shard.stop)):
            row = int(np.argmax(index != np.arange(shard.start, shard.stop)))
            raise DatasetError(
                f"{shard.path}: row {row} has index {index[row]}, expected {shard.start + row}; "
                "rows must follow the episode table without gaps"
            )
        values = table[name].combine_chunks()
        while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
            values = values.flatten()
        rows, shape = shard.stop - shard.start, () if feature.shape == (1,) else feature.shape
        if values.null_count or len(values) != rows * int(np.prod(feature.shape)):
            raise DatasetError(
                f"{shard.path}: {name!r} has {len(values) - values.null_count} values in {rows} rows, "
                f"expected {list(feature.shape)} in each"
            )
        array = values.to_numpy(zero_copy_only=False)
        if not np.can_cast(array.dtype, feature.dtype, "same_kind"):
            raise DatasetError(f"{shard.path}: {name!r} is {array.dtype}, info.json says {feature.dtype}")
        return array.astype(feature.dtype, copy=False).reshape(rows, *shape)

    def texts(self, name: str) -> list[str]:
        """All frames of a string feature."""
        if self.feature(name).dtype != "string":
            raise DatasetError(f"data set {self.root}: {name!r} holds {self.features[name].dtype} values, not strings")
        with self._lock:
            parts = [_read(self._shard(i), [name])[name].to_pylist() for i in range(len(self._spans))]
        return [str(text) for part in parts for text in part]

    # --- images ------------------------------------------------------------------------------------------------------

    def image(self, key: str, index: int) -> np.ndarray:
        """One frame of a camera, uint8 [h, w, 3]."""
        return self.images(key, [index])[0]

    def images(self, key: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Frames of a camera, uint8 [n, h, w, 3], decoded now or found in the cache."""
        wanted = np.asarray(indices, np.int64)
        self._check_indices(wanted)
        cache = self._frame_cache(key)
        if cache is None:
            return self._decode(key, wanted)
        frames, known = cache
        missing = np.unique(wanted[~known[wanted]])
        if len(missing) and key in self._clips:  # a video is read in order: the whole episode costs little more
            missing = np.flatnonzero(
                np.isin(self.episodes.of_frame(np.arange(len(self))), self.episodes.of_frame(missing))
            )
        for part in np.array_split(missing, -(-len(missing) // DECODE_FRAMES)) if len(missing) else []:
            frames[part] = self._decode(key, part)
            known[part] = True  # after the pixels: another thread may look at any moment
        return frames[wanted]

    def encoded_images(self, key: str, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The stored files of frames of a camera of dtype "image"."""
        return [self._image_bytes(key, i)[0] for i in np.asarray(indices, np.int64).tolist()]

    def clip(self, key: str, episode: int) -> Clip:
        """Where a camera of dtype "video" shows an episode."""
        return self._clips[key][episode]

    def _check_indices(self, indices: np.ndarray) -> None:
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise InputError(f"data set {self.root}: got frame {outside[0]}, expected 0 to {len(self) - 1}")

    def _frame_cache(self, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(frames, which are decoded), or None when they do not fit. Untouched pages cost no memory."""
        if key not in self._decoded:
            feature = self.feature(key)
            if not feature.is_camera:
                raise DatasetError(f"data set {self.root}: {key!r} holds {feature.dtype} values, expected a camera")
            with self._lock:
                shape = (len(self), *feature.size, 3)
                fits = int(np.prod(shape)) <= self._cache_left
                if key not in self._decoded and fits:
                    self._cache_left -= int(np.prod(shape))
                if key not in self._decoded:
                    self._decoded[key] = (np.empty(shape, np.uint8), np.zeros(len(self), bool)) if fits else None
        return self._decoded[key]

    def _decode(self, key: str, indices: np.ndarray) -> np.ndarray:
        if key not in self._clips:
            return np.stack([self._decode_image(key, i) for i in indices.tolist()])
        feature, timestamps = self.features[key], self.column("timestamp")
        out = np.empty((len(indices), *feature.size, 3), np.uint8)
        episodes = self.episodes.of_frame(indices)
        for episode in np.unique(episodes).tolist():
            rows, clip = np.flatnonzero(episodes == episode), self._clips[key][episode]
            at = clip.start + timestamps[indices[rows]].astype(np.float64)
            out[rows] = self._videos.frames(clip.path, at.tolist(), feature.size, f"{key!r}, episode {episode}")
        return out

    def _decode_image(self, key: str, index: int) -> np.ndarray:
        data, where = self._image_bytes(key, index)
        return decode_image(data, self.features[key].size, where)

    def _image_bytes(self, key: str, index: int) -> tuple[bytes, str]:
        data, path = self._encoded_image(key, index)
        episode, step = self.episodes.locate(index)
        where = f"{path}: {key!r}, episode {episode}, frame {step}"
        if data is None:
            raise DatasetError(f"{where}: no image bytes; only images stored inside the parquet files are read")
        return data, where

    def _encoded_image(self, key: str, index: int) -> tuple[bytes | None, Path]:
        """The stored bytes of one frame; its row group is read unless it was read lately."""
        with self._lock:
            number = int(np.searchsorted(self._stops, index, side="right"))
            shard = self._shard(number)
            group = int(np.searchsorted(shard.groups, index, side="right")) - 1
            column = self._encoded.get((key, number, group))
            if column is None:
                column = _read(shard, [f"{key}.bytes"], group)[key].combine_chunks().field("bytes")
                self._encoded[key, number, group] = column
                self._encoded_bytes += column.nbytes
                while self._encoded_bytes > ENCODED_BYTES and len(self._encoded) > 1:
                    self._encoded_bytes -= self._encoded.popitem(last=False)[1].nbytes
            else:
                self._encoded.move_to_end((key, number, group))
        return column[index - int(shard.groups[group])].as_py(), shard.path

    def _shard(self, number: int) -> _Shard:
        """Open a data file once; its rows must be those the episode table promises."""
        if number in self._shards:
            self._shards.move_to_end(number)
        else:
            span = self._spans[number]
            path, start, stop = span.path, span.start, span.stop
            file = open_parquet(path)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            if sum(sizes) != stop - start:
                raise DatasetError(
                    f"{path}: holds {sum(sizes)} rows, the episode table promises {stop - start}; "
                    "the file or meta/episodes is from another state of the data set"
                )
            columns = set(file.schema_arrow.names)
            for name, feature in self.features.items():
                if feature.dtype != "video":
                    pick(name, columns, "column", path)
            self._shards[number] = _Shard(path, start, stop, file, start + np.cumsum([0, *sizes[:-1]]))
            if len(self._shards) > OPEN_FILES:
                self._shards.popitem(last=False)
        return self._shards[number]


def _read(shard: _Shard, columns: list[str], group: int | None = None) -> pa.Table:
    try:
        if group is None:
            return shard.file.read(columns=columns, use_threads=False)
        return shard.file.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as e:
        part = "" if group is None else f", row group {group}"
        raise DatasetError(f"{shard.path}{part}: damaged ({str(e).splitlines()[0]}); restore the file") from None
