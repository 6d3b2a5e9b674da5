"""Which cameras of a data set can teach anything: what `insula data describe` pairs with the model's.

A depth map, a camera without files and one that is always black are features like any other, and a model trains on them
without a word.
"""

import re

import numpy as np

from insula.data.lerobot.metadata import read_object
from insula.data.lerobot.reader import LeRobotDataset
from insula.errors import DatasetError

DEPTH = re.compile(r"depth|disparity|point_?cloud|segmentation|\bmask\b", re.IGNORECASE)
BLACK = 8
"""The brightest value of a picture that counts as black: what a codec makes of zero."""
EPISODES_LOOKED_AT = 4


def unusable_cameras(dataset: LeRobotDataset) -> dict[str, str]:
    """Cameras by name, with why nothing can be learned from them. Decodes a few pictures of each."""
    raw = read_object(dataset.root / "meta" / "info.json")["features"]
    reasons = {key: _reason(dataset, key, raw[key]) for key in dataset.cameras}
    return {key: reason for key, reason in reasons.items() if reason is not None}


def sample_frames(dataset: LeRobotDataset, episode: int, count: int) -> np.ndarray:
    """At most `count` frames of an episode, spread evenly from its first to its last."""
    first, last = int(dataset.episodes.start[episode]), int(dataset.episodes.stop[episode]) - 1
    return np.unique(np.linspace(first, last, count).astype(np.int64))


def _reason(dataset: LeRobotDataset, key: str, raw: dict) -> str | None:
    feature = dataset.features[key]
    if DEPTH.search(key) or _says_depth(raw):
        return "a depth map or mask, no color picture"
    if 3 not in (feature.shape[0], feature.shape[-1]):
        return f"pictures of shape {list(feature.shape)}, not of three colors"

    if feature.dtype == "video":
        paths = [dataset.clip(key, episode).path for episode in range(len(dataset.episodes))]
        missing = sorted({path for path in paths if not path.is_file()})
        if missing:
            return f"{len(missing)} of its files are missing, such as {missing[0].relative_to(dataset.root)}"

    # Many cameras are black until the first command, so the first frame alone says nothing.
    count = min(EPISODES_LOOKED_AT, len(dataset.episodes))
    episodes = np.unique(np.linspace(0, len(dataset.episodes) - 1, count).astype(int)).tolist()
    frames = np.concatenate([sample_frames(dataset, episode, 3) for episode in episodes])
    try:
        pictures = dataset.images(key, frames)
    except DatasetError as error:
        return str(error)
    return f"black in all of {len(frames)} pictures looked at" if pictures.max() <= BLACK else None


def _says_depth(raw: dict) -> bool:
    """LeRobot marks depth in the feature's info, under a key of its own or one of the video's."""
    told = [raw, raw.get("info"), raw.get("video_info")]
    keys = ("is_depth_map", "video.is_depth_map")
    return any(isinstance(part, dict) and any(part.get(key) is True for key in keys) for part in told)
