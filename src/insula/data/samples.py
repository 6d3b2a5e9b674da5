"""The samples of one robot data set, each padded to what the model reads.

A sample is one frame: the images and state then, the instruction, and the chunk of the next H actions. What this robot
lacks of the model's sizes is padded and masked: cameras (`image_mask`), action dimensions (`action_dim_mask`), steps
past the robot's horizon (`action_is_pad`), state dimensions (zeros).
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, SupportsIndex

import numpy as np

from insula.batch import Batch, Observation
from insula.data.chunks import check_delta, chosen_episodes, chunk_indices, dim_names, frames_of, joined, named_cameras
from insula.data.config import TokenOverflow
from insula.data.fitting import refuse_non_finite
from insula.data.images import resize_with_pad
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import RobotData
from insula.data.robot import Robot
from insula.errors import DatasetError, FASTRangeError, InputError, TokenBudgetError
from insula.tokens.sequence import FASTTokenizer, Tokenized

EAGER = 200_000
"""Up to so many samples are tokenized before training, so that an overlong one is known then; of more, those spread
evenly, and the others when they are drawn."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What every sample of a run is padded to. `cameras`: (height, width) of each of the model's."""

    horizon: int
    state_dim: int
    action_dim: int
    cameras: dict[str, tuple[int, int]]


class TokenTable:
    """Token sequences of N samples, filled in when first asked for: tokens int32 [N, L] and three masks bool [N, L].
    Rows nobody asks for cost no memory."""

    FIELDS = ("tokens", "token_mask", "ar_mask", "loss_mask")

    def __init__(self, size: int, length: int):
        self.known = np.zeros(size, bool)
        self.tokens = np.zeros((size, length), np.int32)
        self.token_mask, self.ar_mask, self.loss_mask = (np.zeros((size, length), bool) for _ in range(3))

    def put(self, row: int, sample: Tokenized) -> None:
        for name in self.FIELDS:
            getattr(self, name)[row] = getattr(sample, name)
        self.known[row] = True


