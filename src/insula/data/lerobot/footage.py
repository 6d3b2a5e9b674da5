"""A video file and all episodes it shows: whether its frames are as many as their rows.

Where one is lost or left over, every later picture may be another row's, and no time says so: recorders write the
times again. A file of one episode is read from its start, as LeRobot does; a file of several is not read at all until
somebody has looked.
"""

from dataclasses import dataclass

import numpy as np

from insula.data.lerobot.places import Clips, Episodes
from insula.data.lerobot.timing import Misfit, is_of_another_rate


@dataclass(frozen=True)
class Footage:
    """The clips of one file, in the order of their starts: numbers of their `episodes`, rows of each, seconds."""

    episodes: np.ndarray
    length: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def ends(self) -> np.ndarray:
        """Where the next clip begins, or infinity: how far the frames of each clip can reach."""
        return np.r_[self.start[1:], np.inf]


def footage(clips: Clips, episodes: Episodes, numbers: np.ndarray) -> Footage:
    """`numbers`: all episodes of one file, as `Clips.in_one_file` gives them."""
    return Footage(numbers, episodes.length[numbers], clips.start[numbers], clips.stop[numbers])


def miscounted(shown: Footage, times: np.ndarray, fps: float | int) -> Misfit | None:
    """Where a file of several episodes has another number of frames than they have rows, and nothing says which of
    them are too many or too few."""
    # A file of one episode begins where its rows do. At another rate, numbers say nothing, but times do.
    if len(shown.episodes) < 2 or not len(times) or is_of_another_rate(times, fps):
        return None

    frames, rows = len(times), int(shown.length.sum())
    # Frames that the times of the clips leave out in between are left out on purpose, and shift nothing.
    extra = _behind(shown, times, fps)
    if extra and not shown.stop[-1] > times[-1] + 0.5 / fps:
        last = times[-1] + 1 / fps
        message = (
            f"the video has {frames} frames, its {len(shown.episodes)} episodes have {rows} rows: if the {extra} left "
            f"over are at its end, write to_timestamp {last:.4f} for the last of them; otherwise every episode behind "
            "them shows other pictures than its own: correct from_timestamp of these"
        )
        return Misfit("frames left over", message, 0)

    # The last row of all: where frames were lost anywhere before, it is the one without a frame.
    due = shown.start[-1] + (shown.length[-1] - 1) / fps
    lacking = round((due - times[-1]) * fps)
    if lacking > 0 and frames < rows:
        message = (
            f"the video has {frames} frames, its {len(shown.episodes)} episodes have {rows} rows: either its end is "
            "missing, or frames were lost before, and every picture behind them is another row's"
        )
        return Misfit("video too short", message, 0)

    return None


def left_over(shown: Footage, times: np.ndarray, fps: float | int) -> int:
    """Frames of a file of one episode behind its last row."""
    return _behind(shown, times, fps) if len(shown.episodes) == 1 else 0


def unused(shown: Footage, times: np.ndarray, fps: float | int) -> int:
    """Frames before, between and behind the episodes that the table leaves out on purpose."""
    half = 0.5 / fps
    # Half a frame to each side, so that drift does not push a frame out of its episode.
    inside = np.zeros(len(times), bool)
    for start, length in zip(shown.start.tolist(), shown.length.tolist(), strict=True):
        first, last = np.searchsorted(times, [start - half, start + length / fps - half])
        inside[first:last] = True
    return int((~inside).sum())


def overlapping(shown: Footage, fps: float | int) -> np.ndarray:
    """Numbers of the episodes that begin before the one ahead of them in the file has ended."""
    # Half a frame less: starts that drift by less than that do not overlap.
    stop = shown.start + (shown.length - 0.5) / fps
    return shown.episodes[1:][shown.start[1:] < stop[:-1]]


def _behind(shown: Footage, times: np.ndarray, fps: float | int) -> int:
    last = shown.start[-1] + (shown.length[-1] - 1) / fps
    return int((times > last + 0.75 / fps).sum())  # a video of twice the rate has one frame more, halfway
