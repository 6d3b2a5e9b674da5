"""What the data files really hold, against what the tables say.

Of v2.1, which has a file per episode, the footers are enough; of v3.0 the column is read that says which episode a row
belongs to. Totals are counted again, and features that no file holds get a problem.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from insula.data.lerobot import rows
from insula.data.lerobot.crosscheck import Contradiction
from insula.data.lerobot.info import BOOKKEEPING, Feature, Info
from insula.data.lerobot.metadata import shown
from insula.data.lerobot.parquet import open_parquet, read_columns
from insula.data.lerobot.places import Episodes, Places, Spans
from insula.data.lerobot.tables import FILE_COLUMNS, Tables
from insula.errors import DatasetError, did_you_mean
from insula.files import lfs_size

ABSENT_LISTED = 1000
"""Up to this many data files that are not there are listed one by one, unless it is all of them."""
READERS = 8
"""Files opened at a time: a file system far away answers slowly, but many questions at once."""


@dataclass(frozen=True)
class Counted:
    """The tables in the order of the rows, with the lengths that the rows have. `columns`: those of the first data file
    that could be opened."""

    tables: Tables
    spans: Spans
    contradictions: tuple[Contradiction, ...]
    columns: tuple[str, ...] | None

    def episodes(self) -> Episodes:
        """Those with rows."""
        stop = np.cumsum(self.tables.length)
        return Episodes(self.tables.number, stop - self.tables.length, stop, self.tables.texts)


@dataclass(frozen=True)
class _File:
    """A data file: which episodes its rows name, one after the other, and how many rows in a row do. Of v2.1, and
    where rows name none, `number` is None."""

    path: Path
    columns: tuple[str, ...]
    rows: int
    number: Any = None
    length: Any = None


def count_rows(tables: Tables) -> Counted:
    """Files that cannot be opened are taken to hold what the table says; whoever reads them is told."""
    return _count_v3(tables) if tables.first is not None else _count_v2(tables)


# --- v2.1 ------------------------------------------------------------------------------------------------------------


def _count_v2(tables: Tables) -> Counted:
    tables, found = _in_their_chunks(tables)
    absent = [path for path in tables.data if not path.exists()]
    # A copy that broke off lacks thousands of files for one reason.
    if len(absent) > min(ABSENT_LISTED, len(tables.data) - 1):  # one cause, so one line
        message = f"{len(absent)} of {len(tables.data)} data files are not there, such as {absent[0]}; copy data/ again"
        raise DatasetError(f"data set {tables.root}: {message}", "file missing")

    paths = list(tables.data)
    files = _opened(paths, with_episodes=False)
    _refuse_pointers(tables.root, paths, files)
    # Rows are counted from footers alone: no column of a v2.1 file need be read for that.
    length = np.array([n if file is None else file.rows for n, file in zip(tables.length, files, strict=True)])
    found += [
        Contradiction(
            "row count",
            f"length is {tables.length[e]}, {tables.data[e].relative_to(tables.root)} holds {length[e]} rows: write "
            f'"length": {length[e]}',
            tables.file,
            int(tables.number[e]),
        )
        for e in np.flatnonzero((length != tables.length) & (length > 0)).tolist()
    ]
    found += _repeated(tables)
    for e in np.flatnonzero(length == 0).tolist():
        is_empty = files[e] is not None
        message = f"{tables.data[e].relative_to(tables.root)} holds no row" if is_empty else "length is 0"
        found.append(
            Contradiction(
                "empty episode", f"{message}; take the episode's line out", tables.file, int(tables.number[e])
            )
        )

    # Files that no table lists are never read, and never removed: somebody may want to list them.
    known = set(tables.data)
    for path in tables.data.on_disk().values():
        if path not in known:
            file = str(path.relative_to(tables.root))
            found.append(Contradiction("not listed", f"{tables.file} does not list it: it is left aside", file))

    kept = np.flatnonzero(length > 0)
    if not len(kept):
        raise DatasetError(f"data set {tables.root}: no episode has a row", "empty episode")

    # An episode without rows would have frames start .. start - 1.
    tables = replace(tables, length=length).taken(kept)
    stop = np.cumsum(tables.length)
    columns = next((file.columns for file in files if file is not None), None)

    return Counted(tables, Spans(tables.data, stop - tables.length, stop), tuple(found), columns)


def _in_their_chunks(tables: Tables) -> tuple[Tables, list[Contradiction]]:
    """Files that lie in another chunk's folder than chunks_size gives; so do their videos."""
    if all(path.exists() for path in tables.data):
        return tables, []

    # Where chunks_size is wrong, the number in the file's name still says which episode it is.
    chunk_of = {key[1]: key[0] for key in tables.data.on_disk()}
    told = np.asarray(tables.data.values["episode_chunk"])
    true = np.array([chunk_of.get(n, int(told[e])) for e, n in enumerate(tables.number.tolist())], np.int64)
    found = [
        Contradiction(
            "wrong place",
            f"is in chunk {told[e]} by chunks_size, its file is in chunk {true[e]}: correct chunks_size",
            "meta/info.json",
            int(tables.number[e]),
        )
        for e in np.flatnonzero(true != told).tolist()
    ]
    clips = {key: replace(clips, places=clips.places.given(episode_chunk=true)) for key, clips in tables.clips.items()}

    return replace(tables, data=tables.data.given(episode_chunk=true), clips=clips), found


