"""Reading LeRobot v3.0 with images in parquet: columns as numpy, frames decoded when asked for."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.data.images import decode_image
from insula.data.schema import DATA_PATH, DatasetError, Feature, Info, pick, read_info

GIB = 2**30
ENCODED_BYTES = GIB // 4  # PNG bytes of recently read row groups, kept so that neighbours need no second read
_TEMPLATE = re.compile(r"(?:[^{}]|\{(?:chunk_index|file_index)(?::0?\d?d)?\})+")


@dataclass(frozen=True)
class Episodes:
    """The episode table: episode e has the frames start[e] .. stop[e] - 1, and the texts tasks[e]."""

    start: np.ndarray
    stop: np.ndarray
    tasks: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def length(self) -> np.ndarray:
        return self.stop - self.start

    def of_frame(self, frames: np.ndarray) -> np.ndarray:
        """The episode of each frame index."""
        return np.searchsorted(self.stop, frames, side="right")

    def locate(self, frame: int) -> tuple[int, int]:
        """(episode, step within it) of one frame index."""
        episode = int(np.searchsorted(self.stop, frame, side="right"))
        return episode, frame - int(self.start[episode])


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
    does not fit is decoded anew each time. Raises DatasetError for whatever is missing, damaged or inconsistent.
    """

    def __init__(self, root: str | Path, cache_bytes: int = 4 * GIB):
        self.root = Path(root)
        self.info: Info = read_info(self.root)
        self.tasks: tuple[str, ...] = _read_tasks(self.root / "meta" / "tasks.parquet")
        self.episodes, self._spans = _read_episodes(self.root, self.info)
        self._shards: dict[int, _Shard] = {}
        self._columns: dict[str, np.ndarray] = {}
        self._decoded: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}
        self._encoded: OrderedDict[tuple[str, int, int], pa.BinaryArray] = OrderedDict()
        self._encoded_bytes, self._cache_left = 0, cache_bytes
        self._lock = threading.RLock()

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

    # --- numbers -----------------------------------------------------------------------------------------------------

    def column(self, name: str) -> np.ndarray:
        """All frames of a numeric feature, [frames] (shape (1,)) or [frames, *shape], read-only."""
        feature = self.feature(name)
        if not feature.is_numeric:
            way = "ask images() for frames" if feature.is_camera else "only numbers are read as columns"
            raise DatasetError(f"data set {self.root}: {name!r} holds {feature.dtype} values; {way}")
        with self._lock:
            if name not in self._columns:
                parts = [self._read_column(name, feature, i) for i in range(len(self._spans))]
                self._columns[name] = np.concatenate(parts)
                self._columns[name].flags.writeable = False
            return self._columns[name]

    def _read_column(self, name: str, feature: Feature, shard_number: int) -> np.ndarray:
        shard = self._shard(shard_number)
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
            return np.stack([self._decode(key, i) for i in wanted.tolist()])
        frames, known = cache
        for i in wanted[~known[wanted]].tolist():
            frames[i] = self._decode(key, i)
            known[i] = True  # after the pixels: another thread may look at any moment
        return frames[wanted]

    def _check_indices(self, indices: np.ndarray) -> None:
        outside = indices[(indices < 0) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"data set {self.root}: got frame {outside[0]}, expected 0 to {len(self) - 1}")

    def _frame_cache(self, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(frames, which are decoded), or None when they do not fit. Untouched pages cost no memory."""
        if key not in self._decoded:
            feature = self.feature(key)
            if feature.dtype != "image":
                raise DatasetError(
                    f"data set {self.root}: {key!r} is stored as {feature.dtype}; frames are read from features of "
                    "dtype 'image' (PNG in the parquet files) for now"
                )
            with self._lock:
                shape = (len(self), *feature.size, 3)
                fits = int(np.prod(shape)) <= self._cache_left
                if key not in self._decoded and fits:
                    self._cache_left -= int(np.prod(shape))
                if key not in self._decoded:
                    self._decoded[key] = (np.empty(shape, np.uint8), np.zeros(len(self), bool)) if fits else None
        return self._decoded[key]

    def _decode(self, key: str, index: int) -> np.ndarray:
        data, path = self._encoded_image(key, index)
        episode, step = self.episodes.locate(index)
        where = f"{path}: {key!r}, episode {episode}, frame {step}"
        if data is None:
            raise DatasetError(f"{where}: no image bytes; only images stored inside the parquet files are read")
        return decode_image(data, self.features[key].size, where)

    def _encoded_image(self, key: str, index: int) -> tuple[bytes | None, Path]:
        """The stored bytes of one frame; its row group is read unless it was read lately."""
        with self._lock:
            number = int(np.searchsorted([stop for _, _, stop in self._spans], index, side="right"))
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
        if number not in self._shards:
            path, start, stop = self._spans[number]
            file = _open_parquet(path)
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
        return self._shards[number]


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing; the copy of the data set is incomplete") from None
    except (pa.ArrowException, OSError) as e:
        size = path.stat().st_size if path.is_file() else 0
        raise DatasetError(
            f"{path}: not a readable parquet file ({size} bytes; {str(e).splitlines()[0]}); "
            "it was probably cut short while copying or recording: restore it"
        ) from None


def _read(shard: _Shard, columns: list[str], group: int | None = None) -> pa.Table:
    try:
        if group is None:
            return shard.file.read(columns=columns, use_threads=False)
        return shard.file.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as e:
        part = "" if group is None else f", row group {group}"
        raise DatasetError(f"{shard.path}{part}: damaged ({str(e).splitlines()[0]}); restore the file") from None


def _read_tasks(path: Path) -> tuple[str, ...]:
    """Texts ordered by task_index. Converters leave the text column unnamed, which pandas stores as below."""
    table = _open_parquet(path).read()
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path}: columns are {table.column_names}, expected task and task_index")
    pairs = sorted(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    if [index for index, _ in pairs] != list(range(len(pairs))):
        raise DatasetError(f"{path}: task_index must count from 0 without gaps, got {[i for i, _ in pairs][:10]} ...")
    return tuple(task for _, task in pairs)


def _read_episodes(root: Path, info: Info) -> tuple[Episodes, list[tuple[Path, int, int]]]:
    """The episode table, and (path, first frame, last frame + 1) of each data file."""
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"data set {root}: no meta/episodes/chunk-*/file-*.parquet; the copy is incomplete")
    numbers = ["episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    names = [*numbers, "tasks"]
    tables = []
    for path in paths:
        file = _open_parquet(path)
        for name in names:
            pick(name, file.schema_arrow.names, "column", path)
        tables.append(file.read(columns=names))
    table = pa.concat_tables(tables).sort_by("episode_index")
    index, start, stop, chunk, file_index = (table[name].to_numpy() for name in numbers)
    _check_episodes(root, info, index, start, stop)
    spans: list[tuple[Path, int, int]] = []
    for where in set(zip(chunk.tolist(), file_index.tolist(), strict=True)):
        rows = np.flatnonzero((chunk == where[0]) & (file_index == where[1]))
        spans.append((_data_path(root, info, *where), int(start[rows].min()), int(stop[rows].max())))
    spans.sort(key=lambda span: span[1])
    return Episodes(start, stop, tuple(map(tuple, table["tasks"].to_pylist()))), spans


def _check_episodes(root: Path, info: Info, index: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
    where = f"data set {root}: meta/episodes"
    if len(index) != info.total_episodes or not np.array_equal(index, np.arange(len(index))):
        raise DatasetError(f"{where}: {len(index)} episodes, expected 0 to {info.total_episodes - 1}, each once")
    if not len(index) or stop[-1] != info.total_frames:
        frames = int(stop[-1]) if len(stop) else 0
        raise DatasetError(f"{where}: {frames} frames in all, info.json says {info.total_frames}")
    due = np.concatenate([[0], stop[:-1]])
    for e in np.flatnonzero((start != due) | (stop <= start))[:1]:
        raise DatasetError(f"{where}: episode {e} spans frames {start[e]} to {stop[e]}, expected a start at {due[e]}")


def _data_path(root: Path, info: Info, chunk: int, file: int) -> Path:
    if not _TEMPLATE.fullmatch(info.data_path):
        raise DatasetError(f"data set {root}: data_path is {info.data_path!r}, expected something like {DATA_PATH!r}")
    path = root / info.data_path.format(chunk_index=chunk, file_index=file)
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:  # symbolic links into a cache are fine
        raise DatasetError(f"data set {root}: data_path {info.data_path!r} leaves the data set")
    return path
