"""Which frame of a video a row shows: the nearest one, where there is no doubt about it.

A row asks for a frame at `start of its clip + timestamp`. The frame nearest to that is taken where it lies within
NEAREST_WITHIN of the distance between two frames: recorders sum up rounded durations, and drift by less than that.
Farther away the answer could be the neighbor, which is an error. So is a clip whose rows start before its frames do and
end before them: every picture would be another row's.
"""

from dataclasses import dataclass

import numpy as np

EXACT = 1e-4
"""Seconds a frame may lie from its row without a word (LeRobot's tolerance)."""
NEAREST_WITHIN = 0.2
"""Of the distance to the next frame: how far the nearest one may lie from its row. From a half on it is another one."""
RATE = 0.01
"""How much the distance between two frames may differ from that between two rows."""


@dataclass(frozen=True)
class Match:
    """For n rows: the number of the nearest frame of each, how far behind its row it lies in seconds (negative:
    before), and whether that is near enough."""

    nearest: np.ndarray
    off: np.ndarray
    is_near: np.ndarray


@dataclass(frozen=True)
class Misfit:
    """Why rows have no frame: the doctor's name for it, what to say, the first such row."""

    fault: str
    message: str
    row: int


def match(times: np.ndarray, due: np.ndarray) -> Match:
    """`times` [frames] of a video, rising, to `due` [rows], both in seconds. There must be a frame."""
    # The two frames around each time; at the ends both are the same one.
    behind = np.clip(np.searchsorted(times, due), 1, max(len(times) - 1, 1))
    before = behind - 1
    behind = np.minimum(behind, len(times) - 1)
    nearest = np.where(np.abs(times[before] - due) <= np.abs(times[behind] - due), before, behind)
    off = times[nearest] - due

    # The gaps on both sides: beyond the last frame only one is known.
    gaps = np.r_[np.inf, np.diff(times), np.inf]
    gap = np.minimum(gaps[nearest], gaps[nearest + 1])
    gap[~np.isfinite(gap)] = 0.0
    with np.errstate(invalid="ignore"):  # a NaN among the timestamps is near nothing
        # Timestamps are float32: their last digit grows with the hours.
        is_near = np.abs(off) <= np.maximum(EXACT, NEAREST_WITHIN * gap) + 1e-7 * np.abs(due)

    return Match(nearest, off, is_near)


def misfit(times: np.ndarray, due: np.ndarray, end: float, fps: float | int) -> Misfit | None:
    """Why some of a clip's rows have no frame, told apart in words; None where all have one. `end`: where the next clip
    of the file begins, or infinity."""
    if not len(times):
        return Misfit("video damaged", "no frame can be read from the video", 0)

    found = match(times, due)
    if found.is_near.all():
        return None

    first = int(np.argmin(found.is_near))
    many = f"({int((~found.is_near).sum())} of {len(due)} frames)"
    at = f"no frame at {due[first]:.4f} s {many}"

    # Half a frame early, so that a drift does not lose the first one.
    of_clip = times[(times > due[0] - 0.5 / fps) & (times < end - 0.5 / fps)]
    apart = float(np.median(np.diff(of_clip))) if len(of_clip) > 1 else 1 / fps
    # From the whole to the part: at another rate everything below is true as well.
    if is_of_another_rate(of_clip, fps):
        said = f"the frames of the video are {apart:.4f} s apart, the rows {1 / fps:.4f} s"
        return Misfit("video rate", f"{at}: {said}, so pictures and rows drift apart", first)

    # Nothing but rows behind the last frame: the others are sound.
    within = due <= times[-1] + 0.5 * apart
    if found.is_near[within].all():
        return Misfit("video too short", f"{at}: the video was cut, it ends at {times[-1]:.4f} s", first)

    # Frame by frame in their order, since the nearest one may be the neighbor.
    in_order = of_clip[: len(due)] - due[: len(of_clip)]
    if len(of_clip) >= len(due) and np.ptp(in_order) <= 2 * EXACT:
        return Misfit("video offset", f"{at}: every frame lies {_signed(in_order.mean())} its row", first)
    if is_shifted(times, due, end, fps):
        late = float(of_clip[0] - due[0])
        return Misfit("video offset", f"{at}: the frames begin {_signed(late)} the rows, and go on beyond them", first)

    steady = found.off[found.is_near]
    if len(steady) > 2 and abs(steady[-1] - steady[0]) > 2 * EXACT:
        return Misfit("video rate", f"{at}: pictures and rows drift apart, from {steady[0]:.4f} s on", first)

    return Misfit(
        "video gap", f"{at}: frames are missing there, the nearest is {abs(found.off[first]):.4f} s away", first
    )


def is_of_another_rate(times: np.ndarray, fps: float | int) -> bool:
    """Whether frames follow one another faster or slower than rows do."""
    return len(times) > 2 and abs(float(np.median(np.diff(times))) * fps - 1) > RATE


def is_shifted(times: np.ndarray, due: np.ndarray, end: float, fps: float | int) -> bool:
    """Whether the first rows have no frame while frames follow behind the last row: then each row that does find one
    finds another row's."""
    half = 0.5 / fps
    starts_late = not ((times > due[0] - half) & (times < due[0] + half)).any()
    goes_on = ((times > due[-1] + half) & (times < end - half)).any()
    return bool(starts_late and goes_on)


def deviation(times: np.ndarray, due: np.ndarray) -> str | None:
    """How the frames lie to the rows where all are near but not exact: an offset, a drift or jitter, in words."""
    off = match(times, due).off
    if np.abs(off).max(initial=0) <= EXACT:
        return None
    if np.ptp(off) <= EXACT:
        return f"a constant offset: every frame lies {_signed(off.mean())} its row"

    # A drift is what a straight line explains; what it leaves is jitter.
    slope = np.polyfit(due - due.mean(), off, 1)[0]
    rest = off - off.mean() - slope * (due - due.mean())
    if np.ptp(rest) < 0.5 * np.ptp(off):
        return f"a drift: the first frame lies {_signed(off[0])} its row, the last {_signed(off[-1])}"

    return f"jitter: frames lie up to {np.abs(off).max():.4f} s from their rows"


def _signed(seconds: float) -> str:
    return f"{abs(seconds):.4f} s {'behind' if seconds >= 0 else 'before'}"
