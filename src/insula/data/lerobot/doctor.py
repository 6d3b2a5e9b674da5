"""`insula data doctor`: what is wrong with a LeRobot data set, each fault with its place and its remedy.

The reader stops at the first fault it meets. The doctor goes on, so that one look finds all of them. What is odd but
harmless is a note.

    remedies.py    the faults and notes there are           picture_check.py    pictures and videos
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from insula.data.lerobot import bookkeeping, crosscheck, rows
from insula.data.lerobot.info import BOOKKEEPING
from insula.data.lerobot.layout import Layout, read_layout
from insula.data.lerobot.parquet import open_parquet, read_columns
from insula.data.lerobot.picture_check import PictureCheck
from insula.data.lerobot.places import Span
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.lerobot.remedies import Finding, grouped
from insula.data.lerobot.sanity import sanity_notes
from insula.data.lerobot.timing import EXACT, NEAREST_WITHIN
from insula.data.subtasks import ANNOTATIONS, INDEX, column_subtasks
from insula.data.texts import says_nothing
from insula.errors import DatasetError, InsulaError
from insula.files import read_json


def examine(root: Path, every_frame: bool = True) -> list[Finding]:
    """All faults, then all notes, one for each kind and column. `every_frame` decodes each picture; else three of each
    episode."""
    root = Path(root)
    try:
        layout = read_layout(root)
    except DatasetError as error:
        return [Finding(error.fault, str(error))]

    return grouped(_all_findings(layout, every_frame))


def _all_findings(layout: Layout, every_frame: bool) -> Iterator[Finding]:
    readable = True
    for finding in _Examination(layout, every_frame).findings():
        readable = readable and finding.is_note
        yield finding

    # As training reads them. Of a data set that cannot be read its first fault would be told again.
    for name in (INDEX, ANNOTATIONS):
        if readable and name in layout.info.features:
            try:
                column_subtasks(LeRobotDataset(layout.root, cache_bytes=0), name)
            except DatasetError as error:
                yield Finding("subtasks", str(error), subject=name)


class _Examination:
    def __init__(self, layout: Layout, every_frame: bool):
        self.layout = layout
        self.pictures = PictureCheck(layout, every_frame)
        self.columns: dict[str, list[np.ndarray]] = {}
        self.fingerprints: dict[bytes, int] = {}

    def findings(self) -> Iterator[Finding]:
        for found in self.layout.contradictions:
            yield Finding(found.fault, found.message, found.file, found.episode, found.frame)
        # What the metadata says comes first: it explains much of what follows.
        yield from self._features()
        for span in self.layout.spans:
            yield from self._data_file(span)
        for key in self.layout.clips:
            yield from self.pictures.camera(key)
        yield from sanity_notes(self.layout.root)
        yield from self._statistics()
        if len(self.layout.episodes) == 1:
            yield Finding("one episode", "has a single episode")

    def _features(self) -> Iterator[Finding]:
        info = "meta/info.json"
        for name, feature in self.layout.info.features.items():
            if feature.problem is not None:
                fault = "null" if feature.is_damaged else "cannot be read"
                yield Finding(fault, f"{name!r}: {feature.problem}", info)
            if feature.names_problem is not None:
                yield Finding("names", f"{name!r}: {feature.names_problem}", info)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _data_file(self, span: Span) -> Iterator[Finding]:
        file = str(span.path.relative_to(self.layout.root))
        try:
            opened = open_parquet(span.path)
        except DatasetError as error:
            yield Finding(error.fault, str(error), file)
            return

        # With other rows than promised, no place in the file could be named rightly.
        if opened.metadata.num_rows != span.stop - span.start:
            promised = span.stop - span.start
            yield Finding(
                "row count", f"holds {opened.metadata.num_rows} rows, the episode table promises {promised}", file
            )
            return

        known = {}
        for name, feature in self.layout.info.features.items():
            if feature.dtype == "video" or feature.problem is not None:
                continue
            if name not in opened.schema_arrow.names:
                # Bookkeeping that is missing is counted.
                if name not in BOOKKEEPING:
                    message = f"no column {name!r}, which meta/info.json lists"
                    yield Finding("column missing", message, file, subject=name)
                continue

            if feature.dtype == "image":
                yield from self.pictures.images(opened, name, span, file)
                continue

            try:
                column = read_columns(opened, [name], span.path)[name]
            except DatasetError as error:
                yield Finding(error.fault, str(error), file, subject=name)
                continue

            values = rows.numbers(column, feature) if feature.is_numeric else rows.texts(column)
            if isinstance(values, rows.BadRows):
                yield self._bad_rows(values, name, span, file)
            elif isinstance(values, np.ndarray):
                known[name] = values
            else:
                yield from self._texts(values, name, span, file)

        yield from self._bookkeeping(known, span, file)
        for name, values in known.items():
            yield from self._finite(name, values, span, file)
            if name not in BOOKKEEPING:
                self.columns.setdefault(name, []).append(values)

        yield from self._duplicates(known, span, file)

    def _bookkeeping(self, known: dict[str, np.ndarray], span: Span, file: str) -> Iterator[Finding]:
        layout = self.layout
        found = list(crosscheck.numbering(layout.episodes, span.start, known))
        if "task_index" in known:
            found += crosscheck.tasks(layout.task_table, layout.episodes, span.start, known["task_index"])
            # Numbers without a text have a finding of their own.
            positions = layout.task_table.positions(known["task_index"]).tolist()
            yield from self._texts([layout.tasks[at] if at >= 0 else "?" for at in positions], "task", span, file)

        for one in found:
            yield Finding(one.fault, one.message, file, one.episode, one.frame)
        if "timestamp" in known:
            yield from self._timestamps(known["timestamp"], span, file)

    def _timestamps(self, timestamps: np.ndarray, span: Span, file: str) -> Iterator[Finding]:
        """Pictures need no clock, unless it says that fps is wrong; videos are found by theirs."""
        fps = self.layout.info.fps
        frames = np.arange(span.start, span.stop)
        episode = self.layout.episodes.of_frame(frames)
        step = frames - self.layout.episodes.start[episode]
        off = bookkeeping.off_the_grid(timestamps, step, fps)
        if not len(wrong := np.flatnonzero(off > EXACT)):
            return

        row = int(wrong[0])
        place = self.layout.episodes.locate(span.start + row)
        count = f"({len(wrong)} such rows)"
        message = f"timestamp is {timestamps[row]:.4f} s, at {fps} fps expected {step[row] / fps:.4f} s {count}"
        # Beyond the reach of the nearest frame, a row finds no picture.
        if self.layout.clips:
            is_fault = bool((off > NEAREST_WITHIN / fps).any())
        else:
            is_fault = bookkeeping.other_rate(timestamps, episode, fps) is not None

        yield Finding("timestamps" if is_fault else "clock", message, file, *place)

    def _bad_rows(self, bad: rows.BadRows, name: str, span: Span, file: str) -> Finding:
        episode, frame = (None, None) if bad.row is None else self.layout.episodes.locate(span.start + bad.row)
        return Finding(bad.fault, f"{name!r} {bad.message}", file, episode, frame, subject=name)

    def _texts(self, texts: list[str | None], name: str, span: Span, file: str) -> Iterator[Finding]:
        """A prompt without an instruction teaches that the task does not matter."""
        empty = [row for row, text in enumerate(texts) if text is None or says_nothing(text)]
        if empty:
            message = f"{name!r} is empty or null in {len(empty)} of {len(texts)} frames"
            yield Finding("no text", message, file, *self.layout.episodes.locate(span.start + empty[0]), subject=name)

    def _finite(self, name: str, values: np.ndarray, span: Span, file: str) -> Iterator[Finding]:
        if values.dtype.kind != "f" or name == "timestamp":
            return

        bad = ~np.isfinite(values.reshape(len(values), -1))
        if bad.any():
            row, dimension = np.argwhere(bad)[0].tolist()
            place = self.layout.episodes.locate(span.start + row)
            message = f"{name!r}, {self._label(name, dimension)}: {bad.sum()} values are NaN or infinite"
            yield Finding("not finite", message, file, *place, subject=name)

    def _label(self, name: str, dimension: int) -> str | int:
        names = self.layout.info.features[name].names
        return names[dimension] if names else dimension

    def _duplicates(self, known: dict[str, np.ndarray], span: Span, file: str) -> Iterator[Finding]:
        numbers = [values for name, values in known.items() if name not in BOOKKEEPING]
        if not numbers:
            return

        episodes = self.layout.episodes
        for episode in episodes.between(span.start, span.stop):
            within = slice(int(episodes.start[episode]) - span.start, int(episodes.stop[episode]) - span.start)
            # Only a digest is kept: the numbers of all episodes would be a second copy of the data set.
            parts = [np.ascontiguousarray(values[within]).tobytes() for values in numbers]
            fingerprint = hashlib.sha256(b"".join(parts)).digest()
            twin = self.fingerprints.setdefault(fingerprint, episode)
            if twin != episode:
                number, twin = int(episodes.number[episode]), int(episodes.number[twin])
                yield Finding("duplicate episode", f"has the same numbers as episode {twin}", file, number)

    # --- the whole ---------------------------------------------------------------------------------------------------

    def _whole(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}

    def _statistics(self) -> Iterator[Finding]:
        path = self.layout.root / "meta" / "stats.json"
        if not path.exists():
            return

        file = str(path.relative_to(self.layout.root))
        try:
            stored = read_json(path)
        except InsulaError as error:
            yield Finding("statistics", str(error), file)
            return

        for name, values in self._whole().items():
            flat = values.reshape(len(values), -1).astype(np.float64)
            # Whether NaN were counted there is the other tool's affair.
            if not np.isfinite(flat).all():
                continue
            if name not in stored:
                yield Finding("no statistics", f"there is no entry for {name!r}", file, subject=name)
            elif difference := _differs(stored[name], flat):
                yield Finding("statistics", f"{name!r}: {difference}", file, subject=name)


def _differs(stored: Any, flat: np.ndarray) -> str | None:
    """The first figure of a column that the rows contradict."""
    true = {"min": flat.min(0), "max": flat.max(0), "mean": flat.mean(0), "std": flat.std(0)}
    # Tools sum in float32 and in another order.
    slack = 1e-3 * float(np.ptp(flat) + 1e-9)
    for which, value in true.items():
        try:
            got = np.ravel(np.asarray(stored[which], np.float64))
        except (KeyError, TypeError, ValueError):
            return f"{which} is missing, or no list of numbers"
        if got.shape != value.shape or not np.allclose(got, value, 1e-3, slack):
            return f"{which} is {_few(got)}, the rows give {_few(value)}"

    return None


def _few(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:20])
    return f"[{shown}{', ...' if len(values) > 20 else ''}]"
