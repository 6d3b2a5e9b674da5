"""Whether what a data set holds makes sense: notes of the doctor, beside the faults.

Everything here can be read, and trains. It may still be wrong, and only a person can say: a joint that never moved, an
angle that jumps by a whole turn, a camera that froze, actions that are a copy of the state.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from insula.data.cameras import BLACK, sample_frames
from insula.data.lerobot.info import BOOKKEEPING
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.lerobot.remedies import Finding
from insula.errors import DatasetError

SPREAD_SHARE = 1e-6
"""A range below this share of the largest value is what float32 rounds to."""
TURNS = (2 * np.pi, 360.0)
TURN_SLACK = 0.05
"""A jump this share away from a whole turn is one: the joint moved on in the meantime."""
USUAL_STEP = 0.1
"""Of a turn, the most that a joint moves within a usual frame: beyond, a jump cannot be told from motion."""
SPIKE = 30.0
"""This many times the spread of the middle 90 % away, for a frame or two, and back."""
STILL = 0.5
"""Mean difference of pictures that counts as none: codecs do not repeat a picture exactly."""
PICTURES = 5
"""Looked at in each episode."""
WIDEST = 256
"""Numbers of a column in one frame: more are a picture or a point cloud, whose dimensions mean nothing alone."""
FEWEST = 3
"""Frames of an episode below which nothing is said of it."""


def sanity_notes(root: Path) -> Iterator[Finding]:
    """What makes no sense in a data set. What cannot be read is left aside: the doctor says so."""
    try:
        dataset = LeRobotDataset(root, cache_bytes=0)
    except DatasetError:
        return

    columns = dict(_columns(dataset))

    # All that never moves before all that moves oddly, whatever the column: notes are told in the order found.
    for name, values in columns.items():
        yield from _constant(dataset, name, values)

    for name, values in columns.items():
        yield from _jumps(dataset, name, values)
        yield from _spikes(dataset, name, values)

    yield from _copies(columns)
    for key in dataset.cameras:
        yield from _pictures(dataset, key, columns)


def _columns(dataset: LeRobotDataset) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of measured numbers, float64 [frames, D]."""
    for name, feature in dataset.features.items():
        plain = feature.is_numeric and feature.dtype != "bool" and math.prod(feature.shape) <= WIDEST
        if name in BOOKKEEPING or not plain:
            continue

        try:
            values = dataset.column(name)
        except DatasetError:
            continue

        # In float64: a difference of two large float32 values would be mostly rounding.
        yield name, values.reshape(len(values), -1).astype(np.float64)


def is_action(name: str) -> bool:
    """Whether a column holds what the robot was told to do."""
    return name.startswith("action") and not name.endswith("is_pad")


def _constant(dataset: LeRobotDataset, name: str, values: np.ndarray) -> Iterator[Finding]:
    """Action dimensions that never move, by their own scale: steps of a micrometre are motion."""
    # NaN and infinity are faults of their own, and would hide that the rest stands still.
    finite = values[np.isfinite(values).all(1)]
    if not is_action(name) or not len(finite):
        return

    still = np.flatnonzero(np.ptp(finite, axis=0) <= SPREAD_SHARE * np.abs(finite).max(0)).tolist()
    if not still:
        return

    # One note for all: an arm that was not recorded is one mistake, with seven dimensions.
    if len(still) == 1:
        message = f"{_label(dataset, name, still[0])} is {finite[0, still[0]]:g} in every frame"
    else:
        labels = ", ".join(_label(dataset, name, dim) for dim in still)
        message = f"{len(still)} of {values.shape[1]} dimensions never move: {labels}"

    yield Finding("constant", f"{name!r}: {message}", subject=name)


def _jumps(dataset: LeRobotDataset, name: str, values: np.ndarray) -> Iterator[Finding]:
    """Angles that jump by a whole turn from one frame to the next, in radians or degrees."""
    if len(values) < 2 or dataset.features[name].dtype.startswith(("int", "uint")):
        return

    # From one episode to the next anything may jump.
    inside = np.diff(dataset.episodes.of_frame(np.arange(len(values)))) == 0
    for dim in range(values.shape[1]):
        finite = np.isfinite(values[:, dim])
        if not finite.any():
            continue

        # NaN where either of two frames is not finite: infinity minus itself would be a warning of NumPy's.
        steps = np.abs(np.diff(np.where(finite, values[:, dim], np.nan)))[inside]
        for turn in TURNS:
            # A wrapped angle stays within one turn, and moves little between its jumps.
            jumps = np.abs(steps - turn) < TURN_SLACK * turn
            bounded = np.abs(values[finite, dim]).max() <= turn * (1 + TURN_SLACK)
            others = steps[~jumps & np.isfinite(steps)]
            if not jumps.any() or not bounded or not len(others) or np.quantile(others, 0.9) > USUAL_STEP * turn:
                continue

            # `steps` leaves out borders of episodes, so its positions are not frames. + 1: the frame after the jump.
            first = int(np.flatnonzero(inside)[np.flatnonzero(jumps)[0]]) + 1
            unit = "2π" if turn < 10 else "360°"
            message = f"{name!r}, {_label(dataset, name, dim)} jumps by {unit} in {int(jumps.sum())} frames"
            yield Finding("jump", message, None, *dataset.episodes.locate(first), subject=name)


