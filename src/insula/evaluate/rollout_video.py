"""Rollouts to look at: an MP4 or an animated GIF, both cameras side by side, with what is known of each step."""

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from PIL import Image

from insula.errors import InputError, did_you_mean
from insula.evaluate.episodes import Recording
from insula.evaluate.overlay import SCALE, add_caption, draw_frame, enlarge

VIDEO_FPS = 10
ENDINGS = (".mp4", ".gif")
HOLD = 8  # frames an episode's end stays on screen
BORDER = 2 * SCALE
SUCCESS, FAILURE = (46, 160, 67), (207, 68, 60)


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: int = VIDEO_FPS) -> Path:
    """Write `frames`, uint8 [h, w, 3] of one size, as the format its ending names. One after the other: all of a reel
    need not be in memory.

    Raises InputError for another ending, for frames that are not such arrays, for none, and for `fps` below 1.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        hint = did_you_mean(path.suffix.lower(), ENDINGS)
        raise InputError(f"video {path}: ending {path.suffix!r}, expected one of {', '.join(ENDINGS)}{hint}")
    if fps < 1:
        raise InputError(f"video {path}: fps is {fps}, expected at least 1")

    checked = _checked(frames, path)
    first = next(checked, None)
    if first is None:
        raise InputError(f"video {path}: no frame, expected at least one")

    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_mp4 if path.suffix.lower() == ".mp4" else _write_gif
    write(path, itertools.chain([first], checked), fps)
    return path


def _checked(frames: Iterable[np.ndarray], path: Path) -> Iterator[np.ndarray]:
    size = None
    for number, frame in enumerate(frames):
        size = size or frame.shape[:2]
        if frame.dtype != np.uint8 or frame.shape != (*size, 3) or not frame.size:
            said = f"frame {number} is {frame.dtype}{list(frame.shape)}"
            raise InputError(f"video {path}: {said}, expected uint8[h, w, 3], all of one size")
        yield frame


def reel(recordings: Iterable[Recording]) -> Iterator[np.ndarray]:
    """All recordings one after the other, uint8 [h, w, 3] each, with what is known drawn into them; each ends on a held
    frame with a green (success) or red border. Raises InputError where there is no recording.
    """
    shown = list(recordings)
    if not shown:
        raise InputError("no recording to show; evaluate with record=1 or more")

    return itertools.chain.from_iterable(_episode(recording) for recording in shown)


def _episode(recording: Recording) -> Iterator[np.ndarray]:
    episode = recording.episode
    for step, frame in enumerate(recording.frames):
        yield draw_frame(frame, episode.task, recording.planned(step), holds=step in recording.held)

    end = enlarge(recording.frames[-1])
    for edge in (end[:BORDER], end[-BORDER:], end[:, :BORDER], end[:, -BORDER:]):  # views of the copy
        edge[:] = SUCCESS if episode.success else FAILURE

    # Never by color alone.
    outcome = f"{'success' if episode.success else 'failure'}, {episode.steps} steps"
    yield from itertools.repeat(add_caption(end, episode.task, outcome), HOLD)


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"  # x264 is GPL: some builds leave it out

    with av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=Fraction(fps)))
        stream.pix_fmt = "yuv420p"  # what every browser plays; 4:4:4 many do not
        for number, frame in enumerate(frames):
            odd = [(0, side % 2) for side in frame.shape[:2]]  # yuv420p halves both sides
            even = np.pad(frame, [*odd, (0, 0)], mode="edge")
            if number == 0:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())  # the encoder looks ahead: this fetches the frames it still holds


def _write_gif(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    # Without dithering flat areas stay flat: no flicker between frames, and LZW packs long runs.
    images = [Image.fromarray(frame).quantize(128, dither=Image.Dither.NONE) for frame in frames]

    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
