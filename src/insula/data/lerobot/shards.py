"""The data files of a data set, opened when asked for: columns as arrays and texts, pictures as their bytes."""

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.data.lerobot import crosscheck, rows
from insula.data.lerobot.info import BOOKKEEPING, Feature, pick
from insula.data.lerobot.parquet import open_parquet, plain, read_columns
from insula.data.lerobot.places import Episodes, Spans
from insula.errors import DatasetError

ENCODED_BYTES = 2**28  # PNG bytes of recently read row groups, kept so that neighbors need no second read
OPEN_TABLES = 64  # v2.1 has a file per episode
ANNOTATION = ("style", "content", "timestamp")
"""What is read of each entry of a column of annotations."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Shard:
    """One data file: the frames start .. stop - 1, and the first frame of each of its row groups."""

    path: Path
    start: int
    stop: int
    file: pq.ParquetFile
    groups: np.ndarray


class Shards:
    """The files by their numbers. Safe to use from several threads.

    Raises DatasetError where a file is missing, damaged, or holds other rows than `spans` and `episodes` promise:
    naming file, episode and frame.
    """

    def __init__(self, spans: Spans, episodes: Episodes):
        self._spans = spans
        self._episodes = episodes
        self._shards: OrderedDict[int, _Shard] = OrderedDict()
        self._in_order: set[int] = set()
        self._encoded: OrderedDict[tuple[str, int, int], pa.Array] = OrderedDict()
        self._encoded_bytes = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._spans)

    def frames_of(self, number: int) -> tuple[int, int]:
        """(first frame, one past the last) of a file."""
        span = self._spans[number]
        return span.start, span.stop

    def all_have(self, name: str) -> bool:
        """Whether every file has that column."""
        with self._lock:
            return all(name in self._shard(number).file.schema_arrow.names for number in range(len(self)))

    def numbers(self, name: str, feature: Feature, number: int) -> np.ndarray:
        """A column of one file, [rows] or [rows, *shape], in the feature's dtype."""
        with self._lock:
            shard = self._shard(number)
            self._check_order(number, shard)

        return self._checked(rows.numbers(_read(shard, name), feature), name, shard)

    def texts(self, name: str, number: int) -> list[str | None]:
        """A column of texts of one file."""
        with self._lock:
            shard = self._shard(number)
            return self._checked(rows.texts(_read(shard, name)), name, shard)

    def annotations(self, name: str) -> list[list[dict[str, Any]]]:
        """The entries of each episode, which every frame of it repeats."""
        found: dict[int, list[dict[str, Any]]] = {}
        for number in range(len(self)):
            with self._lock:
                shard = self._shard(number)
                self._check_order(number, shard)
                # A row group at a time, of which one row for each episode is kept.
                ends = [*shard.groups.tolist()[1:], shard.stop]
                for group, (start, stop) in enumerate(zip(shard.groups.tolist(), ends, strict=True)):
                    if start < stop:
                        told = self._checked(_annotations(shard, name, group), name, shard)
                        self._add_annotations(found, told, start, name)

        return [found[episode] for episode in range(len(self._episodes))]

    def _add_annotations(self, found: dict[int, list[dict[str, Any]]], told: pa.Array, start: int, name: str) -> None:
        """Those of the rows from frame `start` on. Raises DatasetError where an episode has several sets of them."""
        episodes = self._episodes
        inside = episodes.between(start, start + len(told))
        firsts = [max(int(episodes.start[episode]), start) - start for episode in inside]
        for episode, row in zip(inside, firsts, strict=True):
            # Its first rows may be in the row group before, or in another file.
            entries = told[row].as_py() or []
            if not all(entry["timestamp"] is not None and math.isfinite(entry["timestamp"]) for entry in entries):
                raise DatasetError(f"{self._at(start + row, name)}: an entry has no time; expected seconds")
            if found.setdefault(episode, entries) != entries:
                raise self._several(start + row, name)

        # All rows with the first of their episode, in Arrow: there may be a million.
        counts = np.diff([*firsts, len(told)])
        if not told.equals(same := told.take(pa.array(np.repeat(firsts, counts)))):
            raise self._several(start + next(i for i in range(len(told)) if told[i] != same[i]), name)

    def _several(self, frame: int, name: str) -> DatasetError:
        said = "holds other annotations than the frames before it; all frames of an episode hold the same ones"
        return DatasetError(f"{self._at(frame, name)}: {said}")

    def _at(self, frame: int, name: str) -> str:
        path = self._spans[int(np.searchsorted(self._spans.stop, frame, side="right"))].path
        episode, step = self._episodes.locate(frame)
        return f"{path}: {name!r}, episode {episode}, frame {step}"

    def encoded_image(self, name: str, frame: int) -> tuple[bytes | None, Path]:
        """The stored bytes of one frame, and the file; its row group is read unless it was read lately."""
        with self._lock:
            number = int(np.searchsorted(self._spans.stop, frame, side="right"))
            shard = self._shard(number)
            group = int(np.searchsorted(shard.groups, frame, side="right")) - 1
            column = self._encoded.get((name, number, group))

            if column is not None:
                self._encoded.move_to_end((name, number, group))
            else:
                # A whole row group: neighbors are asked for next, and parquet cannot read a single row.
                files = self._checked(rows.image_files(_read(shard, name, group)), name, shard)
                column = plain(files)
                self._encoded[name, number, group] = column
                self._encoded_bytes += column.nbytes
                # One group always stays, however large: it is the one that was asked for.
                while self._encoded_bytes > ENCODED_BYTES and len(self._encoded) > 1:
                    self._encoded_bytes -= self._encoded.popitem(last=False)[1].nbytes

        return column[frame - int(shard.groups[group])].as_py(), shard.path

    def _shard(self, number: int) -> _Shard:
        """Open a data file once; its rows must be those the episode table promises."""
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]

        span = self._spans[number]
        file = open_parquet(span.path)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if sum(sizes) != span.stop - span.start:
            raise DatasetError(
                f"{span.path}: holds {sum(sizes)} rows, the episode table promises {span.stop - span.start}; "
                "the file or meta/episodes is from another state of the data set"
            )

        self._shards[number] = _Shard(span.path, span.start, span.stop, file, span.start + np.cumsum([0, *sizes[:-1]]))
        if len(self._shards) > OPEN_TABLES:
            self._shards.popitem(last=False)

        return self._shards[number]

    def _check_order(self, number: int, shard: _Shard) -> None:
        """Once for each file: its rows follow one another. A chunk of actions is read as consecutive rows."""
        if number in self._in_order:
            return

        # Whichever of them there are: recorders leave some out.
        names = [name for name in crosscheck.NUMBERING if name in shard.file.schema_arrow.names]
        table = read_columns(shard.file, names, shard.path)
        columns = {name: self._checked(rows.numbers(table[name], BOOKKEEPING[name]), name, shard) for name in names}

        for found in crosscheck.numbering(self._episodes, shard.start, columns):
            raise DatasetError(f"{shard.path}: {found}", found.fault)
        self._in_order.add(number)

    def _checked(self, values: _T | rows.BadRows, name: str, shard: _Shard) -> _T:
        """`values`, unless they are what is wrong with a column."""
        if not isinstance(values, rows.BadRows):
            return values

        where = f"{shard.path}: {name!r}" if values.row is None else f"{self._at(shard.start + values.row, name)}:"
        raise rows.refuse(values, where)


