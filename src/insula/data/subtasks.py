"""What a robot was doing at each frame, in words: a step of its task, where a data set says it.

mapping's `subtasks`    a column: "subtask_index" into meta/subtasks.parquet (LeRobot 0.4, 0.5), annotations
                        ("language_persistent", LeRobot 0.6), texts, or whole numbers that point into a table
"labels.jsonl"          or a file beside the mapping, a line for each stretch of frames [start, stop) of an episode:
                        {"episode": 3, "start": 0, "stop": 41, "subtask": "pick up the red block"}

A frame may have none, which is no fault. A text that only says that it is missing is one, as in instructions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from insula.data.instructions import refuse_missing
from insula.data.lerobot.info import Feature
from insula.data.lerobot.metadata import read_lines, shown, task_text, whole_number
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.lerobot.tables import SUBTASKS, read_texts
from insula.data.mapping import RobotData
from insula.data.texts import is_blank, says_nothing
from insula.errors import DatasetError, did_you_mean
from insula.files import is_named
from insula.shapes import Bool, Int

INDEX, ANNOTATIONS = "subtask_index", "language_persistent"
"""What LeRobot calls the columns, in its two ways."""
STYLE = "subtask"
"""Of the annotations that are subtasks; others are plans, memories, questions."""
NONE = -1


@dataclass(frozen=True, eq=False)
class Subtasks:
    """`texts`, and which of them each frame has: `number` int64 [frames], -1 where it has none."""

    texts: tuple[str, ...]
    number: Int[np.ndarray, "n"]

    @property
    def known(self) -> Bool[np.ndarray, "n"]:
        """Which frames have one."""
        return self.number != NONE

    def of(self, frames: Int[np.ndarray, "n"]) -> list[str | None]:
        """The text of each of these frames, None where it has none."""
        return [None if number == NONE else self.texts[number] for number in self.number[frames].tolist()]


def read_subtasks(dataset: LeRobotDataset, data: RobotData) -> Subtasks:
    """Of all frames, as `data` maps them. Raises DatasetError naming the episode and frame, or the file and line, of
    what is wrong; and where no frame has a subtask."""
    source = data.subtasks
    assert source is not None
    found = _from_lines(dataset, source) if isinstance(source, Path) else column_subtasks(dataset, source)
    if not found.known.any():
        raise DatasetError(f"data set {dataset.root}: no frame has a subtask in {source}; leave `subtasks` out")

    return found


def column_subtasks(dataset: LeRobotDataset, name: str) -> Subtasks:
    """The same of a column, in which there may be none. Raises DatasetError also where there is no such column, or it
    holds something else."""
    feature = _feature(dataset, name)
    if feature.is_language:
        found = _from_annotations(dataset, name)
    elif feature.is_text:
        found = _distinct(dataset.nullable_texts(name))
    elif feature.is_numeric and feature.shape == (1,) and np.issubdtype(np.dtype(feature.dtype), np.integer):
        found = _from_numbers(dataset, name)
    else:
        raise DatasetError(
            f"data set {dataset.root}: {name!r} holds {feature.dtype} values of shape {list(feature.shape)}; subtasks "
            "are a column of text, of annotations, or of one whole number for each frame that points into a table"
        )

    refuse_missing(
        dataset, found.texts, found.number, f"subtask in {name!r}", "write what is done there, or nothing at all"
    )
    return found


def _feature(dataset: LeRobotDataset, name: str) -> Feature:
    """Raises DatasetError with the nearest column that may hold subtasks."""
    if name in dataset.features:
        # Annotations are no column that anybody else may read.
        return dataset.features[name] if dataset.features[name].is_language else dataset.readable(name)

    there = [key for key, feature in dataset.features.items() if feature.is_text or feature.is_language]
    there += [INDEX] if INDEX in dataset.features else []
    have = f"it may be in {', '.join(there)}" if there else "nothing in it looks like subtasks"
    raise DatasetError(f"data set {dataset.root}: no column {name!r}{did_you_mean(name, dataset.features)}; {have}")


def _distinct(listed: Sequence[str | None]) -> Subtasks:
    """Each text once. Nothing, and what shows nothing, is none."""
    numbers: dict[str, int] = {}
    known = [NONE if text is None or is_blank(text) else numbers.setdefault(text, len(numbers)) for text in listed]
    return Subtasks(tuple(numbers), np.array(known, np.int64))


def _numbered(listed: Sequence[str], number: Int[np.ndarray, "n"]) -> Subtasks:
    """`number` [frames] points into `listed`, which may hold a text several times."""
    distinct = _distinct(listed)
    # A frame with none points at the end, where there is none.
    return Subtasks(distinct.texts, np.append(distinct.number, NONE)[number])


# --- numbers ---------------------------------------------------------------------------------------------------------


def _from_numbers(dataset: LeRobotDataset, name: str) -> Subtasks:
    """Numbers of a table, -1 where a frame has none."""
    path = dataset.root / SUBTASKS
    numbers = np.array(dataset.column(name), np.int64)
    # Which the reader has counted from 0 already; others hold the table's own numbers.
    if name == "task_index":
        return _numbered(dataset.tasks, numbers)

    if is_named(path):
        table, called = read_texts(path, "subtask"), str(path)
    elif name == INDEX:
        # Never the task table, whose texts have the same numbers and mean something else.
        raise DatasetError(
            f"{path}: missing, so that nobody knows what the numbers in {name!r} mean; restore it from the data set's "
            "source, or name another column",
            "file missing",
        )
    else:
        table, called = dataset.task_table, "the task table"

    has = numbers != NONE
    # A frame without one must find a place in the table too, and loses it again.
    found = dataset.positions(table, np.where(has, numbers, table.number[0]), name, called)
    blank = np.array([is_blank(text) for text in table.text])
    return Subtasks(table.text, np.where(has & ~blank[found], found, NONE))


# --- annotations -----------------------------------------------------------------------------------------------------


def _from_annotations(dataset: LeRobotDataset, name: str) -> Subtasks:
    """Each holds from its time on, until the next one; frames before the first have none."""
    times = dataset.column("timestamp").astype(np.float64)
    listed: list[str] = []
    number = np.full(len(dataset), NONE, np.int64)
    spans = zip(dataset.episodes.start.tolist(), dataset.episodes.stop.tolist(), strict=True)
    for episode, (start, stop) in enumerate(spans):
        where = f"data set {dataset.root}, episode {dataset.episodes.number[episode]}: {name!r}"
        begins, texts = _begun(dataset.annotations(name)[episode], where)

        # Half a frame: a time that was written with fewer digits than the frame's own belongs to that frame.
        here = np.searchsorted(begins, times[start:stop] + 0.5 / dataset.fps, side="right") - 1
        number[start:stop] = np.where(here < 0, NONE, len(listed) + here)
        listed += texts

        # Counted from the start of a video file or of the day, nothing would fail and every text would be misplaced.
        end = times[stop - 1] + 1.5 / dataset.fps
        if len(begins) and begins[-1] > end:
            raise DatasetError(
                f"{where}: {texts[-1]!r} begins at {begins[-1]:.2f} s, the episode ends at {times[stop - 1]:.2f} s; "
                "times count as the timestamps of its frames do"
            )

    return _numbered(listed, number)


def _begun(entries: list[dict[str, Any]], where: str) -> tuple[np.ndarray, list[str]]:
    """When each subtask of an episode begins, ascending, and its text."""
    told: dict[float, str] = {}
    for entry in entries:
        if entry["style"] != STYLE:
            continue

        time, text = float(entry["timestamp"]), entry["content"]
        if not isinstance(text, str) or says_nothing(text):
            raise DatasetError(f"{where}: the subtask at {time:.2f} s is {shown(text)}, expected a text", "null")
        if told.setdefault(time, text) != text:
            raise DatasetError(
                f"{where}: two subtasks begin at {time:.2f} s, {told[time]!r} and {text!r}; nobody can tell which one "
                "holds: remove one, or correct its time"
            )

    begins = sorted(told)
    return np.array(begins, np.float64), [told[time] for time in begins]


# --- lines -----------------------------------------------------------------------------------------------------------


def _from_lines(dataset: LeRobotDataset, path: Path) -> Subtasks:
    if not path.exists():
        raise DatasetError(f"{path}: no such file, which `subtasks` names; its path begins at the mapping's folder")

    at = {number: episode for episode, number in enumerate(dataset.episodes.number.tolist())}
    texts: list[str] = []
    places: list[str] = []
    line = np.full(len(dataset), NONE, np.int64)
    for where, row in read_lines(path, "episode", "start", "stop", "subtask"):
        number, start, stop = (whole_number(row[key], key, where) for key in ("episode", "start", "stop"))
        if number not in at:
            known = dataset.episodes.number
            raise DatasetError(f"{where}: no episode {number}; data set {dataset.root} has {known[0]} to {known[-1]}")

        length = int(dataset.episodes.length[at[number]])
        if not start < stop <= length:
            raise DatasetError(
                f"{where}: frames {start} to {stop} of episode {number}; expected start < stop ≤ {length}, its length"
            )

        text = task_text(row["subtask"], where, "subtask")
        if says_nothing(text):
            raise DatasetError(f"{where}: the subtask is {text!r}; leave out frames that have none", "null")

        first = int(dataset.episodes.start[at[number]])
        frames = line[first + start : first + stop]
        if (taken := frames[frames != NONE]).size:
            raise DatasetError(f"{where}: overlaps {places[taken[0]]}; a frame has one subtask")

        frames[:] = len(texts)
        texts.append(text)
        places.append(where)

    return _numbered(texts, line)
