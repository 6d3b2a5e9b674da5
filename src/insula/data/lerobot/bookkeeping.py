"""Columns that say nothing but where a row is: they are counted, whatever a recorder wrote into them."""

import numpy as np

from insula.data.lerobot.places import Episodes
from insula.errors import DatasetError

RATE_TOLERANCE = 0.05
"""How far, relative to fps, the frames of a data set of images may be apart on average. A recorder's clock jitters;
another rate is a mistake."""


def counted(name: str, episodes: Episodes, fps: float | int) -> np.ndarray | None:
    """`index`, `episode_index`, `frame_index` and `timestamp` of every frame, [frames], numbered from 0 without gaps;
    None for any other column."""
    frames = np.arange(int(episodes.stop[-1]))
    episode = episodes.of_frame(frames)
    # Counted rather than read: recorders restart `index`, leave `frame_index` out, or count episodes from 1.
    step = frames - episodes.start[episode]
    match name:
        case "index":
            return frames
        case "episode_index":
            return episode
        case "frame_index":
            return step
        case "timestamp":
            return (step / fps).astype(np.float32)

    return None


def off_the_grid(timestamps: np.ndarray, step: np.ndarray, fps: float | int) -> np.ndarray:
    """Seconds by which the `timestamps` of frames lie off step / fps, [frames]; infinity where there is none. What
    float32 cannot hold counts as nothing: an hour from the start, that is more than a ten-thousandth."""
    due = step / fps
    off = np.maximum(np.abs(timestamps.astype(np.float64) - due) - np.spacing(due.astype(np.float32)), 0.0)
    off[~np.isfinite(off)] = np.inf
    return off


def other_rate(timestamps: np.ndarray, episode: np.ndarray, fps: float | int) -> float | None:
    """Seconds between two frames, where the `timestamps` [frames] say plainly that `fps` is wrong; otherwise None.
    `episode` [frames] of each."""
    apart = np.diff(timestamps.astype(np.float64))[episode[1:] == episode[:-1]]
    # A clock that stands still between two frames says nothing about the rate.
    apart = apart[np.isfinite(apart) & (apart > 0)]
    # The median: one pause of the recorder must not look like another rate.
    if not len(apart) or abs(np.median(apart) * fps - 1) <= RATE_TOLERANCE:
        return None

    return float(np.median(apart))


def told_tasks(tasks: tuple[str, ...], episodes: Episodes, why: str) -> np.ndarray:
    """The position in `tasks` of every frame, as the episode table has it. Raises DatasetError, beginning with `why`,
    where an episode has several there, or none."""
    if len(tasks) == 1:
        return np.zeros(int(episodes.stop[-1]), np.int64)

    # Tables that were edited by hand differ from one another in blanks.
    known = {text.strip(): at for at, text in enumerate(tasks)}
    for number, told in zip(episodes.number.tolist(), episodes.tasks, strict=True):
        if len(told) != 1 or told[0].strip() not in known:
            raise DatasetError(
                f"{why} the episode table has {len(told)} tasks for episode {number}, expected one of the task table"
            )

    return np.repeat([known[told[0].strip()] for told in episodes.tasks], episodes.length)
