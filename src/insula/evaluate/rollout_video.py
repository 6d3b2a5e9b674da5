"""Rollouts to look at: an MP4 or an animated GIF, both cameras side by side."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from PIL import Image

from insula.errors import InputError, did_you_mean
from insula.evaluate.episodes import Recording

VIDEO_FPS = 10
ENDINGS = (".mp4", ".gif")
HOLD = 8  # frames an episode's end stays on screen
SUCCESS, FAILURE = (46, 160, 67), (207, 68, 60)


def write_video(path: str | Path, frames: np.ndarray, fps: int = VIDEO_FPS, scale: int = 4) -> Path:
    """Write `frames` uint8 [T, h, w, 3], enlarged `scale` times, as the format its ending names.

    Raises InputError for another ending, for frames that are not such an array, and for `scale` or `fps` below 1.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        hint = did_you_mean(path.suffix.lower(), ENDINGS)
        raise InputError(f"video {path}: ending {path.suffix!r}, expected one of {', '.join(ENDINGS)}{hint}")

    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(f"video {path}: got {frames.dtype}{list(frames.shape)}, expected uint8[T, h, w, 3], T >= 1")
    if scale < 1 or fps < 1:
        raise InputError(f"video {path}: scale is {scale} and fps is {fps}, expected at least 1 of each")

    # Enlarged by repeating, not by a filter: what is looked at are the very pixels the policy was given.
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_mp4 if path.suffix.lower() == ".mp4" else _write_gif
    write(path, frames.repeat(scale, axis=1).repeat(scale, axis=2), fps)
    return path


def reel(recordings: Iterable[Recording]) -> np.ndarray:
    """All recordings one after the other, uint8 [T, h, w, 3]; each ends on a held frame with a green (success) or red
    border. Raises InputError where there is no recording.
    """
    parts = []
    for recording in recordings:
        end = recording.frames[-1].copy()
        color = SUCCESS if recording.episode.success else FAILURE
        for border in (end[:2], end[-2:], end[:, :2], end[:, -2:]):  # views of the copy
            border[:] = color
        parts += [recording.frames, np.repeat(end[None], HOLD, axis=0)]
    if not parts:
        raise InputError("no recording to show; evaluate with record=1 or more")

    return np.concatenate(parts)


def _write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"  # x264 is GPL: some builds leave it out
    odd = [(0, side % 2) for side in frames.shape[1:3]]  # yuv420p halves both sides
    frames = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")

    with av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=Fraction(fps)))
        stream.height = frames.shape[1]
        stream.width = frames.shape[2]
        stream.pix_fmt = "yuv420p"  # what every browser plays; 4:4:4 many do not
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # the encoder looks ahead: this fetches the frames it still holds


def _write_gif(path: Path, frames: np.ndarray, fps: int) -> None:
    # Without dithering flat areas stay flat: no flicker between frames, and LZW packs long runs.
    images = [Image.fromarray(frame).quantize(128, dither=Image.Dither.NONE) for frame in frames]

    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