def _repeated(tables: Tables) -> list[Contradiction]:
    return [
        Contradiction("episode repeated", "is listed more than once; leave one line of it", tables.file, number)
        for number in tables.repeated
    ]


# --- v3.0 ------------------------------------------------------------------------------------------------------------


def _count_v3(tables: Tables) -> Counted:
    assert tables.first is not None
    # The files there are, not those the table names: an episode may have moved to another file.
    there = tables.data.on_disk()
    keys = list(there)
    paths = list(there.values())
    files = _opened(paths, with_episodes=True)
    _refuse_pointers(tables.root, paths, files)
    columns = next((file.columns for file in files if file is not None), None)
    told = _as_told(tables, columns)
    known = [file for file in files if file is not None and file.number is not None]
    # With a file that cannot be read, no count is complete; its reader is told when it gets there.
    if len(known) < len(files):
        return told

    none = np.zeros(0, np.int64)
    of_file = np.concatenate([none, *(np.full(len(file.number), n) for n, file in enumerate(known))])
    number = np.concatenate([none, *(file.number for file in known)])
    length = np.concatenate([none, *(file.length for file in known)])
    # Rows and table are matched by episode number, so that stale pointers do not matter.
    order, found = _matched(tables, number, length)
    if order is None:
        # A file lost in copying explains every episode that has no rows.
        gone = set(tables.data) - set(there.values())
        if gone and not set(number.tolist()) - set(tables.number.tolist()):
            return told  # the missing file is what is wrong, and is said when it is read
        bad = _unmatched(tables, number, length, [there[keys[n]] for n in of_file.tolist()])
        return replace(told, contradictions=(*told.contradictions, bad))

    tables = tables.taken(order)
    stop = np.cumsum(length)
    start = stop - length
    fields = np.array(keys, np.int64)[of_file]
    found += _repeated(tables) + _table_faults(tables, fields, start, length)
    # Files without a row have no place in the order of frames.
    used = np.unique(of_file)
    first = [int(np.argmax(of_file == n)) for n in used.tolist()]
    last = [*(n - 1 for n in first[1:]), len(number) - 1]
    values: dict[str, np.ndarray | str] = {"chunk_index": fields[first, 0], "file_index": fields[first, 1]}
    spans = Spans(Places(tables.root, tables.data.template, values, len(first)), start[first], stop[last])

    return Counted(replace(tables, length=length), spans, tuple(found), columns)


