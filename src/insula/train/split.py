"""Which episodes a run trains on and which it never sees: decided once, when it starts, and stored in its folder.

    episodes   0 1 2 3 4 5 6 7 8 9 | 10 11 12      recorded while the run was interrupted: left out, and said
    at start   . . h . . . . h . . |
    resumed    . . h . . . . h . . |               the same, whatever was added since

A data set that lost episodes, or whose first ones are others now, is no longer what the run was started with.
"""

import logging
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.data.chunks import joined
from insula.data.instructions import read_instructions, warn_of_blanks
from insula.data.lerobot import LeRobotDataset
from insula.data.mapping import RobotData
from insula.data.subtasks import NONE, read_subtasks
from insula.errors import DatasetError, InputError
from insula.runs.folder import MAPPING_FILE

log = logging.getLogger(__name__)
INSTRUCTIONS_LISTED = 5
"""Instructions that a warning lists in full."""


@dataclass(frozen=True)
class Part:
    """A source's episodes (rows of questions) to train on, and those held out; int64, ascending."""

    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Fingerprint:
    """How many episodes (or rows) a source had, and a checksum over what tells them apart."""

    count: int
    crc32: int


def fingerprint(units: np.ndarray, count: int | None = None) -> Fingerprint:
    """Of the first `count` units, all by default: checksums of episodes, or the picture of each row of questions."""
    first = np.ascontiguousarray(units[:count], "<i8")
    return Fingerprint(len(first), zlib.crc32(first.tobytes()))


def split_episodes(instructions: Sequence[set[str]], fraction: float, seed: int, where: str) -> Part:
    """Hold out a share of episodes, at least one where the share is positive.

    `instructions` [n]: what each episode shows. An episode that alone shows an instruction is held out only where no
    other is left to hold out, and a warning then names the instruction. Raises InputError when none is left to train.
    """
    count = len(instructions)

    wanted = _held_out_count(count, fraction, where, "episodes")
    # By instruction, because held-out losses of one that was never trained on tell nothing of generalization.
    shown = Counter(instruction for some in instructions for instruction in some)
    chosen: list[int] = []
    needed: list[int] = []
    for episode in np.random.default_rng(seed).permutation(count).tolist():
        if len(chosen) == wanted:
            break

        if any(shown[instruction] == 1 for instruction in instructions[episode]):
            needed.append(episode)
        else:
            chosen.append(episode)
            shown.subtract(instructions[episode])

    # Still not enough: a share was asked for, so the last ones of their instruction go as well, and are named.
    for episode in needed[: wanted - len(chosen)]:
        chosen.append(episode)
        shown.subtract(instructions[episode])

    if unseen := sorted(instruction for instruction, episodes in shown.items() if episodes == 0):
        more = f" and {len(unseen) - INSTRUCTIONS_LISTED} more" if len(unseen) > INSTRUCTIONS_LISTED else ""
        log.warning(
            "%s: every episode of these instructions is held out, none is trained on: %s%s; "
            "--held-out-fraction 0 trains on all episodes",
            where,
            ", ".join(map(repr, unseen[:INSTRUCTIONS_LISTED])),
            more,
        )

    return _part(count, np.array(chosen, np.int64))


def split_rows(pictures: np.ndarray, fraction: float, seed: int, where: str) -> Part:
    """Hold out a share of pictures with all questions about them. `pictures` [n]: which one each row is about."""
    count = int(pictures.max()) + 1 if len(pictures) else 0
    wanted = _held_out_count(count, fraction, where, "pictures")

    held_out = np.random.default_rng(seed).permutation(count)[:wanted]
    return _part(len(pictures), np.flatnonzero(np.isin(pictures, held_out)))


