"""`insula data describe`: a mapping for a data set, guessed from what it says about itself, ready to be corrected.

What is written can be trained on as it stands, where the data set is sound. What cannot be guessed is left as a
comment for a person to choose: a wrong guess would train without a word.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from insula.data.cameras import unusable_cameras
from insula.data.lerobot.info import BOOKKEEPING, Feature, Info
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import ACTION, IMAGES, STATE, plain_name
from insula.data.subtasks import ANNOTATIONS
from insula.data.texts import says_nothing
from insula.errors import DatasetError

STATES = ((STATE,), ("state",), ("states",), ("joint_position", "gripper_position"), ("qpos",), ("observation.qpos",))
"""What a state is called, the first that is there: by LeRobot, by openpi (LIBERO, DROID) and by ALOHA's tools."""
ACTIONS = ((ACTION,), ("actions",))
WRIST, LEFT, RIGHT = r"wrist|hand|gripper|eef?\b", "left", "right"
INSTRUCTION = re.compile(r"instruction|language|task_description|annotation|prompt|caption", re.IGNORECASE)
LISTED_VALUES = 256
"""A column of more numbers than this in a frame is a picture or a point cloud, no state."""


@dataclass(frozen=True)
class _Guess:
    """The columns of the state or the actions; none, and why."""

    columns: tuple[str, ...]
    why: str = ""


def describe(root: Path, cameras: tuple[str, ...]) -> str:
    """TOML that `read_mapping` reads, for a model with `cameras`. Raises DatasetError where nothing looks like
    actions."""
    # Pictures are looked at once, to leave out black cameras: none is kept.
    dataset = LeRobotDataset(root, cache_bytes=0)
    info = dataset.info
    state = _guess(info, STATES, "observation.", "a state")
    actions = _guess(info, ACTIONS, "action", "actions")

    # Without a state a model still sees; without actions there is nothing to learn.
    if not actions.columns:
        numbers = ", ".join(_numeric(info)) or "none"
        raise DatasetError(f"data set {root}: {actions.why}; its columns of numbers: {numbers}")

    # A depth map or a dead camera would train without a word, so none is paired.
    unusable = unusable_cameras(dataset)
    usable = [key for key, feature in info.features.items() if feature.is_camera and key not in unusable]
    dims = {"state": _dims(info, state.columns), "action": _dims(info, actions.columns)}

    # The mapping alone does not train: the model must be as wide as this robot.
    sizes = " ".join(f"--model.{part}-dim {dim}" for part, dim in dims.items() if dim)
    kind = info.robot_type or "unknown robot"
    name = plain_name(root.resolve().name)
    lines = [
        f"# {kind}: {info.total_episodes} episodes, {info.total_frames} frames at {info.fps} fps, "
        f"{len(dataset.tasks)} tasks, {info.codebase_version}.",
        f"# insula train --data THIS_FILE --run RUN {sizes}",
        "",
        f"[robots.{name}]",
        f"path = {_text(str(root.resolve()))}",
        *_state(info, state, actions),
        _line("actions", _list(actions.columns), _names(info, actions.columns)),
        _line("delta", "[]", "action dimensions to learn relative to the state's dimension of the same number"),
        _line("normalization", '"quantiles"', "or min_max, mean_std, none"),
        _line("units", '{ state = "", actions = "" }', 'such as "rad; gripper 0 to 1": kept for whoever serves it'),
        _line("weight", "1.0", "how often it is drawn, relative to other entries"),
        *_instructions(dataset),
        *_subtasks(info),
        "",
        f"[robots.{name}.cameras]  # the model's name = the data set's",
        *_cameras(info, cameras, usable),
        *[f"# not used: {_text(key)}: {_one_line(why)}" for key, why in unusable.items()],
        *_unreadable(info),
    ]

    return "\n".join(lines) + "\n"


def pair_cameras(wanted: tuple[str, ...], usable: list[str]) -> dict[str, str]:
    """The feature for each of the model's cameras: its own name, else alike in wrist, left and right, else the next."""
    # Exact names first, for all cameras: else a mere likeness could take another one's own picture.
    exact = {camera: key for camera in wanted for key in usable if key in (IMAGES + camera, camera, f"{camera}_image")}
    left = [key for key in usable if key not in exact.values()]

    paired = dict(exact)
    for camera in wanted:
        if camera not in paired and left:
            best = max(left, key=lambda key: _likeness(camera, key))  # the first of equals
            paired[camera] = best
            left.remove(best)

    return {camera: paired[camera] for camera in wanted if camera in paired}


def _likeness(camera: str, key: str) -> int:
    # Powers of two: agreement about the wrist outweighs both sides together.
    marks = ((4, WRIST), (2, LEFT), (1, RIGHT))
    return sum(weight for weight, mark in marks if bool(re.search(mark, camera)) == bool(re.search(mark, key.lower())))


