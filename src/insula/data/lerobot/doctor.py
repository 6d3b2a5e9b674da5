"""`insula data doctor`: what is wrong with a LeRobot data set, each fault with its place and its remedy.

The reader stops at the first fault it meets. The doctor goes on, so that one look finds all of them.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from insula.data.images import decode_image
from insula.data.lerobot import crosscheck, rows
from insula.data.lerobot.info import BOOKKEEPING, Feature
from insula.data.lerobot.layout import Layout, read_layout
from insula.data.lerobot.metadata import FAULTS as METADATA
from insula.data.lerobot.parquet import open_parquet, read_columns
from insula.data.lerobot.places import Span
from insula.data.lerobot.sanity import NOTES, sanity_notes
from insula.data.lerobot.video import TOLERANCE, VideoReader
from insula.errors import DatasetError

REMEDIES = (
    METADATA
    | NOTES
    | {
        "metadata": "restore meta/ from the data set's source, or record again",
        "path outside": "correct data_path and video_path in meta/info.json: they must stay below the data set",
        "empty episode": "take its entry out of meta/, or copy its data file again",
        "cannot be read": "nothing needs to be done unless a mapping names it; insula data convert leaves it out",
        "names": "correct the names in meta/info.json, or leave them: dimensions are then called by number",
        "totals": "write the number above into meta/info.json",
        "episode repeated": "leave one entry of it in meta/",
        "not listed": "add its entry to meta/, or leave it: it is not read",
        "wrong place": "write the numbers above into the episode table",
        "numbering": "nothing needs to be done; insula data convert renumbers",
        "tasks differ": "decide which side is right, and have the other one written anew",
        "null": "remove the episode, or fill the values in",
        "file missing": "copy the file again",
        "file damaged": "copy the file again, or remove its episodes",
        "column missing": "remove the feature from meta/info.json, or restore the column",
        "wrong dtype": "correct the feature in meta/info.json, or convert the column",
        "wrong shape": "correct the feature's shape in meta/info.json, or record again",
        "row count": "write the length above into the episode table, or restore file and table from one copy",
        "index gap": "rows are missing or out of order: restore the file, or renumber its rows",
        "task index": "add the task to the task table, or correct task_index",
        "timestamps": "correct fps in meta/info.json, or write timestamps as frame_index / fps",
        "not finite": "remove the episode, or mend the sensor's values",
        "unreadable image": "remove the episode, or restore the image",
        "video damaged": "copy the video again, or remove its episodes",
        "video too short": "the video was cut or has another frame rate: encode the episode again",
        "statistics": "compute them anew: insula data convert writes true ones",
        "duplicate episode": "remove one of the two, or it counts double in training",
    }
)
"""Every fault the doctor knows."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault. `file` is relative to the data set; `episode` and `frame` (within it) where they are known."""

    fault: str
    message: str
    file: str | None = None
    episode: int | None = None
    frame: int | None = None

    @property
    def remedy(self) -> str:
        return REMEDIES[self.fault]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"remedy": self.remedy}

    def __str__(self) -> str:
        place = [self.file] if self.file else []
        place += [f"episode {self.episode}"] if self.episode is not None else []
        place += [f"frame {self.frame}"] if self.frame is not None else []
        return f"{self.fault}: {', '.join(place) or 'data set'}: {self.message}\n    {self.remedy}"


def examine(root: Path, every_frame: bool = True) -> list[Finding]:
    """All faults, in the order of the files. `every_frame` decodes each picture; else three of each episode."""
    root = Path(root)
    try:
        layout = read_layout(root)
    except DatasetError as error:
        return [Finding(error.fault, str(error))]
    return list(_Examination(layout, every_frame).findings())


