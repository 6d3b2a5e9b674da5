"""What a LeRobot data set says about itself in `meta/info.json`.

{"codebase_version": "v3.0", "fps": 10, "robot_type": "...", "total_frames": ..., "features": {
    "observation.images.front": {"dtype": "image", "shape": [64, 64, 3], "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": [5], "names": ["x", "y", "z", "yaw", "opening"]}, ...}}
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from insula.errors import DatasetError, did_you_mean

VERSION = "v3.0"
"""What is written; `READABLE` is read."""
READABLE = ("v2.0", "v2.1", VERSION)
NUMERIC = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
DTYPES = (*NUMERIC, "string", "image", "video")
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


@dataclass(frozen=True)
class Feature:
    """One column: `dtype` (numpy's, "string", "image" or "video"), the `shape` of one frame, names of its parts."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("image", "video")

    @property
    def is_numeric(self) -> bool:
        return self.dtype in NUMERIC

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a camera, whichever axis the channels are on."""
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
    def videos(self) -> tuple[str, ...]:
        """Cameras stored as video."""
        return tuple(name for name, feature in self.features.items() if feature.dtype == "video")

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
    if not root.is_dir():
        raise DatasetError(f"data set: no directory {root}; check the path, or make one with `insula collect`")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = ", ".join(sorted(p.name for p in root.iterdir())) or "nothing"
        raise DatasetError(
            f"data set {root}: no meta/info.json; expected the root of a LeRobot data set, found {found}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DatasetError(f"{path}: not readable as JSON ({e}); restore it from the data set's source") from None
    if not isinstance(raw, dict):
        raise DatasetError(f"{path}: got a JSON {type(raw).__name__}, expected an object (codebase_version, fps, ...)")
    return parse_info(raw, str(path))


def parse_info(raw: Mapping[str, Any], where: str) -> Info:
    """`raw` as Info. Keys that later versions of the format add are left aside; known ones must be right."""
    version = _get(raw, "codebase_version", str, where)
    if version not in READABLE:
        raise DatasetError(f"{where}: codebase_version is {version!r}, this reader knows {', '.join(READABLE)}")
    features = {k: parse_feature(v, f"{where}: features[{k!r}]") for k, v in _get(raw, "features", dict, where).items()}
    missing = [name for name in BOOKKEEPING if name not in features]
    if missing:
        hint = did_you_mean(missing[0], features)
        raise DatasetError(f"{where}: features lack {', '.join(missing)}{hint}; every LeRobot data set has them")
    fps = _get(raw, "fps", (int, float), where)
    if not fps > 0:
        raise DatasetError(f"{where}: fps is {fps}, expected a positive number of frames per second")
    return Info(
        codebase_version=version,
        fps=fps,
        features=features,
        total_episodes=_count(raw, "total_episodes", where),
        total_frames=_count(raw, "total_frames", where),
        total_tasks=_count(raw, "total_tasks", where),
        robot_type=raw.get("robot_type"),
        data_path=_get(raw, "data_path", str, where),
        video_path=raw.get("video_path"),
        chunks_size=int(raw.get("chunks_size", 1000)),
        data_files_size_in_mb=raw.get("data_files_size_in_mb", 100),
    )


def parse_feature(raw: Any, where: str) -> Feature:
    if not isinstance(raw, dict):
        raise DatasetError(f"{where}: got {raw!r}, expected an object with dtype, shape and names")
    dtype = _get(raw, "dtype", str, where)
    if dtype not in DTYPES:
        raise DatasetError(f"{where}: dtype is {dtype!r}{did_you_mean(dtype, DTYPES)}, known are {', '.join(DTYPES)}")
    shape = _get(raw, "shape", list, where)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise DatasetError(f"{where}: shape is {shape}, expected a list of positive integers")
    if dtype in ("image", "video") and (len(shape) != 3 or not {shape[0], shape[2]} & {1, 3}):
        raise DatasetError(f"{where}: shape is {shape}, expected [height, width, channels] for an {dtype}")
    return Feature(dtype, tuple(shape), _names(raw.get("names")))


def _names(raw: Any) -> tuple[str, ...] | None:
    """Names are null, a list, or (older recorders) {"motors": [...]}; others carry no meaning for us."""
    if isinstance(raw, dict) and len(raw) == 1:
        raw = next(iter(raw.values()))
    return tuple(map(str, raw)) if isinstance(raw, list) and raw else None


def pick(name: str, features: Iterable[str], what: str, where: object) -> str:
    """`name` when it is one of `features`. Raises DatasetError with the nearest name otherwise."""
    known = list(features)
    if name not in known:
        hint = did_you_mean(name, known)
        raise DatasetError(f"{where}: no {what} {name!r}{hint}; it has {', '.join(known) or 'none'}")
    return name


def _get(raw: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in raw:
        raise DatasetError(f"{where}: key {key!r} is missing{did_you_mean(key, raw)}")
    value = raw[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DatasetError(f"{where}: {key!r} is {value!r}, expected {expected}")
    return value


def _count(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = _get(raw, key, int, where)
    if value < 0:
        raise DatasetError(f"{where}: {key!r} is {value}, expected a count")
    return value
