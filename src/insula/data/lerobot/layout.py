"""Where everything of a LeRobot data set is: which rows of which file, which part of which video, for either version.

v2.1    a data file and a video per episode and camera, metadata as JSON lines
v3.0    many episodes in a file, the metadata a table that says where each one begins
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.data.lerobot.info import DATA_PATH, Info, pick, read_info
from insula.errors import DatasetError

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


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

    def between(self, start: int, stop: int) -> range:
        """The episodes of the frames start .. stop - 1."""
        first, last = self.of_frame(np.array([start, stop - 1])).tolist()
        return range(first, last + 1)

    def locate(self, frame: int) -> tuple[int, int]:
        """(episode, step within it) of one frame index."""
        episode = int(np.searchsorted(self.stop, frame, side="right"))
        return episode, frame - int(self.start[episode])


@dataclass(frozen=True)
class Span:
    """A data file: the frames start .. stop - 1."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Clip:
    """The part of a video file that shows one episode: frame i is at `start + timestamp[i]` seconds."""

    path: Path
    start: float


@dataclass(frozen=True)
class Layout:
    """`clips[camera][episode]`, for cameras stored as video; `spans` in the order of their frames."""

    root: Path
    info: Info
    tasks: tuple[str, ...]
    episodes: Episodes
    spans: tuple[Span, ...]
    clips: dict[str, tuple[Clip, ...]] = field(default_factory=dict)


def read_layout(root: Path) -> Layout:
    """Metadata only; no data file is opened. Raises DatasetError for whatever is missing, damaged or inconsistent."""
    info = read_info(root)
    return _read_v3(root, info) if info.codebase_version == "v3.0" else _read_v2(root, info)


# --- v3.0 ------------------------------------------------------------------------------------------------------------


def _read_v3(root: Path, info: Info) -> Layout:
    paths = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise DatasetError(f"data set {root}: no meta/episodes/chunk-*/file-*.parquet; the copy is incomplete")
    numbers = ["episode_index", "dataset_from_index", "dataset_to_index", "data/chunk_index", "data/file_index"]
    videos = {
        key: [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")] for key in info.videos
    }
    names = [*numbers, "tasks", *(name for part in videos.values() for name in part)]
    tables = []
    for path in paths:
        file = open_parquet(path)
        for name in names:
            pick(name, file.schema_arrow.names, "column", path)
        tables.append(file.read(columns=names))
    table = pa.concat_tables(tables).sort_by("episode_index")
    index, start, stop, chunk, file_index = (table[name].to_numpy() for name in numbers)
    _check_episodes(root, info, index, start, stop)
    spans = []
    for where in set(zip(chunk.tolist(), file_index.tolist(), strict=True)):
        rows = np.flatnonzero((chunk == where[0]) & (file_index == where[1]))
        path = _inside(root, info.data_path, chunk_index=where[0], file_index=where[1])
        spans.append(Span(path, int(start[rows].min()), int(stop[rows].max())))
    clips = {}
    for key, columns in videos.items():
        places = zip(*(table[name].to_pylist() for name in columns), strict=True)
        template = info.video_path or VIDEO_PATH
        clips[key] = tuple(
            Clip(_inside(root, template, video_key=key, chunk_index=c, file_index=f), float(begin))
            for c, f, begin in places
        )
    episodes = Episodes(start, stop, tuple(map(tuple, table["tasks"].to_pylist())))
    tasks = _read_tasks(root / "meta" / "tasks.parquet")
    return Layout(root, info, tasks, episodes, tuple(sorted(spans, key=lambda span: span.start)), clips)


def _read_tasks(path: Path) -> tuple[str, ...]:
    """Texts ordered by task_index. Converters leave the text column unnamed, which pandas stores as below."""
    table = open_parquet(path).read()
    text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise DatasetError(f"{path}: columns are {table.column_names}, expected task and task_index")
    return _ordered_tasks(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True), path)


