"""`insula data describe`: a mapping for a data set, guessed from what it says about itself, ready to be corrected."""

import json
import re
from pathlib import Path

from insula.data.lerobot.info import BOOKKEEPING, Feature, Info
from insula.data.lerobot.layout import read_layout
from insula.data.mapping import ACTION, IMAGES, STATE, plain_name
from insula.errors import DatasetError

WRIST, LEFT, RIGHT = r"wrist|hand|gripper|eef?\b", "left", "right"


def describe(root: Path, cameras: tuple[str, ...]) -> str:
    """TOML that `read_mapping` reads, for a model with `cameras`. Raises DatasetError where nothing looks like
    actions."""
    layout = read_layout(root)
    info = layout.info
    state, actions = _columns(info, STATE, "observation."), _columns(info, ACTION, "action")
    if not actions:
        numbers = ", ".join(_numeric(info)) or "none"
        raise DatasetError(f"data set {root}: no column is called {ACTION!r} or like it; its numbers: {numbers}")
    paired = pair_cameras(cameras, info)
    name = plain_name(root.resolve().name)
    dims = {"state": _dims(info, state), "action": _dims(info, actions)}
    sizes = " ".join(f"--model.{part}-dim {dim}" for part, dim in dims.items() if dim)
    texts = [key for key, feature in info.features.items() if feature.is_text]
    kind = info.robot_type or "unknown robot"
    lines = [
        f"# {kind}: {info.total_episodes} episodes, {info.total_frames} frames at {info.fps} fps, "
        f"{len(layout.tasks)} tasks, {info.codebase_version}.",
        f"# insula train --data THIS_FILE --run RUN {sizes}",
        "",
        f"[robots.{name}]",
        f"path = {_text(str(root.resolve()))}",
        _line("state", _list(state), _names(info, state) or "none found: the model sees images and the instruction"),
        _line("actions", _list(actions), _names(info, actions)),
        _line("delta", "[]", "action dimensions to learn relative to the state's dimension of the same number"),
        _line("normalization", '"quantiles"', "or min_max, mean_std, none"),
        _line("units", '{ state = "", actions = "" }', 'such as "rad; gripper 0 to 1": kept for whoever serves it'),
        _line("weight", "1.0", "how often it is drawn, relative to other entries"),
        *[f"# instruction = {_text(key)}{' ' * 10}# a column of text, instead of the task" for key in texts],
        "",
        f"[robots.{name}.cameras]  # the model's name = the data set's",
    ]
    for camera in cameras:
        if camera in paired:
            height, width = info.features[paired[camera]].size
            dtype = info.features[paired[camera]].dtype
            lines.append(_line(camera, _text(paired[camera]), f"{height}×{width}, {dtype}"))
        else:
            lines.append(f"# {camera}: no camera is left for it; the model gets a masked one")
    unused = [key for key, feature in info.features.items() if feature.is_camera and key not in paired.values()]
    lines += [f"# not used: {key}" for key in unused]
    broken = {key: feature.problem for key, feature in info.features.items() if feature.problem is not None}
    lines += [f"# cannot be read: {_text(key)}: {' '.join(problem.split())}" for key, problem in broken.items()]
    return "\n".join(lines) + "\n"


def pair_cameras(wanted: tuple[str, ...], info: Info) -> dict[str, str]:
    """The feature for each of the model's cameras: its own name, else alike in wrist, left and right, else the next."""
    left = [key for key, feature in info.features.items() if feature.is_camera]
    exact = {camera: IMAGES + camera for camera in wanted if IMAGES + camera in left}
    left = [key for key in left if key not in exact.values()]
    paired = dict(exact)
    for camera in wanted:
        if camera not in paired and left:
            best = max(left, key=lambda key: _likeness(camera, key))  # the first of equals
            paired[camera] = best
            left.remove(best)
    return {camera: paired[camera] for camera in wanted if camera in paired}


def _likeness(camera: str, key: str) -> int:
    marks = ((4, WRIST), (2, LEFT), (1, RIGHT))
    return sum(weight for weight, mark in marks if bool(re.search(mark, camera)) == bool(re.search(mark, key.lower())))


def _columns(info: Info, usual: str, prefix: str) -> list[str]:
    """The usual column, else all of numbers that begin alike."""
    numeric = _numeric(info)
    return [usual] if usual in numeric else [key for key in numeric if key.startswith(prefix)]


def _numeric(info: Info) -> list[str]:
    return [key for key, feature in info.features.items() if feature.is_numeric and key not in BOOKKEEPING]


def _size(feature: Feature) -> int:
    size = 1
    for n in feature.shape:
        size *= n
    return size


def _dims(info: Info, columns: list[str]) -> int:
    return sum(_size(info.features[key]) for key in columns)


def _names(info: Info, columns: list[str]) -> str:
    if not columns:
        return ""
    names = [name for key in columns for name in info.features[key].names or [key]]
    return f"{_dims(info, columns)}: {', '.join(names)}"


def _list(columns: list[str]) -> str:
    return f"[{', '.join(map(_text, columns))}]"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _line(key: str, value: str, comment: str) -> str:
    return f"{f'{key} = {value}':<60}  # {' '.join(comment.split())}"
