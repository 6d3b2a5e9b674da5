"""Frames of video files (H.264, AV1, whatever FFmpeg reads): by timestamp, in any order, never a neighbor."""

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from insula.data.images import COLOR_REMEDY, NOT_COLOR
from insula.data.lerobot.metadata import lfs_message
from insula.data.lerobot.timing import NEAREST_WITHIN, match
from insula.errors import DatasetError, FileError
from insula.files import lfs_size

OPEN_VIDEOS = 16
QUARTER_TURNS = (0, 90, 180, 270)
"""Degrees, counterclockwise: what a display matrix may ask for."""


@dataclass
class _Video:
    """An open file, and from its packets, without decoding: the time of every frame, and which start a group."""

    container: Any
    stream: Any
    pts: list[int]
    keys: list[int]
    times: np.ndarray

    def seconds(self, pts: int) -> float:
        return float(pts * self.stream.time_base)


class VideoReader:
    """Keeps the last few files open. Safe to use from several threads, which take turns."""

    def __init__(self, open_files: int = OPEN_VIDEOS):
        self._videos: OrderedDict[Path, _Video] = OrderedDict()
        self._open_files = open_files
        self._lock = threading.Lock()

    def frames(self, path: Path, seconds: Sequence[float], size: tuple[int, int], where: str) -> np.ndarray:
        """The frames nearest to `seconds`, uint8 [n, height, width, 3], upright as the file asks for; neighbors share
        one pass over their group.

        Raises DatasetError naming `where` when the file is missing, damaged, no 8-bit color, of another size, or has no
        frame near enough to a time (`insula.data.lerobot.timing`). A frame that the decoder had to make up, or that
        depends on one, counts as damaged.
        """
        what = f"{where}, {path}"
        with self._lock:
            try:
                video = self._open(path, what)
                wanted = _wanted(video, np.asarray(seconds, np.float64), what)
                # Each frame once, in the order of the file, whatever the order asked for.
                found = dict(_decode(video, sorted(set(wanted)), size, what))
            except (av.FFmpegError, OSError, IndexError) as error:
                # Whatever state the decoder is in now, nobody should go on from it.
                self._forget(path)
                raise _unreadable(what, error) from None
            except DatasetError:
                self._forget(path)
                raise

        if missing := [pts for pts in wanted if pts not in found]:
            at = video.seconds(missing[0])
            message = (
                f"{what}: the frame at {at:.4f} s cannot be decoded ({len(missing)} such frames); restore the file"
            )
            raise DatasetError(message, "video damaged")

        return np.stack([found[pts] for pts in wanted])

    def times(self, path: Path, where: str = "video") -> np.ndarray:
        """Seconds of every frame in the file, rising, from its packets. Raises DatasetError naming `where`."""
        what = f"{where}, {path}"
        with self._lock:
            try:
                return self._open(path, what).times
            except (av.FFmpegError, OSError, IndexError) as error:
                raise _unreadable(what, error) from None

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            for path in list(self._videos):
                self._forget(path)

    def _open(self, path: Path, what: str) -> _Video:
        if path in self._videos:
            self._videos.move_to_end(path)
            return self._videos[path]

        check_video_file(path, what)
        container = av.open(str(path))
        stream = container.streams.video[0]
        # No decoding: a file of an hour is known in a fraction of a second.
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
        pts = sorted(pts for pts, _ in packets)
        keys = sorted(pts for pts, is_key in packets if is_key)
        stream.thread_type = "AUTO"
        times = np.array(pts, np.float64) * float(stream.time_base or 1)
        self._videos[path] = _Video(container, stream, pts, keys, times)
        while len(self._videos) > self._open_files:
            self._forget(next(iter(self._videos)))

        return self._videos[path]

    def _forget(self, path: Path) -> None:
        if video := self._videos.pop(path, None):
            video.container.close()


def check_video_file(path: Path, what: str) -> None:
    """FFmpeg would wait for ever at a pipe, and call a Git LFS pointer invalid data. Raises DatasetError."""
    try:
        pointed_to = lfs_size(path)
        is_empty = not path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"{what}: missing; restore the file or remove the episode", "file missing") from None
    except FileError as error:
        raise DatasetError(f"{what}: {error}; restore it", "video damaged") from None

    if pointed_to is not None:
        raise DatasetError(lfs_message(path, pointed_to), "git lfs")
    if is_empty:
        raise DatasetError(f"{what}: is empty (0 bytes); copy the file again", "empty file")


