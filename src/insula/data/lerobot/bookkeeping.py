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


def other_rate(timestamps: np.ndarray, episode: np.ndarray, fps: float | int) -> float | None:
    """Seconds between two frames, where the `timestamps` [frames] say plainly that `fps` is wrong; otherwise None.
    `episode` [frames] of each."""
    apart = np.diff(timestamps.astype(np.float64))[episode[1:] == episode[:-1]]
    apart = apart[np.isfinite(apart) & (apart > 0)]
    if not len(apart) or abs(np.median(apart) * fps - 1) <= RATE_TOLERANCE:
        return None
    return float(np.median(apart))


def told_tasks(tasks: tuple[str, ...], episodes: Episodes, why: str) -> np.ndarray:
    """The position in `tasks` of every frame, as the episode table has it. Raises DatasetError, beginning with `why`,
    where an episode has several there, or none."""
    if len(tasks) == 1:
        return np.zeros(int(episodes.stop[-1]), np.int64)
    known = {text.strip(): at for at, text in enumerate(tasks)}
    for number, told in zip(episodes.number.tolist(), episodes.tasks, strict=True):
        if len(told) != 1 or told[0].strip() not in known:
            raise DatasetError(
                f"{why} the episode table has {len(told)} tasks for episode {number}, expected one of the task table"
            )
    return np.repeat([known[told[0].strip()] for told in episodes.tasks], episodes.length)