def _ordered_tasks(pairs: Any, path: Path) -> tuple[str, ...]:
    ordered = sorted(pairs)
    if [index for index, _ in ordered] != list(range(len(ordered))):
        first = [index for index, _ in ordered][:10]
        raise DatasetError(f"{path}: task_index must count from 0 without gaps, got {first} ...")
    return tuple(task for _, task in ordered)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises DatasetError where the file is missing or cut short."""
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


# --- v2.1 ------------------------------------------------------------------------------------------------------------


def _read_v2(root: Path, info: Info) -> Layout:
    meta = root / "meta"
    rows = sorted(_json_lines(meta / "episodes.jsonl", "episode_index", "length"), key=lambda row: row["episode_index"])
    stop = np.cumsum([row["length"] for row in rows], dtype=np.int64)
    start = stop - np.array([row["length"] for row in rows], np.int64)
    _check_episodes(root, info, np.array([row["episode_index"] for row in rows]), start, stop)
    tasks = _ordered_tasks(
        ((row["task_index"], row["task"]) for row in _json_lines(meta / "tasks.jsonl", "task_index", "task")),
        meta / "tasks.jsonl",
    )

    def place(template: str, episode: int, **key: str) -> Path:
        return _inside(root, template, episode_chunk=episode // info.chunks_size, episode_index=episode, **key)

    spans = tuple(Span(place(info.data_path, e), int(start[e]), int(stop[e])) for e in range(len(rows)))
    if info.videos and not info.video_path:
        raise DatasetError(f"data set {root}: {info.videos[0]!r} is a video, but meta/info.json has no video_path")
    clips = {
        key: tuple(Clip(place(str(info.video_path), e, video_key=key), 0.0) for e in range(len(rows)))
        for key in info.videos
    }
    episodes = Episodes(start, stop, tuple(tuple(row.get("tasks", ())) for row in rows))
    return Layout(root, info, tasks, episodes, spans, clips)


def _json_lines(path: Path, *needed: str) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DatasetError(f"{path}: cannot be read ({e}); the copy of the data set is incomplete") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise DatasetError(f"{path}, line {number}: not JSON ({e})") from None
        if not isinstance(row, dict) or any(key not in row for key in needed):
            raise DatasetError(f"{path}, line {number}: expected an object with {', '.join(needed)}")
        yield row


# --- both ------------------------------------------------------------------------------------------------------------


def _check_episodes(root: Path, info: Info, index: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
    where = f"data set {root}: meta/episodes"
    if len(index) != info.total_episodes or not np.array_equal(index, np.arange(len(index))):
        raise DatasetError(f"{where}: {len(index)} episodes, expected 0 to {info.total_episodes - 1}, each once")
    if not len(index) or stop[-1] != info.total_frames:
        frames = int(stop[-1]) if len(stop) else 0
        raise DatasetError(f"{where}: {frames} frames in all, info.json says {info.total_frames}")
    due = np.concatenate([[0], stop[:-1]])
    for e in np.flatnonzero((start != due) | (stop <= start))[:1]:
        fault = "empty episode" if start[e] == stop[e] == due[e] else "metadata"
        message = f"{where}: episode {e} spans frames {start[e]} to {stop[e]}, expected a start at {due[e]}"
        raise DatasetError(message + (" and at least one frame" if fault == "empty episode" else ""), fault)


def _inside(root: Path, template: str, **values: int | str) -> Path:
    """A path below `root`. Raises DatasetError where the template knows other fields, or leads outside."""
    fields = "|".join(map(re.escape, values))
    if not re.fullmatch(rf"(?:[^{{}}]|\{{(?:{fields})(?::0?\d?d)?\}})+", template):
        raise DatasetError(
            f"data set {root}: path is {template!r}, expected something like {DATA_PATH!r} of {', '.join(values)}"
        )
    path = root / template.format(**values)
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:  # symbolic links into a cache are fine
        raise DatasetError(f"data set {root}: path {template!r} leaves the data set", "path outside")
    return path