def _as_told(tables: Tables, columns: tuple[str, ...] | None) -> Counted:
    """What the table says, where the rows cannot be asked."""
    assert tables.first is not None and tables.stop is not None
    bad = (tables.stop <= tables.first) | (tables.length != tables.stop - tables.first)
    found = [
        Contradiction(
            "row count",
            f"spans frames {tables.first[e]} to {tables.stop[e]}, with length {tables.length[e]}; restore the table",
            tables.file,
            int(tables.number[e]),
            fatal=True,
        )
        for e in np.flatnonzero(bad).tolist()[:1]
    ]
    # Merged tables list episodes in any order, the rows do not.
    tables = tables.taken(np.argsort(tables.first, kind="stable"))
    # A length of 2^60 would overflow the sum; it is refused as a contradiction above.
    length = np.clip(tables.length, 0, 2**40)
    stop = np.cumsum(length)
    start = stop - length
    # One span for each file: neighbors in the order of frames that name the same one.
    key = np.stack([np.asarray(tables.data.values[name]) for name in ("chunk_index", "file_index")], axis=1)
    begins = np.flatnonzero(np.r_[True, (key[1:] != key[:-1]).any(1)])
    ends = np.r_[begins[1:] - 1, len(key) - 1]
    spans = Spans(tables.data.taken(begins), start[begins], stop[ends])

    return Counted(replace(tables, length=length), spans, tuple(found), columns)


def _matched(tables: Tables, number: np.ndarray, length: np.ndarray) -> tuple[np.ndarray | None, list[Contradiction]]:
    """The entry of the table for each stretch of rows, or None."""
    assert tables.first is not None
    if len(number) != len(tables.number):
        return None, []
    # The usual case: both know the same numbers.
    if np.array_equal(np.sort(number), tables.number):
        return np.searchsorted(tables.number, number), []

    in_order = np.argsort(tables.first, kind="stable")
    if np.array_equal(length, tables.length[in_order]):  # as many rows each, only called otherwise
        message = "episode_index in the rows is not the table's, but the lengths agree one by one: they are matched so"
        return in_order, [Contradiction("numbering", message, tables.file)]

    return None, []


def _unmatched(tables: Tables, number: np.ndarray, length: np.ndarray, paths: list[Path]) -> Contradiction:
    """Which episode is in the rows alone, in the table alone, or in two places."""
    names = [str(path.relative_to(tables.root)) for path in paths]
    # From the likeliest cause to the rarest, since one message is all that is said.
    values, counts = np.unique(number, return_counts=True)
    if (counts > 1).any():
        twice = int(values[np.argmax(counts > 1)])
        places = [f"{names[n]} ({length[n]} rows)" for n in np.flatnonzero(number == twice).tolist()]
        message = f"its rows are in {len(places)} places: {' and '.join(places[:3])}; they must follow one another"
        return Contradiction("episode repeated", message, None, twice, fatal=True)

    if extra := sorted(set(values.tolist()) - set(tables.number.tolist())):
        n = int(np.argmax(number == extra[0]))
        begin = int(length[:n].sum())
        message = (
            f"its {length[n]} rows are in {names[n]}, but {tables.file} does not list it: add a row with length "
            f"{length[n]}, dataset_from_index {begin} and dataset_to_index {begin + length[n]}"
        )
        return Contradiction("not listed", message, tables.file, extra[0], fatal=True)

    missing = sorted(set(tables.number.tolist()) - set(values.tolist()))
    message = f"no data file holds a row of it ({len(missing)} such episodes); copy data/ again, or take its row out"

    return Contradiction("empty episode", message, tables.file, missing[0], fatal=True)


def _table_faults(tables: Tables, fields: np.ndarray, start: np.ndarray, length: np.ndarray) -> list[Contradiction]:
    """Each entry of the table that the rows contradict, with what it should be."""
    assert tables.first is not None and tables.stop is not None
    # What the rows make of each column of the table.
    true = {
        "length": (tables.length, length),
        "dataset_from_index": (tables.first, start),
        "dataset_to_index": (tables.stop, start + length),
        FILE_COLUMNS[0]: (np.asarray(tables.data.values["chunk_index"]), fields[:, 0]),
        FILE_COLUMNS[1]: (np.asarray(tables.data.values["file_index"]), fields[:, 1]),
    }
    # All columns of an entry in one finding: it is mended in one go.
    wrong = np.any([said != is_so for said, is_so in true.values()], axis=0)
    found = []
    for e in np.flatnonzero(wrong).tolist():
        said = [f"{name} is {a[e]}, the rows say {b[e]}" for name, (a, b) in true.items() if a[e] != b[e]]
        fault = "row count" if tables.length[e] != length[e] else "wrong place"
        found.append(Contradiction(fault, f"{'; '.join(said)}: write that", tables.file, int(tables.number[e])))

    return found


