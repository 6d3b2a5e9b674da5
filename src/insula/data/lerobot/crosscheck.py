"""Where the tables and the rows contradict each other, and what should be written instead.

`insula.data.lerobot.counting` compares the tables with what every data file holds; `numbering` and `tasks` look at the
columns of one data file. The reader and the doctor both use them: the rows are believed, unless what is true is open.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from insula.data.lerobot.metadata import shown
from insula.data.lerobot.places import Episodes
from insula.data.lerobot.tables import Tasks
from insula.errors import DatasetError

NUMBERING = ("index", "frame_index", "episode_index")


@dataclass(frozen=True)
class Contradiction:
    """One place where files disagree. `file` is relative to the data set; `episode` as the files number it; a `fatal`
    one leaves open what is true, so that the data set cannot be read."""

    fault: str
    message: str
    file: str | None = None
    episode: int | None = None
    frame: int | None = None
    fatal: bool = False

    def __str__(self) -> str:
        place = [self.file] if self.file else []
        place += [f"episode {self.episode}"] if self.episode is not None else []
        place += [f"frame {self.frame}"] if self.frame is not None else []
        return f"{', '.join(place)}: {self.message}" if place else self.message

    def error(self, root: Path) -> DatasetError:
        """What the reader raises."""
        return DatasetError(f"data set {root}: {self}", self.fault)


def numbering(episodes: Episodes, start: int, columns: dict[str, np.ndarray]) -> Iterator[Contradiction]:
    """Rows out of order, rows left out, rows of another episode: frame_index and index rise by one within an episode,
    episode_index stays. Where they begin is left to the recorder; a column that never moves counts nothing."""
    if not columns:
        return

    frames = np.arange(start, start + len(next(iter(columns.values()))))
    episode = episodes.of_frame(frames)
    begins = np.flatnonzero(np.r_[True, episode[1:] != episode[:-1]])
    ends = np.r_[begins[1:], len(frames)] - 1
    step = frames - episodes.start[episode]

    for name in NUMBERING:
        values = columns.get(name)
        # Some recorders write zeros into index and frame_index: that counts nothing, and harms nobody.
        if values is None or (name != "episode_index" and not np.any(np.diff(values))):
            continue

        # What is left once the expected rise is taken off is constant in a sound episode.
        offset = values - (0 if name == "episode_index" else step)
        # Three rows outvote one that is wrong, also where that is the first.
        usual = np.median(np.stack([offset[begins], offset[(begins + ends) // 2], offset[ends]]), axis=0).astype(
            np.int64
        )
        expected = values - offset + np.repeat(usual, ends - begins + 1)
        if len(wrong := np.flatnonzero(values != expected)):
            row = int(wrong[0])
            more = f" ({len(wrong)} such rows)" if len(wrong) > 1 else ""
            message = f"{name} is {values[row]}, expected {expected[row]} as in the other rows of the episode{more}"
            yield Contradiction("index gap", message, None, *episodes.locate(start + row), fatal=True)


def tasks(known: Tasks, episodes: Episodes, start: int, numbers: np.ndarray) -> Iterator[Contradiction]:
    """Rows whose task_index has no text, and episodes whose rows mean another text than the episode table says."""
    frames = np.arange(start, start + len(numbers))
    position = known.positions(numbers)
    if len(wrong := np.flatnonzero(position < 0)):
        row = int(wrong[0])
        episode, frame = episodes.locate(start + row)
        listed = f"{known.number[0]} to {known.number[-1]}"
        message = f"task_index is {numbers[row]}, the task table has {listed} ({len(wrong)} such rows)"
        yield Contradiction("task index", message, None, episode, frame, fatal=True)

    right = position >= 0
    texts = len(known.text)
    # Pairs of episode and task, each once: a million rows hold few of them.
    pairs = np.unique(episodes.of_frame(frames[right]) * texts + position[right])
    for e, at in zip((pairs // texts).tolist(), (pairs % texts).tolist(), strict=True):
        told, text = episodes.tasks[e], known.text[at]
        # Some tables list no tasks, which contradicts nothing.
        if not told or text.strip() in {other.strip() for other in told}:
            continue

        # The number that would make the rows say what the table says.
        numbered = [int(known.number[known.text.index(other)]) for other in told if other in known.text]
        way = f"task_index {numbered[0]}" if numbered else "another task_index"
        message = (
            f"the rows have task_index {known.number[at]}, which is {shown(text)}, the episode table says "
            f"{shown(list(told))}: write {shown([text])} into the table, or {way} into the rows "
            "(insula data convert --tasks-from rows, or episodes, does that)"
        )
        yield Contradiction("tasks differ", message, None, int(episodes.number[e]), fatal=True)