def _annotations(shard: _Shard, name: str, group: int) -> pa.Array | rows.BadRows:
    """A row group's column of annotations, of their parts those that are needed."""
    pick(name, shard.file.schema_arrow.names, "column", shard.path)
    kind = shard.file.schema_arrow.field(name).type
    is_entries = rows.leaf(kind) != kind and pa.types.is_struct(rows.leaf(kind))
    parts = [field.name for field in rows.leaf(kind)] if is_entries else []
    if missing := [part for part in ANNOTATION if part not in parts]:
        return rows.BadRows("wrong dtype", f"is {kind}, expected lists of {{{', '.join(ANNOTATION)}}}: no {missing[0]}")

    # By their paths: of the other parts, a call of a tool has a type that not every reader knows.
    columns = shard.file.metadata.row_group(group)
    paths = [columns.column(i).path_in_schema for i in range(columns.num_columns)]
    inside = [path.removeprefix(f"{name}.") for path in paths if path.startswith(f"{name}.")]
    # Such as "list.element.style": what is deeper belongs to another part.
    wanted = [f"{name}.{path}" for path in inside if path.count(".") == 2 and path.rpartition(".")[2] in ANNOTATION]

    return plain(read_columns(shard.file, wanted, shard.path, group)[name])


def _read(shard: _Shard, name: str, group: int | None = None) -> pa.ChunkedArray:
    """One column; of pictures, their bytes alone. Raises DatasetError where it is missing, damaged or too large."""
    pick(name, shard.file.schema_arrow.names, "column", shard.path)
    wanted = rows.picture_column(name, shard.file.schema_arrow.field(name).type)
    return read_columns(shard.file, [wanted], shard.path, group)[name]
