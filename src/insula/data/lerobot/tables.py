"""What the metadata says about episodes and tasks, for either version of the format, before anybody looks at the rows.

v2.1    a data file and a video per episode and camera, metadata as JSON lines
v3.0    many episodes in a file, the metadata a table that says where each one begins
"""

from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from insula.data.lerobot import rows
from insula.data.lerobot.info import DATA_PATH, Info
from insula.data.lerobot.metadata import (
    MANY,
    read_lines,
    shown,
    task_text,
    task_texts,
    visible,
    whole_number,
)
from insula.data.lerobot.parquet import plain, read_table, whole_numbers
from insula.data.lerobot.places import Clips, Places
from insula.errors import DatasetError

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
OLD_DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
SUBTASKS = Path("meta") / "subtasks.parquet"
"""Texts that the column subtask_index points into."""
FILE_COLUMNS = ("data/chunk_index", "data/file_index")
_CLIP_COLUMNS = ("chunk_index", "file_index", "from_timestamp")


@dataclass(frozen=True)
class Tasks:
    """A table of tasks, or of subtasks: text[i] has the number `number[i]` in the rows; numbers rise, with gaps or
    not."""

    number: np.ndarray
    text: tuple[str, ...]

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Which text each number of the rows means; -1 for a number that has none."""
        at = np.searchsorted(self.number, numbers)
        at[at == len(self.number)] = 0
        return np.where(self.number[at] == numbers, at, -1)


@dataclass(frozen=True)
class Tables:
    """One entry for each episode. `first` (v3.0 only): the frame it is said to begin at. `file`: its name in messages.

    `repeated`: numbers of episodes that the table had more than once, the last entry was taken. `problems`: why a
    camera cannot be read; of those in `damaged` some places are there, and others are spoiled.
    """

    root: Path
    info: Info
    tasks: Tasks
    file: str
    number: np.ndarray
    length: np.ndarray
    texts: tuple[tuple[str, ...], ...]
    data: Places
    clips: dict[str, Clips]
    problems: dict[str, str]
    damaged: frozenset[str] = frozenset()
    repeated: tuple[int, ...] = ()
    first: np.ndarray | None = None
    stop: np.ndarray | None = None

    def taken(self, episodes: np.ndarray) -> "Tables":
        """Those of these episodes, in their order."""
        return replace(
            self,
            number=self.number[episodes],
            length=self.length[episodes],
            texts=tuple(self.texts[e] for e in episodes.tolist()),
            data=self.data.taken(episodes),
            clips={key: clips.taken(episodes) for key, clips in self.clips.items()},
            first=None if self.first is None else self.first[episodes],
            stop=None if self.stop is None else self.stop[episodes],
        )


def read_tables(root: Path, info: Info) -> Tables:
    """Raises DatasetError for a table that is missing, damaged or of the other version, naming file, row and column."""
    _refuse_other_version(root, info)
    return _read_v3(root, info) if info.is_v3 else _read_v2(root, info)


def _refuse_other_version(root: Path, info: Info) -> None:
    """Where the tables of the version are not there, but those of the other one are."""
    meta, is_new = root / "meta", info.is_v3
    # Asked of the folder, not of what info.json says: that is what may be wrong.
    old_there, new_there = (meta / "episodes.jsonl").exists(), (meta / "episodes").is_dir()
    if (new_there if is_new else old_there) or not (old_there if is_new else new_there):
        return

    there, version = ("episodes.jsonl", "v2.1") if is_new else ("episodes/", "v3.0")
    fixes = [f'"codebase_version": "{version}"']
    if ("episode_index" in info.data_path) != is_new:
        fixes.append(f'"data_path": "{OLD_DATA_PATH if is_new else DATA_PATH}"')
    raise DatasetError(
        f"{meta / 'info.json'}: codebase_version is {info.codebase_version!r}, but meta/ holds {there}, the layout of "
        f"{version}; write {' and '.join(fixes)}",
        "other version",
    )


# --- v3.0 ------------------------------------------------------------------------------------------------------------


def _read_v3(root: Path, info: Info) -> Tables:
    paths = [
        path for folder in visible(root / "meta" / "episodes") for path in visible(folder) if path.suffix == ".parquet"
    ]
    if not paths:
        raise DatasetError(f"data set {root}: no meta/episodes/chunk-*/file-*.parquet; the copy is incomplete")

    needed = ["episode_index", "dataset_from_index", "dataset_to_index", *FILE_COLUMNS]
    videos = {key: [f"videos/{key}/{part}" for part in _CLIP_COLUMNS] for key in info.videos}
    wanted = [name for names in videos.values() for name in names]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in [*needed, "length"]}
    ends = {key: f"videos/{key}/to_timestamp" for key in videos}
    places: dict[str, list[Any]] = {name: [] for name in [*wanted, *ends.values()]}
    problems: dict[str, str] = {}
    damaged: set[str] = set()
    texts: list[tuple[str, ...]] = []

    for path in paths:
        table = read_table(path, needed, ["length", "tasks", *wanted, *ends.values()])
        for name in needed:
            columns[name].append(whole_numbers(table, name, path))
        told = columns["dataset_to_index"][-1] - columns["dataset_from_index"][-1]
        columns["length"].append(whole_numbers(table, "length", path) if "length" in table.column_names else told)
        # A camera whose places are spoiled must not keep the others, and the numbers, from being read.
        for key, names in videos.items():
            try:
                for name in names:
                    places[name].append(_place(table, name, path))
            except DatasetError as error:
                problems.setdefault(key, str(error))
                # Columns that are not there at all belong to a camera that was never recorded.
                damaged |= {key} if error.fault == "null" else set()
            places[ends[key]].append(_seconds(table, ends[key]))

        texts += _listed(table, path)

    data = {name: np.concatenate(parts) for name, parts in columns.items()}
    count = len(data["episode_index"])
    fields: dict[str, np.ndarray | str] = {field: data[f"data/{field}"] for field in ("chunk_index", "file_index")}
    clips = {
        key: _v3_clips(root, info, key, [np.concatenate(places[name]) for name in [*names, ends[key]]])
        for key, names in videos.items()
        if key not in problems
    }
    tables = Tables(
        root=root,
        info=info,
        tasks=_v3_tasks(root / "meta" / "tasks.parquet"),
        file=str(paths[0].relative_to(root)) if len(paths) == 1 else "meta/episodes",
        number=data["episode_index"],
        length=data["length"],
        texts=tuple(texts),
        data=Places(root, info.data_path, fields, count),
        clips=clips,
        problems=problems,
        damaged=frozenset(damaged),
        first=data["dataset_from_index"],
        stop=data["dataset_to_index"],
    )
    return _each_once(tables)


def _v3_clips(root: Path, info: Info, key: str, columns: list[np.ndarray]) -> Clips:
    """`columns`: chunk, file, start and end of each episode's clip."""
    chunk, file, start, stop = columns
    at: dict[str, np.ndarray | str] = {"video_key": key}
    at |= {"chunk_index": chunk.astype(np.int64), "file_index": file.astype(np.int64)}
    return Clips(Places(root, info.video_path or VIDEO_PATH, at, len(start)), start, stop)


