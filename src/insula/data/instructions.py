"""What each frame was told: one routine for training, the split of episodes and the doctor.

mapping's `instruction`     a column of text; or of whole numbers, which point into the task table
otherwise                   LeRobot's task of each frame

A text that is missing must never reach a prompt, where it would read "None". So null is an error, and so is the text
that a table writes for it. An empty text is what some recorders write on purpose: a warning, with a count.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import RobotData
from insula.data.texts import is_blank, is_missing
from insula.errors import DatasetError
from insula.shapes import Int

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Instructions:
    """`texts`, and which of them each frame was told: `number` int64 [frames]."""

    texts: tuple[str, ...]
    number: np.ndarray

    def of(self, frames: np.ndarray) -> list[str]:
        """The text of each of these frames [N]."""
        return [self.texts[number] for number in self.number[frames].tolist()]


def read_instructions(dataset: LeRobotDataset, data: RobotData) -> Instructions:
    """Of all frames, as `data` maps them. Raises DatasetError for one that is null, says only that it is missing, or
    names a task that does not exist: with episode, frame and count."""
    found = _read(dataset, data)

    refuse_missing(
        dataset, found.texts, found.number, "instruction", "write what was asked for, or remove the episodes"
    )
    return found


def refuse_missing(
    dataset: LeRobotDataset, texts: Sequence[str], number: Int[np.ndarray, "n"], what: str, remedy: str
) -> None:
    """Raises DatasetError where a frame's text, `texts[number[frame]]`, stands for a missing one: with episode, frame
    and count."""
    # By text, of which there are few, and not by frame.
    wrong = [n for n, text in enumerate(texts) if is_missing(text)]
    frames = np.flatnonzero(np.isin(number, wrong))

    # Only those that a frame has: a table may hold an unused one.
    if len(frames):
        text = texts[number[frames[0]]]
        episode, frame = dataset.episodes.locate(int(frames[0]))
        raise DatasetError(
            f"data set {dataset.root}, episode {episode}, frame {frame}: the {what} is {text!r}, which stands for a "
            f"missing text ({len(frames)} of {len(number)} frames); {remedy}",
            "null",
        )


def blank_frames(found: Instructions) -> np.ndarray:
    """The frames that are told nothing, ascending."""
    blank = [number for number, text in enumerate(found.texts) if is_blank(text)]
    return np.flatnonzero(np.isin(found.number, blank))


def warn_of_blanks(dataset: LeRobotDataset, found: Instructions) -> None:
    """Say how many frames are told nothing, and in which episodes."""
    frames = blank_frames(found)
    if not len(frames):
        return

    episodes = dataset.episodes.number[np.unique(dataset.episodes.of_frame(frames))].tolist()
    # By the files' numbers, which is what a person can look up.
    listed = ", ".join(map(str, episodes[:10])) + (", ..." if len(episodes) > 10 else "")
    log.warning(
        "data set %s: %d of %d frames have an empty instruction, so the model is told nothing there (episodes %s)",
        dataset.root,
        len(frames),
        len(found.number),
        listed,
    )


def _read(dataset: LeRobotDataset, data: RobotData) -> Instructions:
    name = data.instruction
    if name is None:
        return Instructions(dataset.tasks, np.asarray(dataset.column("task_index"), np.int64).reshape(-1))

    feature = dataset.readable(name)
    if feature.is_text:
        # As objects: numpy's own texts would pad all to the longest.
        known, number = np.unique(np.array(dataset.texts(name), object), return_inverse=True)
        return Instructions(tuple(known.tolist()), number)

    # GR00T's annotations: numbers of the task table, beside the one that task_index names.
    if feature.is_numeric and feature.shape == (1,) and np.issubdtype(np.dtype(feature.dtype), np.integer):
        numbers = dataset.column(name)
        # The reader has counted task_index from 0 already; others hold the table's own numbers.
        number = numbers if name == "task_index" else dataset.task_positions(numbers.astype(np.int64), name)
        return Instructions(dataset.tasks, np.asarray(number, np.int64).reshape(-1))

    shape = list(feature.shape)
    raise DatasetError(
        f"data set {dataset.root}: {name!r} holds {feature.dtype} values of shape {shape}; an instruction is a column "
        "of text, or of one whole number for each frame that points into the task table"
    )