def _unreadable(what: str, error: Exception) -> DatasetError:
    message = f"{what}: not a readable video ({error}); restore the file or remove the episode"
    return DatasetError(message, "video damaged")


def _wanted(video: _Video, seconds: np.ndarray, what: str) -> list[int]:
    """The timestamp of the frame for each time."""
    last = video.times[-1] if len(video.times) else 0.0
    if not len(video.times):
        raise DatasetError(f"{what}: no frame can be read from the video; restore the file", "video damaged")

    found = match(video.times, seconds)
    if not found.is_near.all():
        first = int(np.argmin(found.is_near))
        away = abs(float(found.off[first]))
        raise DatasetError(
            f"{what}: no frame at {seconds[first]:.4f} s (the nearest is {away:.4f} s away, the file ends at "
            f"{last:.4f} s; at most {NEAREST_WITHIN:g} of the distance between frames is taken); fps, timestamps or "
            "the video are wrong",
            "video too short" if seconds[first] > last else "video offset",
        )

    return [video.pts[n] for n in found.nearest.tolist()]


def _decode(video: _Video, wanted: list[int], size: tuple[int, int], what: str) -> Iterator[tuple[int, np.ndarray]]:
    """Group by group: seek to the key frame, decode up to the last frame wanted there."""
    # Only a key frame can be decoded without those before it.
    for key, group in _by_group(wanted, video.keys):
        video.container.seek(key, stream=video.stream)
        left = set(group)
        waiting: list[tuple[int, np.ndarray]] = []
        for frame in video.container.decode(video.stream):
            if frame.pts is None or frame.pts < key:  # of the group before: it cannot be whole, and nobody asked for it
                continue
            if frame.is_corrupt:
                at = video.seconds(frame.pts)
                message = (
                    f"{what}: the frame at {at:.4f} s is damaged (the decoder made up what it could not read), and so "
                    "are those after it up to the next key frame; copy the file again, or remove the episode"
                )
                raise DatasetError(message, "video damaged")

            if frame.pts in left:
                waiting.append((frame.pts, _pixels(frame, size, what)))
                left.discard(frame.pts)

            # A B-frame is shown before the frame it was made from: only once that one is sound, it is sound too.
            if frame.pict_type != av.video.frame.PictureType.B:
                yield from waiting
                waiting.clear()
                if not left:
                    break

        yield from waiting


def _by_group(wanted: Iterable[int], keys: list[int]) -> Iterator[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for pts in wanted:
        groups.setdefault(keys[max(bisect.bisect_right(keys, pts) - 1, 0)], []).append(pts)
    yield from groups.items()


def _pixels(frame: Any, size: tuple[int, int], what: str) -> np.ndarray:
    """uint8 [h, w, 3] of an 8-bit color frame, turned as its display matrix asks."""
    # FFmpeg would cut 16 bits down to 8, and drop an alpha channel, without a word.
    parts = frame.format.components
    if len(parts) != 3 or any(part.bits != 8 or part.is_alpha for part in parts):
        kind = f"{frame.format.name} ({', '.join(f'{part.bits} bits' for part in parts)})"
        raise DatasetError(f"{what}: the video is {kind}, expected 8-bit color; {COLOR_REMEDY}", NOT_COLOR)

    turn = _turn(frame, what)
    shown = (frame.width, frame.height) if turn in (90, 270) else (frame.height, frame.width)
    if shown != size:
        turned = f" once turned by {turn}° as the file asks" if turn else ""
        raise DatasetError(
            f"{what}: frames are {shown[0]}×{shown[1]} (height×width){turned}, info.json says {size[0]}×{size[1]}; "
            "correct the feature's shape",
            "picture size",
        )

    # FFmpeg converts by the color space and range that the file names.
    pixels = frame.to_ndarray(format="rgb24")

    return np.ascontiguousarray(np.rot90(pixels, turn // 90)) if turn else pixels


def _turn(frame: Any, what: str) -> int:
    """Degrees counterclockwise. A camera mounted upside down, or a phone, leaves them in a display matrix."""
    turn = int(frame.rotation) % 360
    matrix = next((data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    is_mirrored = False
    if matrix is not None:
        # A negative determinant is a mirror, which `rotation` does not tell.
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
        is_mirrored = a * d - b * c < 0

    if turn not in QUARTER_TURNS or is_mirrored:
        asked = "mirrored" if is_mirrored else f"turned by {turn}°"
        raise DatasetError(
            f"{what}: the file asks for its frames to be {asked}; only quarter turns are applied: encode it upright",
            "orientation",
        )

    return turn
