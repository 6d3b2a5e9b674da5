"""From a data set to batches: everything that need not be done in the training loop is done once, here.

A sample is one frame: the images and state then, the instruction, and the chunk of the next H actions:

    frame           t   t+1  t+2 | end of the episode
    chunk (H = 5)   a_t a_t+1 a_t+2 a_t+2 a_t+2         clamped at the last action
    action_is_pad    0    0    0     1     1            no flow loss there
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np

from insula.batch import Batch, Observation
from insula.data import normalise
from insula.data.lerobot_reader import LeRobotDataset
from insula.data.normalise import NormStats
from insula.data.schema import DatasetError
from insula.tokens.fast import FASTRangeError
from insula.tokens.sequence import FASTTokenizer, TokenBudgetError, Tokenized

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
ACTION_CLIP = 2.0
"""Normalised actions are clipped to ± this, for both losses alike. 98 % of them are inside ±1, a Gaussian's four
deviations inside ±1.7: only outliers are touched, which would cost many FAST tokens and dominate a squared error."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples, tokenised and normalised; images are read from the data set when a batch is made.

    frames [N]: the data set's frame of each sample; stop [N]: one past its episode's last frame; state float32 [N, S];
    actions float32 [frames, D] of the whole data set; tokens int32 [N, L] and the three masks bool [N, L].
    dropped: samples whose token loss was given up; clipped: fraction of action values beyond ACTION_CLIP.
    """

    dataset: LeRobotDataset
    cameras: dict[str, str]
    horizon: int
    frames: np.ndarray
    stop: np.ndarray
    state: np.ndarray
    actions: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    ar_mask: np.ndarray
    loss_mask: np.ndarray
    dropped: int
    clipped: float

    def __len__(self) -> int:
        return len(self.frames)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The samples `indices` [B] as one Batch of numpy arrays."""
        rows = np.asarray(indices, np.int64)
        frames = self.frames[rows]
        chunk, is_pad = chunk_indices(frames, self.stop[rows], self.horizon)
        observation: dict[str, Any] = {
            "images": {name: self.dataset.images(key, frames) for name, key in self.cameras.items()},
            "image_mask": {name: np.ones(len(rows), bool) for name in self.cameras},
            "state": self.state[rows],
            "tokens": self.tokens[rows],
            "token_mask": self.token_mask[rows],
        }
        targets: dict[str, Any] = {
            "actions": self.actions[chunk],
            "action_is_pad": is_pad,
            "action_dim_mask": np.ones((len(rows), self.actions.shape[1]), bool),
            "ar_mask": self.ar_mask[rows],
            "loss_mask": self.loss_mask[rows],
        }
        return Batch(Observation(**observation), **targets)

    @property
    def action_tokens(self) -> np.ndarray:
        """How many tokens each sample is scored on, int [N]."""
        return self.loss_mask.sum(1)


def prepare(
    dataset: LeRobotDataset,
    tokenizer: FASTTokenizer,
    stats: Mapping[str, NormStats],
    horizon: int,
    cameras: Sequence[str] | Mapping[str, str],
    on_overflow: Literal["error", "drop_token_loss"] = "error",
    episodes: Iterable[SupportsIndex] | None = None,
    *,
    state_in_prompt: bool = True,
    state_key: str = STATE,
    action_key: str = ACTION,
) -> Samples:
    """Tokenise and normalise every frame of `episodes` (all by default). `stats` holds "state" and "actions".

    `cameras` maps the model's names to features; a plain sequence of names means "observation.images.<name>".
    A chunk whose tokens do not fit raises DatasetError naming episode, frame, length and limit; with "drop_token_loss"
    that sample keeps its prompt and flow loss and loses its token loss, counted in `dropped` and logged. A prompt that
    does not fit is always an error.
    """
    if on_overflow not in ("error", "drop_token_loss"):
        raise ValueError(f"on_overflow: got {on_overflow!r}, expected 'error' or 'drop_token_loss'")
    if horizon < 1:
        raise ValueError(f"horizon: got {horizon}, expected at least 1 step")
    chosen = named_cameras(dataset, cameras)
    chosen_episodes = _checked_episodes(dataset, episodes)
    frames, stop = _frames(dataset, chosen_episodes)
    state = _normalised(dataset, stats, "state", state_key)[frames]
    actions, clipped = _clip(_normalised(dataset, stats, "actions", action_key))
    tokenized, dropped = _tokenise(
        dataset, tokenizer, frames, stop, state if state_in_prompt else None, actions, horizon, on_overflow
    )
    if dropped:
        log.warning("%d of %d samples have no token loss: their action tokens exceed the limit", dropped, len(frames))
    if clipped:
        log.info("%.3f %% of the normalised action values were clipped to ±%g", 100 * clipped, ACTION_CLIP)
    return Samples(dataset, chosen, horizon, frames, stop, state, actions, *tokenized, dropped=dropped, clipped=clipped)