def _guess(info: Info, usual: tuple[tuple[str, ...], ...], prefix: str, what: str) -> _Guess:
    """The first of the usual columns, else all plain numbers that begin alike."""
    numeric = _numeric(info)
    for columns in usual:
        if all(column in numeric for column in columns):
            return _Guess(columns)

    # The right column is there and damaged: what is left would be taken for it, and train.
    broken = [c for columns in usual for c in columns if c in info.features and info.features[c].problem is not None]
    if broken:
        return _Guess((), f"{broken[0]!r} cannot be read ({info.features[broken[0]].problem})")

    # action_is_pad says which steps are real, and is no command.
    alike = tuple(key for key in numeric if key.startswith(prefix) and not key.endswith("is_pad"))

    return _Guess(alike, "" if alike else f"no column is called {usual[0][0]!r} or like it")


def _state(info: Info, state: _Guess, actions: _Guess) -> list[str]:
    """The line of the state; where there is none, the candidates to choose from."""
    if state.columns:
        return [_line("state", _list(state.columns), _names(info, state.columns))]

    # As comments: which one is the state, or none, only a person knows.
    candidates = [key for key in _numeric(info) if key not in actions.columns]
    choose = "choose one, or give an empty list" if candidates else "nor are other numbers; give an empty list"
    lines = [f"# state: {_one_line(state.why)}; {choose} for a model that sees images and the instruction alone"]

    return lines + [f"# {_line('state', _list((key,)), _names(info, (key,)))}" for key in candidates]


def _instructions(dataset: LeRobotDataset) -> list[str]:
    """Columns that may say what to do, instead of the task: texts, and numbers of the task table."""
    lines = []
    for key, feature in dataset.features.items():
        if feature.is_text:
            note = "a column of text, instead of the task"
        elif _is_whole(feature.dtype) and key in _numeric(dataset.info) and INSTRUCTION.search(key):
            # Whole numbers may be anything, so only a column that is called like an instruction is offered.
            note = "numbers of the task table, instead of the task"
        else:
            continue

        lines.append(f"# instruction = {_text(key)}{' ' * 10}# {note}")

    # Five are enough to see what they look like.
    if missing := [text for text in dataset.tasks if says_nothing(text)]:
        lines.append(f"# some tasks are no instruction: {', '.join(map(repr, missing[:5]))}")

    return lines


def _subtasks(info: Info) -> list[str]:
    """Columns that LeRobot keeps subtasks in, and those that are called so."""
    # As comments: a model trained on them says a subtask before it acts, which a person must want.
    found = [key for key, feature in info.features.items() if _may_hold_subtasks(key, feature)]
    note = "the step of the task at each frame, to be said before acting"
    return [f"# {_line('subtasks', _text(key), note)}" for key in found]


def _may_hold_subtasks(key: str, feature: Feature) -> bool:
    if key == ANNOTATIONS:
        return feature.is_language

    return "subtask" in key.lower() and (feature.is_text or (feature.is_numeric and _is_whole(feature.dtype)))


def _is_whole(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))


def _cameras(info: Info, wanted: tuple[str, ...], usable: list[str]) -> list[str]:
    paired = pair_cameras(wanted, usable)
    lines = []
    for camera in wanted:
        if camera in paired:
            feature = info.features[paired[camera]]
            height, width = feature.size
            lines.append(_line(camera, _text(paired[camera]), f"{height}×{width}, {feature.dtype}"))
        else:
            lines.append(f"# {camera}: no camera is left for it; the model gets a masked one")

    return lines + [f"# not used: {_text(key)}" for key in usable if key not in paired.values()]


def _unreadable(info: Info) -> list[str]:
    """Every column that nothing can be made of, with why."""
    broken = {
        key: feature.problem
        for key, feature in info.features.items()
        if feature.problem is not None and not _may_hold_subtasks(key, feature)
    }
    pictures = {
        key: f"{feature.dtype} values of shape {list(feature.shape)}: a picture written as numbers? Cameras are read "
        'from dtype "image" or "video" alone'
        for key, feature in info.features.items()
        if feature.is_numeric and len(feature.shape) == 3 and {feature.shape[0], feature.shape[2]} & {1, 3, 4}
    }
    return [f"# cannot be read: {_text(key)}: {_one_line(why)}" for key, why in broken.items()] + [
        f"# no camera: {_text(key)}: {why}" for key, why in pictures.items()
    ]


def _numeric(info: Info) -> list[str]:
    """Columns of numbers that could be a state or actions."""
    return [
        key
        for key, feature in info.features.items()
        if feature.is_numeric and key not in BOOKKEEPING and math.prod(feature.shape) <= LISTED_VALUES
    ]


def _dims(info: Info, columns: tuple[str, ...]) -> int:
    return sum(math.prod(info.features[key].shape) for key in columns)


def _names(info: Info, columns: tuple[str, ...]) -> str:
    names = [name for key in columns for name in info.features[key].names or [key]]
    return f"{_dims(info, columns)}: {', '.join(names)}"


def _list(columns: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_text, columns))}]"


def _text(value: str) -> str:
    # JSON's escapes are TOML's too, but TOML allows no bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _line(key: str, value: str, comment: str) -> str:
    return f"{f'{key} = {value}':<60}  # {_one_line(comment)}"


def _one_line(text: str) -> str:
    """Fit for a TOML comment, which ends at a line break and allows no control character."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