class Samples:
    """N samples of a robot, `batch(rows)` makes a Batch of them.

    frames [N]: the data set's frame of each; stop [N]: one past its episode's last frame; dropped: samples seen so far
    whose token loss was given up; quarantined: frames left out because a number in them is NaN.

    A chunk whose tokens do not fit raises DatasetError naming episode, frame, length and limit; with "drop_token_loss"
    that sample keeps its prompt and flow loss and loses its token loss, counted in `dropped` and logged. A prompt that
    does not fit is always an error. NaN and infinity in state or actions are errors as well, or, with
    `skip_non_finite`, those samples are left out, counted and logged.
    """

    def __init__(
        self,
        data: RobotData,
        robot: Robot,
        tokenizer: FASTTokenizer,
        sizes: Sizes,
        episodes: Iterable[SupportsIndex] | None = None,
        on_overflow: TokenOverflow = "error",
        *,
        state_in_prompt: bool = True,
        skip_non_finite: bool = False,
        dataset: LeRobotDataset | None = None,
    ):
        self._rebuild = partial(
            Samples,
            data,
            robot,
            tokenizer,
            sizes,
            episodes,
            on_overflow,
            state_in_prompt=state_in_prompt,
            skip_non_finite=skip_non_finite,
        )
        if on_overflow not in ("error", "drop_token_loss"):
            raise InputError(f"on_overflow: got {on_overflow!r}, expected 'error' or 'drop_token_loss'")
        self.dataset = dataset or LeRobotDataset(data.path)
        self.data, self.robot, self.tokenizer, self.sizes = data, robot, tokenizer, sizes
        self.on_overflow, self.state_in_prompt = on_overflow, state_in_prompt
        named_cameras(self.dataset, data)
        self.frames, self.stop = frames_of(self.dataset, chosen_episodes(self.dataset, episodes))
        self.state, self.actions = self._numbers()
        self._check_sizes()
        self.quarantined = self._without_non_finite(skip_non_finite)
        self._instructions = self.dataset.texts(data.instruction) if data.instruction else None
        self._task = None if data.instruction else _task_of(self.dataset, self.frames)
        self.table = TokenTable(len(self.frames), tokenizer.max_token_len)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self.frames)

    def __reduce__(self) -> tuple:
        """Another process reads them anew, rather than be sent every number and picture."""
        return self._rebuild, ()

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The samples `rows` [B] as one Batch of numpy arrays."""
        rows = np.asarray(rows, np.int64)
        frames, sizes, has_flow = self.frames[rows], self.sizes, "flow" in self.data.losses
        actions, is_pad = self.chunks(rows)
        tokens = self.tokens(rows)
        observation: dict[str, Any] = {
            "images": {name: self._images(name, size, frames) for name, size in sizes.cameras.items()},
            "image_mask": {name: np.full(len(rows), name in self.data.cameras) for name in sizes.cameras},
            "state": pad(self._state(rows), sizes.state_dim),
            "tokens": tokens["tokens"],
            "token_mask": tokens["token_mask"],
        }
        steps = np.ones((len(rows), sizes.horizon), bool)
        steps[:, : self.robot.horizon] = is_pad if has_flow else True
        chunk = np.zeros((len(rows), sizes.horizon, sizes.action_dim), np.float32)
        chunk[:, : self.robot.horizon, : self.robot.action_dim] = actions
        dims = np.arange(sizes.action_dim) < self.robot.action_dim
        return Batch(
            Observation(**observation),
            actions=chunk,
            action_is_pad=steps,
            action_dim_mask=np.broadcast_to(dims, (len(rows), sizes.action_dim)).copy(),
            ar_mask=tokens["ar_mask"],
            loss_mask=tokens["loss_mask"],
        )

    def chunks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normalized and clipped chunks float32 [B, h, d] of the robot's own sizes, and which steps are past the end of
        the episode, bool [B, h]."""
        index, is_pad = chunk_indices(self.frames[rows], self.stop[rows], self.robot.horizon)
        chunk = self.robot.normalize_actions(self.actions[index], self.state[self.frames[rows]])
        return np.clip(chunk, -self.robot.clip, self.robot.clip), is_pad

    def tokens(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """tokens, token_mask, ar_mask, loss_mask, each [B, L]."""
        new = np.unique(rows[~self.table.known[rows]])
        if len(new):
            self._tokenize(new)
        return {name: getattr(self.table, name)[rows] for name in TokenTable.FIELDS}

    def tokenize_ahead(self) -> None:
        """Tokenize all samples, or EAGER of them, spread evenly: what does not fit is an error now."""
        rows = np.arange(len(self)) if len(self) <= EAGER else np.linspace(0, len(self) - 1, EAGER).astype(np.int64)
        self.tokens(rows)
        if self.dropped:
            log.warning("%d of %d samples have no token loss: their tokens exceed the limit", self.dropped, len(rows))

    def where(self, row: int) -> str:
        """Which episode and frame a sample is, for a person."""
        episode, step = self.dataset.episodes.locate(int(self.frames[row]))
        return f"data set {self.dataset.root}, episode {episode}, frame {step}"

    # --- its parts ---------------------------------------------------------------------------------------------------

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """State and actions of the whole data set, float32 [frames, ·], in the data's units."""
        dataset = self.dataset
        actions = joined(dataset, self.data.actions, dataset.column)
        if not self.data.state:
            return np.zeros((len(dataset), 0), np.float32), actions
        return joined(dataset, self.data.state, dataset.column), actions

    def _check_sizes(self) -> None:
        check_delta(self.data, self.state.shape[1], self.actions.shape[1])
        for name, values in (("state", self.state), ("actions", self.actions)):
            dim = self.robot.stats[name].dim
            if values.shape[1] != dim:
                raise DatasetError(
                    f"statistics of {name!r} have {dim} dimensions, data set {self.dataset.root} has "
                    f"{values.shape[1]}; fit them on this data set"
                )
        for setting, got, limit in (
            ("state_dim", self.robot.state_dim, self.sizes.state_dim),
            ("action_dim", self.robot.action_dim, self.sizes.action_dim),
            ("horizon", self.robot.horizon, self.sizes.horizon),
        ):
            if got > limit:
                raise DatasetError(f"data set {self.dataset.root}: {setting} is {got}, the model's {limit}; raise it")

    def _without_non_finite(self, skip: bool) -> int:
        """Leave out the samples with a NaN or infinity, or raise. Returns how many."""
        finite_action, finite_state = np.isfinite(self.actions).all(1), np.isfinite(self.state).all(1)
        if finite_action.all() and finite_state.all():
            return 0
        good = finite_action[chunk_indices(self.frames, self.stop, self.robot.horizon)[0]].all(1)
        good &= finite_state[self.frames]
        bad = int((~good).sum())
        if bad and not skip:
            for values, columns in ((self.state, self.data.state), (self.actions, self.data.actions)):
                refuse_non_finite(self.dataset, values, 0, dim_names(self.dataset, columns))
        if bad:
            log.warning("data set %s: %d samples with a NaN or infinity are left out", self.dataset.root, bad)
            self.frames, self.stop = self.frames[good], self.stop[good]
        if not len(self.frames):
            raise DatasetError(f"data set {self.dataset.root}: no sample has finite numbers throughout")
        return bad

    def _state(self, rows: np.ndarray) -> np.ndarray:
        return self.robot.stats["state"].normalize(self.state[self.frames[rows]])

    def _images(self, camera: str, size: tuple[int, int], frames: np.ndarray) -> np.ndarray:
        if camera not in self.data.cameras:
            return np.zeros((len(frames), *size, 3), np.uint8)
        key = self.data.cameras[camera]
        images = self.dataset.images(key, frames)
        if images.shape[1:3] == size:
            return images
        return np.stack([resize_with_pad(image, size) for image in images])

    def _tokenize(self, rows: np.ndarray) -> None:
        with_state = self.state_in_prompt and self.robot.state_dim > 0
        states = self._state(rows) if with_state else [None] * len(rows)
        chunks = self.chunks(rows)[0] if "fast" in self.data.losses else [None] * len(rows)
        for row, state, chunk in zip(rows.tolist(), states, chunks, strict=True):
            prompt = self._instruction(row)
            try:
                sample = self.tokenizer.tokenize(prompt, state, chunk)
            except (TokenBudgetError, FASTRangeError) as e:
                hopeless = isinstance(e, TokenBudgetError) and e.part == "prompt"
                if hopeless or self.on_overflow == "error":
                    way = (
                        "; raise the model's max_fast_len, lower fast_scale, or keep such samples for the flow loss "
                        "only: on_overflow='drop_token_loss'"
                    )
                    raise DatasetError(f"{self.where(row)} ({prompt!r}): {e}{'' if hopeless else way}") from e
                sample = self.tokenizer.tokenize(prompt, state)
                self.dropped += 1
            self.table.put(row, sample)

    def _instruction(self, row: int) -> str:
        frame = int(self.frames[row])
        if self._instructions is not None:
            return self._instructions[frame]
        assert self._task is not None
        return self.dataset.tasks[self._task[row]]


def pad(values: np.ndarray, width: int) -> np.ndarray:
    """[N, d] with zeros up to [N, width]."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _task_of(dataset: LeRobotDataset, frames: np.ndarray) -> np.ndarray:
    task = dataset.column("task_index")[frames]
    outside = np.flatnonzero((task < 0) | (task >= len(dataset.tasks)))
    if len(outside):
        raise DatasetError(
            f"data set {dataset.root}: frame {frames[outside[0]]} has task_index {task[outside[0]]}, "
            f"meta/tasks.parquet has 0 to {len(dataset.tasks) - 1}"
        )
    return task