def fit_stats(
    dataset: LeRobotDataset,
    episodes: Iterable[SupportsIndex] | None = None,
    state_key: str = STATE,
    action_key: str = ACTION,
) -> dict[str, NormStats]:
    """{"state": ..., "actions": ...} over the frames of `episodes` (all by default)."""
    frames, _ = _frames(dataset, _checked_episodes(dataset, episodes))
    return {
        name: normalise.fit(dataset.column(key)[frames], dataset.feature(key).names, key)
        for name, key in (("state", state_key), ("actions", action_key))
    }


def action_chunks(
    dataset: LeRobotDataset,
    stats: Mapping[str, NormStats],
    horizon: int,
    episodes: Iterable[SupportsIndex] | None = None,
    limit: int | None = None,
    action_key: str = ACTION,
) -> np.ndarray:
    """Chunks float32 [N, H, D], exactly as `prepare` tokenises them: what FASTCodec.fit wants.

    With `limit`, that many spread evenly over the frames.
    """
    frames, stop = _frames(dataset, _checked_episodes(dataset, episodes))
    if limit is not None and limit < len(frames):
        rows = np.linspace(0, len(frames) - 1, limit).astype(np.int64)
        frames, stop = frames[rows], stop[rows]
    actions, _ = _clip(_normalised(dataset, stats, "actions", action_key))
    return actions[chunk_indices(frames, stop, horizon)[0]]


def split_episodes(n: int, held_out_fraction: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(train, held-out) episode numbers, each sorted: a frame is never held out from its own episode.

    At least one episode is held out when the fraction is positive. Raises ValueError when none is left to train on.
    """
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction: got {held_out_fraction}, expected at least 0 and below 1")
    held_out = int(np.ceil(n * held_out_fraction))
    if n - held_out < 1:
        raise ValueError(f"held_out_fraction {held_out_fraction} of {n} episodes leaves none to train on; collect more")
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def chunk_indices(frames: np.ndarray, stop: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Frame indices [N, H] of each chunk, clamped before `stop` [N], and where they were clamped, bool [N, H]."""
    steps = frames[:, None] + np.arange(horizon)
    return np.minimum(steps, stop[:, None] - 1), steps >= stop[:, None]


def named_cameras(dataset: LeRobotDataset, cameras: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """{model's name: feature}. Raises DatasetError when a feature is missing or is no camera."""
    pairs = dict(cameras) if isinstance(cameras, Mapping) else {name: IMAGES + name for name in cameras}
    for key in pairs.values():
        if not dataset.feature(key).is_camera:
            have = ", ".join(dataset.cameras) or "none"
            raise DatasetError(f"data set {dataset.root}: {key!r} is no camera; its cameras: {have}")
    return pairs


def _checked_episodes(dataset: LeRobotDataset, episodes: Iterable[SupportsIndex] | None) -> np.ndarray:
    count = len(dataset.episodes)
    chosen = np.arange(count) if episodes is None else np.asarray(list(episodes), np.int64)
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if not len(chosen) or len(outside):
        what = f"episode {outside[0]} does not exist" if len(outside) else "no episode was chosen"
        raise DatasetError(f"data set {dataset.root}: {what}; it has episodes 0 to {count - 1}")
    return chosen


def _frames(dataset: LeRobotDataset, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frames [N], one past the last frame of each one's episode [N])."""
    start, stop = dataset.episodes.start[episodes], dataset.episodes.stop[episodes]
    frames = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)])
    return frames, np.repeat(stop, stop - start)


