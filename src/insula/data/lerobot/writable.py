"""What a feature and an episode must be to be written."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from insula.data.images import EncodedImages, EncodedVideo, encode_pngs
from insula.data.lerobot.info import BOOKKEEPING, Feature, pick
from insula.data.texts import says_nothing
from insula.errors import DatasetError, InputError

Encoded = EncodedImages | EncodedVideo
Values = np.ndarray | Sequence[Any] | Encoded


def checked_features(features: Mapping[str, Feature]) -> dict[str, Feature]:
    for name, feature in features.items():
        if name in BOOKKEEPING:
            raise InputError(f"feature {name!r} is filled in by the writer; leave it out")
        if not name or "/" in name:
            raise InputError(f"feature {name!r}: a name must not be empty nor contain '/'")
        if not feature.is_camera and len(feature.shape) != 1:
            raise InputError(f"feature {name!r}: got shape {feature.shape}, expected one axis; flatten it first")
        if feature.names is not None and not feature.is_camera and len(feature.names) != feature.shape[0]:
            raise InputError(f"feature {name!r}: {len(feature.names)} names for {feature.shape[0]} dimensions")

    if not features:
        raise InputError("features: got none, expected at least one column")

    return dict(features)


def check_episode(frames: Mapping[str, Values], features: Mapping[str, Feature], episode: int) -> int:
    """The number of frames. Every feature is there, and nothing else."""
    where = f"episode {episode}"
    for name in frames:
        pick(name, features, "feature", where)
    missing = [name for name in features if name not in frames]
    if missing:
        raise DatasetError(f"{where}: lacks {', '.join(missing)}")

    lengths = {k: len(v) for k, v in frames.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DatasetError(f"{where}: features differ in length or are empty: {lengths}")

    return next(iter(lengths.values()))


def checked(name: str, feature: Feature, values: Values, steps: int, episode: int) -> Any:
    """`values` in the feature's dtype and shape: EncodedImages, numpy [T] (shape (1,)) or [T, D], or strings."""
    where = f"episode {episode}, feature {name!r}"
    if feature.is_camera:
        if (feature.dtype == "video") != isinstance(values, EncodedVideo):
            raise DatasetError(f"{where}: got {type(values).__name__} for a camera stored as {feature.dtype}")
        encoded = values if isinstance(values, Encoded) else encode_pngs(values)
        if encoded.size != feature.size:
            raise DatasetError(f"{where}: got images of {encoded.size}, expected {feature.size} (height, width)")
        return encoded

    if isinstance(values, Encoded):
        raise DatasetError(f"{where}: got images, expected {feature.dtype}{list(feature.shape)}")
    if feature.dtype == "string":
        return [None if value is None else str(value) for value in values]

    # Widening is fine; cutting floats to integers is not.
    array = np.asarray(values)
    if not np.can_cast(array.dtype, feature.dtype, "same_kind"):
        raise DatasetError(f"{where}: got {array.dtype}, expected {feature.dtype}")
    if array.shape not in ((steps, *feature.shape), (steps,) if feature.shape == (1,) else ()):
        raise DatasetError(f"{where}: got shape {array.shape}, expected {(steps, *feature.shape)}")

    return array.astype(feature.dtype).reshape((steps,) if feature.shape == (1,) else (steps, *feature.shape))


def check_subtasks(
    subtasks: str | Sequence[str] | None, features: Mapping[str, Feature], episode: int, column: str
) -> None:
    """Raises InputError where `column`, which subtasks are written to, is a feature of its own, DatasetError for a
    subtask that says nothing."""
    if subtasks is None:
        return

    if column in features:
        raise InputError(f"feature {column!r} is filled in from the subtasks; leave out one of the two")
    for frame, text in enumerate([subtasks] if isinstance(subtasks, str) else subtasks):
        if says_nothing(text):
            raise DatasetError(f"episode {episode}, frame {frame}: the subtask is {text!r}, expected what to do there")


def numbered(texts: str | Sequence[str], known: dict[str, int], steps: int, episode: int, what: str) -> np.ndarray:
    """The number of each frame's text, int64 [steps]; those that are new are added to `known`. `texts`: one, or one for
    each frame. Raises DatasetError for another count."""
    each = [texts] * steps if isinstance(texts, str) else list(texts)
    if len(each) != steps:
        raise DatasetError(f"episode {episode}: {len(each)} {what} for {steps} frames, expected one or one for each")

    for text in dict.fromkeys(each):  # in order, each once
        known.setdefault(text, len(known))
    return np.array([known[text] for text in each])