# --- files -----------------------------------------------------------------------------------------------------------


def _opened(paths: list[Path], with_episodes: bool) -> list[_File | None]:
    """None for a file that cannot be read."""
    # Threads pay only where files are many.
    if len(paths) < READERS:
        return [_look(path, with_episodes) for path in paths]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda path: _look(path, with_episodes), paths))


def _refuse_pointers(root: Path, paths: list[Path], files: list[_File | None]) -> None:
    """Of a clone without Git LFS every data file is a pointer: one cause, so one line."""
    # Asked only of files that could not be opened: a pointer is no parquet.
    unopened = [path for path, file in zip(paths, files, strict=True) if file is None]
    pointers = [path for path in unopened if path.is_file() and lfs_size(path) is not None]
    if len(pointers) > 1:
        raise DatasetError(
            f"data set {root}: {len(pointers)} of {len(paths)} data files are Git LFS pointers, not the files "
            f"themselves, such as {pointers[0]}; run git lfs install, then git lfs pull where it was cloned",
            "git lfs",
        )


def _look(path: Path, with_episodes: bool) -> _File | None:
    try:
        file = open_parquet(path)
        columns, count = tuple(file.schema_arrow.names), file.metadata.num_rows
        # v2.1 says which episode a file is by its name.
        if not with_episodes or "episode_index" not in columns:
            return _File(path, columns, count)
        table = read_columns(file, ["episode_index"], path)
        numbers = rows.numbers(table["episode_index"], Feature("int64", (1,)))
    except DatasetError:
        return None

    if isinstance(numbers, rows.BadRows):
        return None

    # Runs of one number, not its occurrences: an episode whose rows lie apart is two runs.
    begins = np.flatnonzero(np.r_[True, numbers[1:] != numbers[:-1]]) if count else np.zeros(0, np.int64)

    return _File(path, columns, count, numbers[begins], np.diff(np.r_[begins, count]))


# --- info ------------------------------------------------------------------------------------------------------------


def recounted(counted: Counted) -> tuple[Info, list[Contradiction]]:
    """Totals as they are, and each feature that cannot be read with its problem."""
    tables, info = counted.tables, counted.tables.info
    totals = {
        "total_episodes": len(tables.number),
        "total_frames": int(tables.length.sum()),
        "total_tasks": len(tables.tasks.text),
    }
    found = [
        Contradiction(
            "totals", f"{key} is {shown(getattr(info, key))}, there are {true}: write {true}", "meta/info.json"
        )
        for key, true in totals.items()
        if getattr(info, key) != true
    ]
    # Neither is an error yet: a column nobody asks for must not block the others.
    problems = tables.problems | _absent(counted)
    features = {
        name: replace(feature, problem=feature.problem or problems.get(name), is_damaged=name in tables.damaged)
        for name, feature in info.features.items()
    }
    true_info = replace(
        info,
        features=features,
        total_episodes=totals["total_episodes"],
        total_frames=totals["total_frames"],
        total_tasks=totals["total_tasks"],
    )

    return true_info, found


def _absent(counted: Counted) -> dict[str, str]:
    """Features that no file holds: an older name of a camera, a column that was never recorded."""
    absent = {
        key: f"no video of it is there, such as {clips.places[0].relative_to(counted.tables.root)}"
        for key, clips in counted.tables.clips.items()
        if not any(path.exists() for path in clips.places)
    }
    # No file could be opened, and whoever reads one is told why.
    if counted.columns is None:
        return absent

    for name, feature in counted.tables.info.features.items():
        if feature.dtype != "video" and name not in counted.columns and name not in BOOKKEEPING:
            others = set(counted.columns) - counted.tables.info.features.keys()
            absent[name] = f"the data files have no such column{did_you_mean(name, sorted(others))}"

    return absent