class _Examination:
    def __init__(self, layout: Layout, every_frame: bool):
        self.layout, self.every_frame = layout, every_frame
        self.columns: dict[str, list[np.ndarray]] = {}
        self.fingerprints: dict[bytes, int] = {}
        self.videos = VideoReader()

    def findings(self) -> Iterator[Finding]:
        for found in self.layout.contradictions:
            yield Finding(found.fault, found.message, found.file, found.episode, found.frame)
        for name, feature in self.layout.info.features.items():
            if feature.problem is not None:
                yield Finding("cannot be read", f"{name!r}: {feature.problem}", "meta/info.json")
            if feature.names_problem is not None:
                yield Finding("names", f"{name!r}: {feature.names_problem}", "meta/info.json")
        for span in self.layout.spans:
            yield from self._data_file(span)
        for key in self.layout.clips:
            yield from self._camera(key)
        for note in sanity_notes(self.layout.root):
            yield Finding(note.fault, note.message, note.file, note.episode, note.frame)
        yield from self._statistics()

    # --- rows --------------------------------------------------------------------------------------------------------

    def _data_file(self, span: Span) -> Iterator[Finding]:
        file = str(span.path.relative_to(self.layout.root))
        try:
            opened = open_parquet(span.path)
        except DatasetError as error:
            yield Finding(error.fault, str(error), file)
            return
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
                if name not in BOOKKEEPING:
                    yield Finding("column missing", f"no column {name!r}, which meta/info.json lists", file)
                continue
            try:
                column = read_columns(opened, [name], span.path)[name]
            except DatasetError as error:
                yield Finding(error.fault, str(error), file)
                continue
            if feature.dtype == "image":
                yield from self._images(column, name, feature, span, file)
            elif feature.is_numeric:
                values = rows.numbers(column, feature)
                if isinstance(values, np.ndarray):
                    known[name] = values
                else:
                    yield self._bad_rows(values, name, span, file)
        yield from self._bookkeeping(known, span, file)
        for name, values in known.items():
            yield from self._finite(name, values, span, file)
            if name not in BOOKKEEPING:
                self.columns.setdefault(name, []).append(values)
        yield from self._duplicates(known, span, file)

    def _bookkeeping(self, known: dict[str, np.ndarray], span: Span, file: str) -> Iterator[Finding]:
        found = crosscheck.numbering(self.layout.episodes, span.start, known)
        for one in found:
            yield Finding(one.fault, one.message, file, one.episode, one.frame)
        if "task_index" in known:
            layout = self.layout
            for one in crosscheck.tasks(layout.task_table, layout.episodes, span.start, known["task_index"]):
                yield Finding(one.fault, one.message, file, one.episode, one.frame)
        frames = np.arange(span.start, span.stop)
        episode = self.layout.episodes.of_frame(frames)
        step = frames - self.layout.episodes.start[episode]
        if "timestamp" in known:
            off = np.abs(known["timestamp"] - step / self.layout.info.fps)
            off[~np.isfinite(off)] = np.inf
            if len(wrong := np.flatnonzero(off > TOLERANCE)):
                row, fps = int(wrong[0]), self.layout.info.fps
                message = (
                    f"timestamp is {known['timestamp'][row]:.4f} s, at {fps} fps expected {step[row] / fps:.4f} s "
                    f"({len(wrong)} such rows)"
                )
                yield Finding("timestamps", message, file, *self.layout.episodes.locate(span.start + row))

    def _bad_rows(self, bad: rows.BadRows, name: str, span: Span, file: str) -> Finding:
        place = self.layout.episodes.locate(span.start + bad.row) if bad.row is not None else (None, None)
        return Finding(bad.fault, f"{name!r} {bad.message}", file, *place)

    def _finite(self, name: str, values: np.ndarray, span: Span, file: str) -> Iterator[Finding]:
        if values.dtype.kind != "f":
            return
        bad = ~np.isfinite(values.reshape(len(values), -1))
        if bad.any():
            row, dimension = np.argwhere(bad)[0].tolist()
            episode, frame = self.layout.episodes.locate(span.start + row)
            names = self.layout.info.features[name].names
            label = names[dimension] if names else dimension
            yield Finding(
                "not finite", f"{name!r}, {label}: {bad.sum()} values are NaN or infinite", file, episode, frame
            )

    def _duplicates(self, known: dict[str, np.ndarray], span: Span, file: str) -> Iterator[Finding]:
        numbers = [values for name, values in known.items() if name not in BOOKKEEPING]
        if not numbers:
            return
        episodes = self.layout.episodes
        for episode in episodes.between(span.start, span.stop):
            rows = slice(int(episodes.start[episode]) - span.start, int(episodes.stop[episode]) - span.start)
            fingerprint = b"".join(np.ascontiguousarray(values[rows]).tobytes() for values in numbers)
            twin = self.fingerprints.setdefault(fingerprint, episode)
            if twin != episode:
                number, twin = int(episodes.number[episode]), int(episodes.number[twin])
                yield Finding("duplicate episode", f"has the same numbers as episode {twin}", file, number)

    # --- pictures ----------------------------------------------------------------------------------------------------

    def _look_at(self, length: int) -> np.ndarray:
        return np.arange(length) if self.every_frame else np.unique([0, length // 2, length - 1])

    def _images(self, column: pa.ChunkedArray, name: str, feature: Feature, span: Span, file: str) -> Iterator[Finding]:
        files = rows.image_files(column)
        if isinstance(files, rows.BadRows):
            yield self._bad_rows(files, name, span, file)
            return
        episodes = self.layout.episodes
        for episode in episodes.between(span.start, span.stop):
            first = int(episodes.start[episode]) - span.start
            for step in self._look_at(int(episodes.length[episode])).tolist():
                try:
                    decode_image(files[first + step].as_py() or b"", feature.size, repr(name))
                except DatasetError as error:
                    fault = "wrong shape" if "height×width" in str(error) else "unreadable image"
                    yield Finding(fault, str(error), file, int(episodes.number[episode]), step)
                    break  # one of an episode says enough

    def _camera(self, key: str) -> Iterator[Finding]:
        fps, size = self.layout.info.fps, self.layout.info.features[key].size
        for position, clip in enumerate(self.layout.clips[key]):
            episode = int(self.layout.episodes.number[position])
            file = str(clip.path.relative_to(self.layout.root))
            if not clip.path.is_file():
                yield Finding("file missing", f"{key!r} has no video here", file, episode)
                continue
            length = int(self.layout.episodes.length[position])
            steps = self._look_at(length)
            try:
                there = self.videos.times(clip.path)
                due = clip.start + np.arange(length) / fps
                late = [i for i in range(length) if np.abs(there - due[i]).min(initial=np.inf) > TOLERANCE]
                if not len(there):
                    yield Finding("video damaged", f"{key!r}: no frame can be read from the video", file, episode)
                    continue
                if late:
                    message = f"{key!r} has no frame at {due[late[0]]:.4f} s ({len(late)} of {length} frames)"
                    yield Finding("video too short", message, file, episode, late[0])
                    continue
                self.videos.frames(clip.path, due[steps].tolist(), size, repr(key))
            except DatasetError as error:
                fault = "wrong shape" if "height×width" in str(error) else "video damaged"
                yield Finding(fault, str(error), file, episode)
            except Exception as error:  # FFmpeg's errors are many
                yield Finding("video damaged", f"{key!r}: {error}", file, episode)

    # --- the whole ---------------------------------------------------------------------------------------------------

    def _whole(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}

    def _statistics(self) -> Iterator[Finding]:
        path = self.layout.root / "meta" / "stats.json"
        if not path.is_file():
            return
        file = str(path.relative_to(self.layout.root))
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield Finding("statistics", f"cannot be read: {error}", file)
            return
        for name, values in self._whole().items():
            rows = values.reshape(len(values), -1).astype(np.float64)
            if not np.isfinite(rows).all():
                continue
            true = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
            for which, value in true.items():
                got = np.ravel(stored.get(name, {}).get(which, np.nan)).astype(np.float64)
                slack = 1e-3 * float(np.ptp(rows) + 1e-9)
                if got.shape != value.shape or not np.allclose(got, value, 1e-3, slack):
                    message = f"{which} of {name!r} is {got.round(4).tolist()}, the rows give {value.round(4).tolist()}"
                    yield Finding("statistics", message, file)
                    break
