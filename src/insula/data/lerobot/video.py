"""Exact frames of video files (H.264, AV1, whatever FFmpeg reads): by timestamp, in any order, never a neighbor."""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from insula.errors import DatasetError

TOLERANCE = 1e-4
"""Seconds a frame may lie from where it is asked for (LeRobot's)."""
OPEN_VIDEOS = 16


@dataclass
class _Video:
    """An open file, and from its packets, without decoding: the time of every frame, and which start a group."""

    container: Any
    stream: Any
    pts: list[int]
    keys: list[int]


class VideoReader:
    """Keeps the last few files open. Safe to use from several threads, which take turns."""

    def __init__(self, open_files: int = OPEN_VIDEOS):
        self._videos: OrderedDict[Path, _Video] = OrderedDict()
        self._open_files, self._lock = open_files, threading.Lock()

    def frames(self, path: Path, seconds: Sequence[float], size: tuple[int, int], where: str) -> np.ndarray:
        """The frames at `seconds`, uint8 [n, height, width, 3]; neighbors share one pass over their group.

        Raises DatasetError naming `where` when the file is missing, damaged, of another size, or has no frame within
        TOLERANCE of a time.
        """
        with self._lock:
            try:
                video = self._open(path)
                wanted = [self._nearest(video, at, f"{where}, {path}") for at in seconds]
                found = dict(self._decode(video, sorted(set(wanted)), size, f"{where}, {path}"))
            except (av.FFmpegError, OSError, IndexError) as e:
                self._forget(path)
                kind = "missing" if not path.is_file() else f"not a readable video ({path.stat().st_size} bytes; {e})"
                raise DatasetError(f"{where}, {path}: {kind}; restore the file or remove the episode") from None
            except DatasetError:
                self._forget(path)
                raise
        if missing := [pts for pts in wanted if pts not in found]:
            at = float(missing[0] * video.stream.time_base)
            raise DatasetError(f"{where}, {path}: the frame at {at:.4f} s cannot be decoded; restore the file")
        return np.stack([found[pts] for pts in wanted])

    def times(self, path: Path) -> np.ndarray:
        """Seconds of every frame in the file, from its packets. Raises av.FFmpegError or OSError."""
        with self._lock:
            video = self._open(path)
            return np.array([float(pts * video.stream.time_base) for pts in video.pts])

    def close(self) -> None:
        with self._lock:
            for path in list(self._videos):
                self._forget(path)

    def _open(self, path: Path) -> _Video:
        if path in self._videos:
            self._videos.move_to_end(path)
            return self._videos[path]
        container = av.open(str(path))
        stream = container.streams.video[0]
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        pts, keys = sorted(pts for pts, _ in packets), sorted(pts for pts, key in packets if key)
        stream.thread_type = "AUTO"
        self._videos[path] = _Video(container, stream, pts, keys)
        while len(self._videos) > self._open_files:
            self._forget(next(iter(self._videos)))
        return self._videos[path]

    def _forget(self, path: Path) -> None:
        if video := self._videos.pop(path, None):
            video.container.close()

    @staticmethod
    def _nearest(video: _Video, seconds: float, where: str) -> int:
        at = seconds / float(video.stream.time_base)
        i = bisect.bisect_left(video.pts, at)
        near = min(video.pts[max(i - 1, 0) : i + 1], key=lambda pts: abs(pts - at), default=None)
        off = float("inf") if near is None else abs(float(near * video.stream.time_base) - seconds)
        if near is None or off > TOLERANCE + 1e-9 * abs(seconds):
            last = float(video.pts[-1] * video.stream.time_base) if video.pts else 0.0
            raise DatasetError(
                f"{where}: no frame at {seconds:.4f} s (the nearest is {off:.4f} s away, the file ends at "
                f"{last:.4f} s); fps, timestamps or the video are wrong"
            )
        return near

    @staticmethod
    def _decode(
        video: _Video, wanted: list[int], size: tuple[int, int], where: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Group by group: seek to the key frame, decode up to the last frame wanted there."""
        for key, group in _by_group(wanted, video.keys):
            video.container.seek(key, stream=video.stream)
            left = set(group)
            for frame in video.container.decode(video.stream):
                if frame.pts in left:
                    if (frame.height, frame.width) != size:
                        raise DatasetError(
                            f"{where}: frames are {frame.height}×{frame.width} (height×width), info.json says "
                            f"{size[0]}×{size[1]}; correct the feature's shape"
                        )
                    yield frame.pts, frame.to_ndarray(format="rgb24")
                    left.discard(frame.pts)
                if not left:
                    break


def _by_group(wanted: Iterable[int], keys: list[int]) -> Iterator[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for pts in wanted:
        groups.setdefault(keys[max(bisect.bisect_right(keys, pts) - 1, 0)], []).append(pts)
    yield from groups.items()