def _place(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """float64 of a column that says where a video is. Raises DatasetError naming row and column."""
    if name not in table.column_names:
        raise DatasetError(f"{path}: no column {name!r}")
    if not name.endswith("from_timestamp"):
        return whole_numbers(table, name, path).astype(np.float64)

    seconds = _seconds(table, name)
    if len(bad := np.flatnonzero(~np.isfinite(seconds))):
        value = table[name][int(bad[0])].as_py()
        message = f"{path}, row {bad[0]}: {name!r} is {shown(value)}, expected seconds ({len(bad)} such rows)"
        raise DatasetError(message, "null")

    return seconds


def _seconds(table: pa.Table, name: str) -> np.ndarray:
    """float64 of a column of times; NaN where there is none."""
    none = np.full(len(table), np.nan)
    if name not in table.column_names:
        return none

    column = plain(table[name])
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return none

    return np.array([np.nan if value is None else value for value in column.to_pylist()], np.float64)


def _listed(table: pa.Table, path: Path) -> list[tuple[str, ...]]:
    """The tasks of each episode, where the table has them; equal ones are kept once."""
    if "tasks" not in table.column_names:
        return [()] * len(table)

    # A million episodes share a handful of texts.
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    found = []
    for row, value in enumerate(plain(table["tasks"]).to_pylist()):
        texts = task_texts(value, f"{path}, row {row}")
        found.append(known.setdefault(texts, texts))

    return found


def _v3_tasks(path: Path) -> Tasks:
    """Converters leave the text column unnamed, which pandas stores as below."""
    if not path.exists() and path.with_name("tasks.jsonl").exists():
        raise DatasetError(
            f"{path}: missing, but meta/ holds tasks.jsonl, which is of v2.1: the data set was converted in part; "
            "restore it, and convert it again",
            "other version",
        )

    return read_texts(path, "task")


def read_texts(path: Path, what: str) -> Tasks:
    """A table of texts `what` ("task", "subtask") and their numbers, `what`_index, as pandas writes it. Raises
    DatasetError naming what is missing, null or twofold."""
    index = f"{what}_index"
    table = read_table(path, [index], [what, "__index_level_0__"])
    # pandas writes the texts as an index, which may have no name.
    text = next((name for name in (what, "__index_level_0__") if name in table.column_names), None)
    if text is None:
        raise DatasetError(f"{path}: columns are {table.column_names}, expected {what} and {index}")

    texts = rows.texts(table[text])
    if isinstance(texts, rows.BadRows):
        raise DatasetError(f"{path}: {text!r} {texts.message}")
    if missing := [row for row, value in enumerate(texts) if value is None]:
        more = f" ({len(missing)} such rows)" if len(missing) > 1 else ""
        raise DatasetError(f"{path}, row {missing[0]}: {text!r} is null, expected a text{more}")

    numbers = whole_numbers(table, index, path)
    known = [task_text(value, f"{path}, row {n}", what) for n, value in enumerate(texts)]

    return _by_number(numbers.tolist(), known, path, what)


# --- v2.1 ------------------------------------------------------------------------------------------------------------


def _read_v2(root: Path, info: Info) -> Tables:
    meta = root / "meta"
    # Machine integers: lists of Python's would take ten times the memory.
    numbers, lengths, texts = array("q"), array("q"), list[tuple[str, ...]]()
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    for where, row in read_lines(meta / "episodes.jsonl", "episode_index", "length"):
        numbers.append(whole_number(row["episode_index"], "episode_index", where))
        lengths.append(whole_number(row["length"], "length", where))
        listed = task_texts(row.get("tasks"), where)
        texts.append(known.setdefault(listed, listed))
        if len(texts) > MANY:
            raise DatasetError(f"{where}: more than {MANY:,} episodes, which is more than is read; restore the file")

    tasks = list(read_lines(meta / "tasks.jsonl", "task_index", "task"))

    # Every row would be read once for each episode.
    if "{episode_index" not in info.data_path:
        raise DatasetError(
            f"{meta / 'info.json'}: data_path is {shown(info.data_path)}, where every episode would be the same file; "
            f"expected something like {OLD_DATA_PATH!r}"
        )

    # LeRobot puts chunks_size episodes into each folder.
    number = np.array(numbers, np.int64)
    fields: dict[str, np.ndarray | str] = {"episode_chunk": number // info.chunks_size, "episode_index": number}
    problems: dict[str, str] = {}
    clips: dict[str, Clips] = {}
    for key in info.videos:
        if info.video_path is None:
            problems[key] = "is a video, but meta/info.json has no video_path"
            continue
        places = Places(root, info.video_path, {**fields, "video_key": key}, len(number))
        if "{episode_index" not in info.video_path:
            problems[key] = f"video_path is {shown(info.video_path)}, where all episodes would show the same file"
            continue
        clips[key] = Clips(places, np.zeros(len(number)), np.full(len(number), np.nan))

    tables = Tables(
        root=root,
        info=info,
        tasks=_by_number(
            [whole_number(row["task_index"], "task_index", where) for where, row in tasks],
            [task_text(row["task"], where) for where, row in tasks],
            meta / "tasks.jsonl",
        ),
        file="meta/episodes.jsonl",
        number=number,
        length=np.array(lengths, np.int64),
        texts=tuple(texts),
        data=Places(root, info.data_path, fields, len(number)),
        clips=clips,
        problems=problems,
    )

    return _each_once(tables)


# --- both ------------------------------------------------------------------------------------------------------------


def _by_number(numbers: list[int], texts: list[str], path: Path, what: str = "task") -> Tasks:
    """Raises DatasetError where a number has two texts, or there is no text at all."""
    found: dict[int, str] = {}
    for number, text in zip(numbers, texts, strict=True):
        # The same text twice is what merging leaves, and fine.
        if found.setdefault(number, text) != text:
            raise DatasetError(
                f"{path}: {what}_index {number} is both {shown(found[number])} and {shown(text)}; give one another "
                "number"
            )

    if not found:
        raise DatasetError(f"{path}: no {what} at all; expected {what}_index and {what} of each")

    order = sorted(found)

    return Tasks(np.array(order, np.int64), tuple(found[number] for number in order))


def _each_once(tables: Tables) -> Tables:
    """Episodes in the order of their numbers; of a number that is there twice, the later entry."""
    if not len(tables.number):
        raise DatasetError(f"data set {tables.root}: {tables.file} has no episode; the copy is incomplete")

    # The later entry: an episode recorded again is appended.
    last = {number: row for row, number in enumerate(tables.number.tolist())}
    order = np.array([last[number] for number in sorted(last)], np.int64)
    if len(order) == len(tables.number):
        return tables.taken(order)

    numbers, counts = np.unique(tables.number, return_counts=True)
    repeated = tuple(numbers[counts > 1].tolist())

    return replace(tables.taken(order), repeated=repeated)