def _spikes(dataset: LeRobotDataset, name: str, values: np.ndarray) -> Iterator[Finding]:
    """Single frames far outside all others. A gripper that closes for a moment is none: it rests otherwise, so that its
    middle 90 % have no spread to compare with."""
    episode = dataset.episodes.of_frame(np.arange(len(values)))
    for dim in range(values.shape[1]):
        column = values[:, dim]
        finite = column[np.isfinite(column)]
        # Of fewer, the outer 5 % on each side are not even one value.
        if len(finite) < 20:
            continue

        # Of the middle, since the spike itself must not widen what it is compared with.
        low, high = np.quantile(finite, [0.05, 0.95])
        spread = high - low
        if spread <= SPREAD_SHARE * max(abs(low), abs(high)) or _has_few_values(finite):
            continue

        away = np.isfinite(column) & (np.maximum(low - column, column - high) > SPIKE * spread)
        rows = np.flatnonzero(away)
        # More than one frame in a hundred, or several in a row, is how this robot moves.
        if not len(rows) or len(rows) > 0.01 * len(column) or _longest_run(rows, episode) > 2:
            continue

        message = (
            f"{name!r}, {_label(dataset, name, dim)} is {column[rows[0]]:g}, the middle 90 % of its values lie "
            f"between {low:g} and {high:g} ({len(rows)} such frames)"
        )
        yield Finding("spike", message, None, *dataset.episodes.locate(int(rows[0])), subject=name)


def _has_few_values(column: np.ndarray) -> bool:
    """A switch or a mode: its values are names, not sizes."""
    return len(np.unique(column)) <= 4


def _longest_run(rows: np.ndarray, episode: np.ndarray) -> int:
    """The most frames that follow one another within an episode: a glitch is over at once, an event lasts."""
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(episode[rows]) != 0)) + 1
    return max(len(run) for run in np.split(rows, breaks))


def _copies(columns: dict[str, np.ndarray]) -> Iterator[Finding]:
    """Actions that are the state of the same frame, in every dimension that moves."""
    states = {name: values for name, values in columns.items() if "state" in name and not is_action(name)}
    for action, told in columns.items():
        if not is_action(action) or len(told) < FEWEST:
            continue

        for state, measured in states.items():
            # A state may have more dimensions behind those of the actions. Those at rest are equal in any two columns.
            width = min(told.shape[1], measured.shape[1])
            moves = np.ptp(told[:, :width], axis=0) > 0
            if told.shape[1] == width and moves.any() and np.array_equal(told[:, moves], measured[:, :width][:, moves]):
                yield Finding(
                    "copy", f"{action!r} is {state!r} of the same frame, in all {len(told)} frames", subject=action
                )


def _pictures(dataset: LeRobotDataset, key: str, columns: dict[str, np.ndarray]) -> Iterator[Finding]:
    """Episodes whose pictures are all black, or all the same while the robot moves."""
    # Rewards and counters move by themselves, so the state alone says whether the robot did.
    measured = [values for name, values in columns.items() if "state" in name]
    measured = measured or [values for name, values in columns.items() if is_action(name)]
    black, frozen = [], []
    for episode in range(len(dataset.episodes)):
        first, stop = int(dataset.episodes.start[episode]), int(dataset.episodes.stop[episode])
        if stop - first < FEWEST:
            continue

        try:
            pictures = dataset.images(key, sample_frames(dataset, episode, PICTURES)).astype(np.float32)
        except DatasetError:
            continue

        # A robot that stands still sees the same picture all the time, and rightly so.
        moves = any(np.any(np.ptp(values[first:stop], axis=0) > 0) for values in measured)
        if pictures.max() <= BLACK:
            black.append(episode)
        elif moves and np.abs(pictures - pictures[0]).mean((1, 2, 3)).max() <= STILL:
            # Each was compared with the first picture, not with the one before: slow motion adds up.
            frozen.append(episode)

    for fault, found, what in (("black pictures", black, "black"), ("frozen pictures", frozen, "all the same")):
        if found:
            # One note for a camera: its episodes are named by the files' numbers.
            numbers = dataset.episodes.number[found].tolist()
            message = f"{key!r}: pictures are {what} in {_some(numbers)}"
            yield Finding(fault, message, None, numbers[0], subject=key)


def _label(dataset: LeRobotDataset, name: str, dim: int) -> str:
    names = dataset.features[name].names
    return names[dim] if names else str(dim)


def _some(episodes: list[int]) -> str:
    """Episodes as a sentence names them, the first ones where there are many."""
    if len(episodes) == 1:
        return f"episode {episodes[0]}"

    listed = ", ".join(map(str, episodes[:8]))
    return f"{len(episodes)} episodes ({listed}{', ...' if len(episodes) > 8 else ''})"
