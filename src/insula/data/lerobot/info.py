"""What a LeRobot data set says about itself in `meta/info.json`.

{"codebase_version": "v3.0", "fps": 10, "robot_type": "...", "total_frames": ..., "features": {
    "observation.images.front": {"dtype": "image", "shape": [64, 64, 3], "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": [5], "names": ["x", "y", "z", "yaw", "opening"]}, ...}}
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from insula.data.lerobot.metadata import read_object, shown, visible
from insula.errors import DatasetError, did_you_mean

VERSION = "v3.0"
"""What is written; `READABLE` is read."""
READABLE = ("v2.0", "v2.1", VERSION, "v3.1")
"""v3.1 is the name some tools give to v3.0 with LeRobot's annotations."""
NUMERIC = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
DTYPES = (*NUMERIC, "string", "image", "video")
LANGUAGE = "language"
"""The dtype of LeRobot's annotations: what was said about an episode, and from when on it holds."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VALUES_LIMIT = 2**20
"""Numbers of one column in one frame: more is a picture written as numbers, or a shape that cannot be meant."""
PIXELS_LIMIT = 2**26
CHANNELS = (1, 2, 3, 4)
"""That a picture may have: gray, gray with alpha, color, color with alpha. Only color is read."""
FPS_LIMITS = (1e-6, 1e6)
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


@dataclass(frozen=True)
class Feature:
    """One column: `dtype` (numpy's, "string", "image" or "video"), the `shape` of one frame, names of its parts.

    `names` has one name for each number of a frame (of a camera: for each axis), or is None. What meta/info.json says
    instead, and that it is left aside, is in `names_problem`. A feature with a `problem` cannot be read, and the
    problem says why; it is neither camera nor numbers, and matters to nobody who does not ask for it. `is_damaged`: it
    was recorded, and is spoiled, rather than of a kind that is not read; nobody may leave it out without being told to.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None
    problem: str | None = field(default=None, compare=False)
    names_problem: str | None = field(default=None, compare=False)
    is_damaged: bool = field(default=False, compare=False)

    @property
    def is_camera(self) -> bool:
        """Whether frames of it can be shown."""
        return self.dtype in ("image", "video") and self.problem is None

    @property
    def is_numeric(self) -> bool:
        """Whether it can be read as numbers."""
        return self.dtype in NUMERIC and self.problem is None

    @property
    def is_text(self) -> bool:
        """Whether it can be read as texts."""
        return self.dtype == "string" and self.problem is None

    @property
    def is_language(self) -> bool:
        """Whether it holds annotations, which are read as such and no other way (`LeRobotDataset.annotations`)."""
        return self.dtype == LANGUAGE

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a camera, whichever axis the channels are on."""
        # [3, h, w], as torch has it.
        channels_first = self.shape[0] in (1, 3) and self.shape[-1] not in (1, 3)
        height, width = self.shape[1:] if channels_first else self.shape[:2]
        return height, width

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "names": list(self.names) if self.names else None}


BOOKKEEPING = {
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}
"""Columns every data set has; the writer fills them in."""


def image_feature(height: int, width: int) -> Feature:
    return Feature("image", (height, width, 3), ("height", "width", "channels"))


@dataclass(frozen=True)
class Info:
    """The parsed `meta/info.json`."""

    codebase_version: str
    fps: float | int
    features: dict[str, Feature]
    total_episodes: int
    total_frames: int
    total_tasks: int
    robot_type: str | None = None
    data_path: str = DATA_PATH
    video_path: str | None = None
    chunks_size: int = 1000
    data_files_size_in_mb: float | int = 100

    @property
    def is_v3(self) -> bool:
        """Many episodes in a file, and tables that say where each begins; before, a file for each episode."""
        return self.codebase_version.startswith("v3.")

    @property
    def videos(self) -> tuple[str, ...]:
        """Cameras stored as video."""
        return tuple(name for name, feature in self.features.items() if feature.dtype == "video" and feature.is_camera)

    def to_json(self) -> dict[str, Any]:
        """Every key LeRobot writes, in its order."""
        return {
            "codebase_version": self.codebase_version,
            "robot_type": self.robot_type,
            "total_episodes": self.total_episodes,
            "total_frames": self.total_frames,
            "total_tasks": self.total_tasks,
            "chunks_size": self.chunks_size,
            "data_files_size_in_mb": self.data_files_size_in_mb,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{self.total_episodes}"},
            "data_path": self.data_path,
            "video_path": self.video_path,
            "features": {name: feature.to_json() for name, feature in self.features.items()},
        }


def read_info(root: Path) -> Info:
    """Read `root/meta/info.json`. Raises DatasetError naming the key that is missing or wrong."""
    path = root / "meta" / "info.json"
    if not _is_folder(root):
        raise DatasetError(f"no directory {root}; check the path, or make one with `insula collect`")

    try:
        raw = read_object(path)
    except FileNotFoundError:
        # What is there tells somebody who is one folder off where to go.
        found = ", ".join(entry.name for entry in visible(root)[:20]) or "nothing"
        raise DatasetError(
            f"data set {root}: no meta/info.json; expected the root of a LeRobot data set, found {found}"
        ) from None

    return parse_info(raw, str(path))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or holds a null byte
        return False


def parse_info(raw: Mapping[str, Any], where: str) -> Info:
    """`raw` as Info. Keys that later versions of the format add are left aside; known ones must be right. A feature
    that cannot be read is kept with its problem."""
    version = _get(raw, "codebase_version", str, where)
    if version not in READABLE:
        hint = did_you_mean(version if version.startswith("v") else f"v{version}", READABLE)
        raise DatasetError(
            f"{where}: codebase_version is {version[:40]!r}{hint}, this reader knows {', '.join(READABLE)}"
        )

    fps = _get(raw, "fps", (int, float), where)
    # Written so that NaN is refused too.
    if not FPS_LIMITS[0] <= fps <= FPS_LIMITS[1]:
        raise DatasetError(f"{where}: fps is {shown(fps)}, expected a positive number of frames per second, such as 30")

    robot_type = raw.get("robot_type")

    return Info(
        codebase_version=version,
        fps=fps,
        features=parse_features(_get(raw, "features", dict, where)),
        total_episodes=_count(raw, "total_episodes", where),
        total_frames=_count(raw, "total_frames", where),
        total_tasks=_count(raw, "total_tasks", where),
        robot_type=" ".join(robot_type.split()) if isinstance(robot_type, str) else None,
        data_path=_get(raw, "data_path", str, where),
        video_path=_get(raw, "video_path", str, where) if raw.get("video_path") is not None else None,
        chunks_size=_count(raw, "chunks_size", where, least=1) if raw.get("chunks_size") is not None else 1000,
    )


def parse_features(raw: Mapping[str, Any]) -> dict[str, Feature]:
    """Features by name. The bookkeeping columns are always among them: what is not stored can be counted."""
    features = {name: parse_feature(value) for name, value in raw.items()}
    for name, usual in BOOKKEEPING.items():
        # A column of another kind under such a name is not what it claims to be, and is counted instead.
        given = features.get(name, usual)
        features[name] = given if given.is_numeric and given.shape == (1,) else usual
    return features


def parse_feature(raw: Any) -> Feature:
    """Never an error: what is wrong is a problem of this feature alone."""
    if not isinstance(raw, dict) or not isinstance(raw.get("dtype"), str):
        return Feature("unknown", (), problem=f"meta/info.json says {shown(raw)}, expected dtype, shape and names")

    dtype, shape = raw["dtype"], raw.get("shape")
    if dtype == LANGUAGE:
        return Feature(dtype, (1,), problem='dtype is "language": annotations, which are read as subtasks alone')
    if dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES)
        return Feature(dtype, (), problem=f"dtype is {shown(dtype)}{hint}, known are {', '.join(DTYPES)}")

    if problem := _shape_problem(shape, dtype):
        return Feature(dtype, (), problem=f"shape is {shown(shape)}, {problem}")
    if dtype in ("image", "video") and (problem := _color_problem(shape or [], raw)):
        return Feature(dtype, tuple(shape or ()), problem=problem)

    # Texts often have the shape null.
    size = tuple(shape or (1,))
    names, names_problem = _names(raw.get("names"), size, is_camera=dtype in ("image", "video"))

    return Feature(dtype, size, names, names_problem=names_problem)


def _shape_problem(shape: Any, dtype: str) -> str | None:
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and n > 0 for n in shape):
        return "expected a list of positive integers"
    if dtype in ("image", "video"):
        if len(shape) != 3 or not {shape[0], shape[2]} & set(CHANNELS):
            return f"expected [height, width, channels] of 3 channels for an {dtype}"
        return f"at most {PIXELS_LIMIT:,} pixels are read" if math.prod(shape) > 3 * PIXELS_LIMIT else None

    if dtype == "string" and math.prod(shape) != 1:
        return "expected [1]: one text in a frame"

    return f"at most {VALUES_LIMIT:,} values of a frame are read" if math.prod(shape) > VALUES_LIMIT else None


def _color_problem(shape: list[int], raw: Mapping[str, Any]) -> str | None:
    """Why pictures are no 8-bit color, as far as meta/info.json says so. A depth map shown as color would be white
    beyond a quarter of a meter, where a millimeter is one step."""
    # Gray and depth have one channel; which of the two, nobody says.
    if 3 not in (shape[0], shape[2]):
        count = shape[2] if shape[2] in CHANNELS else shape[0]
        return f"pictures of {count} channel{'s' if count > 1 else ''} are not read, expected 3 (8-bit color)"

    said = raw.get("info") or raw.get("video_info")
    if not isinstance(said, dict):
        return None
    if any(said.get(key) is True for key in ("video.is_depth_map", "is_depth_map")):
        return "is a depth map, expected 8-bit color"

    form = said.get("video.pix_fmt")

    return f"is {form}, expected 8-bit color" if isinstance(form, str) and form.startswith("gray") else None


def _names(raw: Any, shape: tuple[int, ...], is_camera: bool) -> tuple[tuple[str, ...] | None, str | None]:
    """(names, why they are left aside). Recorders write a list, lists by part of the robot ({"motors": [...]}, or
    [[...], [...]]), or numbers by name ({"x": 0, "y": 1})."""
    if raw is None or raw == [] or raw == {}:
        return None, None
    if is_camera:
        is_plain = isinstance(raw, list) and len(raw) == 3 and all(isinstance(name, str) for name in raw)
        return (tuple(raw) if is_plain else None), None  # names of axes, which nobody reads

    # {"x": 0, "y": 1}: the numbers are positions.
    numbered = isinstance(raw, dict) and sorted(map(str, raw.values())) == sorted(map(str, range(len(raw))))
    flat = sorted(raw, key=lambda name: int(raw[name])) if numbered else _flat(raw)
    count = math.prod(shape)
    # Whole numbers are taken for names: motors are often called 1, 2, 3.
    if any(not isinstance(name, str | int) or isinstance(name, bool) for name in flat):
        return None, f"names are {shown(raw)}, expected texts; they are left aside"
    if len(flat) != count:
        # ["height", "width", "channels"] on a column of numbers names its axes.
        if len(shape) > 1 and len(flat) == len(shape):
            return None, None  # one for each axis, as cameras have: no names of numbers, and no mistake
        return None, f"{len(flat)} names for {count} dimensions; they are left aside"

    return tuple(str(name) for name in flat), None


def _flat(raw: Any) -> list[Any]:
    """Everything in nested lists and tables, in order. No recursion: files may nest as deep as they like."""
    found: list[Any] = []
    waiting = [raw]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += reversed(value.values())
        elif isinstance(value, list):
            waiting += reversed(value)
        else:
            found.append(value)

    return found


def pick(name: str, features: Iterable[str], what: str, where: object) -> str:
    """`name` when it is one of `features`. Raises DatasetError with the nearest name otherwise."""
    known = list(features)
    if name not in known:
        hint = did_you_mean(name, known)
        raise DatasetError(f"{where}: no {what} {name!r}{hint}; it has {', '.join(known[:50]) or 'none'}")

    return name


def _get(raw: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in raw:
        raise DatasetError(f"{where}: key {key!r} is missing{did_you_mean(key, raw)}")

    value = raw[key]
    # In Python true is an int.
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DatasetError(f"{where}: {key!r} is {shown(value)}, expected {expected}")

    return value


def _count(raw: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    value = _get(raw, key, int, where)
    if value < least:
        raise DatasetError(f"{where}: {key!r} is {shown(value)}, expected {'a count' if least == 0 else 'at least 1'}")
    return value