def _normalised(dataset: LeRobotDataset, stats: Mapping[str, NormStats], name: str, key: str) -> np.ndarray:
    values, feature = dataset.column(key), dataset.feature(key)
    if name not in stats:
        raise ValueError(f"statistics: no {name!r}; expected 'state' and 'actions', got {', '.join(stats) or 'none'}")
    values = values.reshape(len(values), -1)
    if values.shape[1] != stats[name].dim:
        raise ValueError(
            f"statistics of {name!r} have {stats[name].dim} dimensions, feature {key!r} of {dataset.root} has "
            f"{values.shape[1]}; fit them on this data set"
        )
    normalise.refuse_non_finite(values, feature.names, f"data set {dataset.root}, {key!r}")
    return stats[name].normalise(values)


def _clip(actions: np.ndarray) -> tuple[np.ndarray, float]:
    return np.clip(actions, -ACTION_CLIP, ACTION_CLIP), float((np.abs(actions) > ACTION_CLIP).mean())


def _tokenise(
    dataset: LeRobotDataset,
    tokenizer: FASTTokenizer,
    frames: np.ndarray,
    stop: np.ndarray,
    state: np.ndarray | None,
    actions: np.ndarray,
    horizon: int,
    on_overflow: str,
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]:
    """(tokens, token_mask, ar_mask, loss_mask), each [N, L], and how many samples lost their token loss."""
    tokens = np.zeros((len(frames), tokenizer.max_token_len), np.int32)
    masks = np.zeros((3, *tokens.shape), bool)
    task = _task_of(dataset, frames)
    chunks, _ = chunk_indices(frames, stop, horizon)
    dropped = 0
    for n in range(len(frames)):
        prompt, now = dataset.tasks[task[n]], None if state is None else state[n]
        try:
            sample = tokenizer.tokenize(prompt, now, actions[chunks[n]])
        except (TokenBudgetError, FASTRangeError) as e:
            hopeless = isinstance(e, TokenBudgetError) and e.part == "prompt"
            if hopeless or on_overflow == "error":
                raise _overflow(dataset, int(frames[n]), prompt, e, hopeless) from e
            sample, dropped = tokenizer.tokenize(prompt, now), dropped + 1
        _put(sample, tokens[n], masks[:, n])
    return (tokens, *masks), dropped


def _put(sample: Tokenized, tokens: np.ndarray, masks: np.ndarray) -> None:
    tokens[:] = sample.tokens
    masks[0], masks[1], masks[2] = sample.token_mask, sample.ar_mask, sample.loss_mask


def _task_of(dataset: LeRobotDataset, frames: np.ndarray) -> np.ndarray:
    task = dataset.column("task_index")[frames]
    outside = np.flatnonzero((task < 0) | (task >= len(dataset.tasks)))
    if len(outside):
        raise DatasetError(
            f"data set {dataset.root}: frame {frames[outside[0]]} has task_index {task[outside[0]]}, "
            f"meta/tasks.parquet has 0 to {len(dataset.tasks) - 1}"
        )
    return task


def _overflow(dataset: LeRobotDataset, frame: int, prompt: str, cause: ValueError, hopeless: bool) -> DatasetError:
    episode, step = dataset.episodes.locate(frame)
    way = "" if hopeless else "; or keep such samples for the flow loss only: on_overflow='drop_token_loss'"
    return DatasetError(f"data set {dataset.root}, episode {episode}, frame {step} ({prompt!r}): {cause}{way}")