def split_again(stored: Any, units: np.ndarray, where: str, what: str) -> Part:
    """The part that `to_json` wrote when the run was started. What was added since is left out, with a warning: the run
    goes on with the same samples in the same order.

    Raises DatasetError where the data set is no longer the one the run was started with, or `stored` is damaged.
    """
    held_out = _stored_units(stored, where)
    before = Fingerprint(stored["count"], stored["crc32"])

    # Episodes are known by what they hold: a folder of the same name and size may be another recording.
    remedy = "point --data to the data it was started with, or start a new run"
    if len(units) < before.count:
        raise DatasetError(f"{where}: has {len(units)} {what}, this run was started with {before.count}; {remedy}")
    if fingerprint(units, before.count) != before:
        raise DatasetError(
            f"{where}: its first {before.count} {what} are not those this run was started with (other lengths, "
            f"actions, subtasks or order); {remedy}"
        )

    if more := len(units) - before.count:
        log.warning(
            "%s: %d %s were added since this run was started. They are left out, so that it goes on with the same "
            "samples; train on them in a new run",
            where,
            more,
            what,
        )

    return _part(before.count, np.array(held_out, np.int64))


def _stored_units(stored: Any, where: str) -> list[int]:
    """The numbers held out, once all of `stored` is what `split_to_json` writes."""
    damaged = f"{where}: its split, as {MAPPING_FILE} of the run has it, is damaged"
    if not isinstance(stored, dict) or not {"count", "crc32", "held_out"} <= stored.keys():
        raise DatasetError(f"{damaged}: {stored!r:.80}, expected count, crc32 and held_out; start a new run")

    held_out: list[Any] = stored["held_out"] if isinstance(stored["held_out"], list) else [None]
    numbers = [stored["count"], stored["crc32"], *held_out]
    if not all(type(number) is int and 0 <= number < 2**32 for number in numbers):
        raise DatasetError(f"{damaged}: expected whole numbers, got {numbers!r:.80}; start a new run")
    if any(number >= stored["count"] for number in held_out):
        raise DatasetError(f"{damaged}: it holds out one beyond the {stored['count']} there were; start a new run")

    return held_out


def split_to_json(part: Part, units: np.ndarray) -> dict[str, Any]:
    """What `split_again` reads. `units`: those the part was made of, or more."""
    seen = fingerprint(units, len(part.train) + len(part.held_out))
    return {"count": seen.count, "crc32": seen.crc32, "held_out": part.held_out.tolist()}


def instructions_of(dataset: LeRobotDataset, robot: RobotData) -> list[set[str]]:
    """The instructions that each episode shows. Warns where some are empty; raises as `read_instructions`."""
    found = read_instructions(dataset, robot)
    warn_of_blanks(dataset, found)

    spans = zip(dataset.episodes.start, dataset.episodes.stop, strict=True)
    return [{found.texts[number] for number in np.unique(found.number[start:stop])} for start, stop in spans]


def episode_checksums(dataset: LeRobotDataset, robot: RobotData) -> np.ndarray:
    """int64, one for each episode: of its actions, and so of its length; with subtasks, of these too, since they say
    which frames are samples. It knows a recording again."""
    actions = np.ascontiguousarray(joined(dataset, robot.actions, dataset.column))
    spans = list(zip(dataset.episodes.start, dataset.episodes.stop, strict=True))
    sums = [zlib.crc32(actions[start:stop].tobytes()) for start, stop in spans]
    if robot.subtasks is not None:
        told = read_subtasks(dataset, robot)
        # By text: numbers of a table may change and mean the same.
        known = np.array([*(zlib.crc32(text.encode()) for text in told.texts), NONE], np.int64)[told.number]
        sums = [zlib.crc32(known[start:stop].tobytes(), crc) for (start, stop), crc in zip(spans, sums, strict=True)]

    return np.array(sums, np.int64)


def _held_out_count(count: int, fraction: float, where: str, what: str) -> int:
    wanted = int(np.ceil(count * fraction))  # up: a share above 0 holds out at least one
    if count - wanted < 1:
        raise InputError(
            f"{where}: held_out_fraction is {fraction}, and of {count} {what} none would be left to train on; "
            "--held-out-fraction 0 trains on all"
        )
    return wanted


def _part(count: int, held_out: np.ndarray) -> Part:
    train = np.setdiff1d(np.arange(count), held_out)
    return Part(train, np.sort(held_out))
