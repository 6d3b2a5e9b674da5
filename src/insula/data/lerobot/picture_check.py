"""What the doctor sees in pictures and videos: each is decoded, its number and time are compared with the rows."""

from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq

from insula.data.images import decode_image
from insula.data.lerobot import rows, timing
from insula.data.lerobot.footage import Footage, footage, left_over, miscounted, overlapping, unused
from insula.data.lerobot.layout import Layout
from insula.data.lerobot.parquet import read_columns
from insula.data.lerobot.places import Span
from insula.data.lerobot.remedies import Finding
from insula.data.lerobot.video import VideoReader
from insula.errors import DatasetError

DECODED_AT_ONCE = 64
"""Frames of a video in memory at a time."""


class PictureCheck:
    """`every_frame` decodes each picture; else three of each episode."""

    def __init__(self, layout: Layout, every_frame: bool):
        self._layout = layout
        self._every_frame = every_frame
        self._videos = VideoReader()

    def _steps(self, length: int) -> np.ndarray:
        return np.arange(length) if self._every_frame else np.unique([0, length // 2, length - 1])

    # --- pictures in the rows ----------------------------------------------------------------------------------------

    def images(self, opened: pq.ParquetFile, name: str, span: Span, file: str) -> Iterator[Finding]:
        """A camera's column in one data file, row group by row group: as much as training reads at once."""
        # One row group at a time: a whole file of pictures may be larger than memory.
        first = span.start
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            yield from self._group(opened, name, Span(span.path, first, first + count), file, group)
            first += count

    def _group(self, opened: pq.ParquetFile, name: str, span: Span, file: str, group: int) -> Iterator[Finding]:
        """`span`: the frames of the row group. One fault of an episode says enough."""
        kind = opened.schema_arrow.field(name).type
        try:
            column = read_columns(opened, [rows.picture_column(name, kind)], span.path, group)[name]
        except DatasetError as error:
            yield Finding(error.fault, str(error), file, subject=name)
            return

        files = rows.image_files(column)
        episodes = self._layout.episodes
        if isinstance(files, rows.BadRows):
            yield Finding(files.fault, f"{name!r} {files.message}", file, subject=name)
            return

        size = self._layout.info.features[name].size
        for episode in episodes.between(span.start, span.stop) if span.stop > span.start else ():
            begin = int(episodes.start[episode])
            for step in self._steps(int(episodes.length[episode])).tolist():
                # An episode may go on in the next row group.
                if not span.start <= begin + step < span.stop:
                    continue
                try:
                    decode_image(files[begin + step - span.start].as_py() or b"", size, repr(name))
                except DatasetError as error:
                    yield Finding(error.fault, str(error), file, int(episodes.number[episode]), step, subject=name)
                    break

    # --- videos ------------------------------------------------------------------------------------------------------

    def camera(self, key: str) -> Iterator[Finding]:
        """Every file of a camera stored as video."""
        clips = self._layout.clips[key]
        for numbers in clips.files():
            path = clips[int(numbers[0])].path
            shown = footage(clips, self._layout.episodes, numbers)
            file = str(path.relative_to(self._layout.root))
            try:
                times = self._videos.times(path, repr(key))
            except DatasetError as error:
                yield self._at(shown, 0, error.fault, str(error), key, file)
                continue

            yield from self._counted(shown, times, key, file)
            yield from self._clips(shown, times, key, file)

    def _counted(self, shown: Footage, times: np.ndarray, key: str, file: str) -> Iterator[Finding]:
        """The frames of a file against the rows of its episodes."""
        fps = self._layout.info.fps
        if bad := miscounted(shown, times, fps):
            yield self._at(shown, 0, bad.fault, f"{key!r}: {bad.message}", key, file)
        # One of the three: each explains the next.
        elif extra := left_over(shown, times, fps):
            message = f"{key!r}: the video has {len(times)} frames for {shown.length[0]} rows: {extra} are left over"
            yield self._at(shown, 0, "frames left over", message, key, file)
        elif between := unused(shown, times, fps):
            message = f"{key!r}: {between} of {len(times)} frames belong to no episode of the table"
            yield self._at(shown, 0, "frames unused", message, key, file)

        for episode in overlapping(shown, fps).tolist():
            at = int(np.flatnonzero(shown.episodes == episode)[0])
            message = f"{key!r}: begins at {shown.start[at]:.4f} s, before the episode ahead of it has ended"
            yield self._at(shown, at, "video overlap", message, key, file)

    def _clips(self, shown: Footage, times: np.ndarray, key: str, file: str) -> Iterator[Finding]:
        """Each episode's rows have their frames, and these can be decoded."""
        fps = self._layout.info.fps
        ends = shown.ends()
        due_of_file = []
        for at in range(len(shown.episodes)):
            due = shown.start[at] + np.arange(shown.length[at]) / fps
            if bad := timing.misfit(times, due, float(ends[at]), fps):
                yield self._at(shown, at, bad.fault, f"{key!r}: {bad.message}", key, file, bad.row)
                continue
            # Over all clips of the file: a drift shows from one clip to the next.
            due_of_file.append(due)
            yield from self._decoded(shown, at, due, key, file)

        if due_of_file and (words := timing.deviation(times, np.concatenate(due_of_file))):
            message = f"{key!r}: {words}; the nearest frame is taken"
            yield self._at(shown, 0, "clock", message, key, file)

    def _decoded(self, shown: Footage, at: int, due: np.ndarray, key: str, file: str) -> Iterator[Finding]:
        path = self._layout.root / file
        size = self._layout.info.features[key].size
        steps = self._steps(len(due))
        for part in np.array_split(steps, -(-len(steps) // DECODED_AT_ONCE)):
            try:
                self._videos.frames(path, due[part].tolist(), size, repr(key))
            except DatasetError as error:
                yield self._at(shown, at, error.fault, str(error), key, file)
                return

    def _at(
        self, shown: Footage, at: int, fault: str, message: str, key: str, file: str, frame: int | None = None
    ) -> Finding:
        """A finding about clip `at` of a file."""
        episode = int(self._layout.episodes.number[shown.episodes[at]])
        return Finding(fault, message, file, episode, frame, subject=key)
