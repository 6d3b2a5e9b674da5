"""The samples of one robot data set, each padded to what the model reads.

A sample is one frame: the images and state then, the instruction, and the chunk of the next H actions. What this robot
lacks of the model's sizes is padded and masked: cameras (`image_mask`), action dimensions (`action_dim_mask`), steps
past the robot's horizon (`action_is_pad`), state dimensions (zeros).

A frame makes a sequence of each form (`insula.tokens.dialects.Form`); one source has one form. In the form `subtask`
all steps are padding: what is learned there is what to say, and the flow loss has nothing to count.

    frames.py        which frames, and their numbers        observe.py       what the model sees of one
    token_table.py   tokens, made once                      instructions.py  the text of each frame
                                                            subtasks.py      its step of the task, where it has one
"""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import SupportsIndex

import numpy as np

from insula.batch import Batch
from insula.data.chunks import named_cameras
from insula.data.config import TokenOverflow
from insula.data.frames import read_frames
from insula.data.instructions import read_instructions
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import RobotData
from insula.data.observe import Observer, Sizes
from insula.data.robot import Robot
from insula.data.subtasks import read_subtasks
from insula.data.token_table import TokenTable, ahead
from insula.errors import DatasetError, FASTRangeError, InputError, TokenBudgetError
from insula.tokens.dialects import Form
from insula.tokens.sequence import FASTTokenizer, Tokenized

log = logging.getLogger(__name__)


class Samples:
    """N samples of a robot in one form, `batch(rows)` makes a Batch of them.

    `dropped`: samples seen so far whose token loss was given up. `quarantined`: samples left out for a NaN.
    `unlabeled`: samples left out for want of a subtask, which the forms `subtask` and `actions` need.

    A chunk whose tokens do not fit raises DatasetError naming episode, frame, length and limit; with "drop_token_loss"
    that sample keeps its prompt and flow loss and loses its token loss, counted in `dropped` and logged. A prompt that
    does not fit is always an error, and so is a subtask where it is the answer. NaN and infinity in state or actions
    are errors as well, or, with `skip_non_finite`, those samples are left out, counted and logged.
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
        form: Form = Form.FLAT,
        state_in_prompt: bool = True,
        skip_non_finite: bool = False,
        dataset: LeRobotDataset | None = None,
    ):
        # Without `dataset`: another process opens its own, as files and caches are not to be sent. A list, since an
        # iterator is spent here.
        episodes = None if episodes is None else list(episodes)
        self._rebuild = partial(
            Samples,
            data,
            robot,
            tokenizer,
            sizes,
            episodes,
            on_overflow,
            form=form,
            state_in_prompt=state_in_prompt,
            skip_non_finite=skip_non_finite,
        )
        if on_overflow not in ("error", "drop_token_loss"):
            raise InputError(f"on_overflow: got {on_overflow!r}, expected 'error' or 'drop_token_loss'")

        # A run that has opened it already shares its cache of decoded pictures.
        self.dataset = dataset or LeRobotDataset(data.path)
        named_cameras(self.dataset, data)
        _check_sizes(self.dataset, robot, sizes)

        self.data = data
        self.robot = robot
        self.sizes = sizes
        self.on_overflow = on_overflow
        self.form = form
        self.observer = Observer(robot, tokenizer, sizes.state_dim, state_in_prompt)
        self.frames = read_frames(self.dataset, data, robot, episodes, skip_non_finite)
        self.unlabeled = 0
        self.subtasks: list[str | None] = [None] * len(self.frames.index)
        if form.has_subtask:
            self._take_labeled()
        self.instructions = read_instructions(self.dataset, data).of(self.frames.index)
        self.table = TokenTable(len(self.frames.index), tokenizer.max_token_len)
        self.dropped = 0

    def _take_labeled(self) -> None:
        """Leave out the frames that have no subtask."""
        found = read_subtasks(self.dataset, self.data)
        known = found.known[self.frames.index]
        if not known.any():
            raise DatasetError(f"data set {self.dataset.root}: none of the episodes chosen has a subtask at any frame")

        self.frames = self.frames.taken(known)
        self.subtasks = found.of(self.frames.index)
        self.unlabeled = int((~known).sum())

    def __len__(self) -> int:
        return len(self.frames.index)

    def __reduce__(self) -> tuple:
        """Another process reads them again, rather than be sent every number and picture."""
        return self._rebuild, ()

    @property
    def quarantined(self) -> int:
        """How many samples were left out for a NaN or infinity."""
        return self.frames.left_out

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The samples `rows` [B] as one Batch of numpy arrays."""
        rows = np.asarray(rows, np.int64)

        # Before pictures: a sample that does not fit costs no decoding.
        tokens = self.tokens(rows)
        actions, action_is_pad, action_dim_mask = self._padded_actions(rows)

        index = self.frames.index[rows]
        observation = self.observer.observe(
            {camera: self.dataset.images(column, index) for camera, column in self.data.cameras.items()},
            self.sizes.cameras,
            self.observer.normalize_state(self.frames.state[index]),
            tokens["tokens"],
            tokens["token_mask"],
        )

        return Batch(
            observation,
            actions=actions,
            action_is_pad=action_is_pad,
            action_dim_mask=action_dim_mask,
            ar_mask=tokens["ar_mask"],
            loss_mask=tokens["loss_mask"],
        )

    def chunks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Frames.chunks`."""
        return self.frames.chunks(rows, self.robot)

    def tokens(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """tokens, token_mask, ar_mask, loss_mask, each [B, L]."""
        return self.table.take(rows, self._tokenize)

    def tokenize_ahead(self) -> None:
        """All samples, or many spread evenly: what does not fit is an error now."""
        # Hours into a run is too late to learn that one chunk does not fit.
        rows = ahead(len(self))
        self.tokens(rows)
        if self.dropped:
            log.warning("%d of %d samples have no token loss: their tokens exceed the limit", self.dropped, len(rows))
        if self.unlabeled:
            log.warning(
                "data set %s: %d of %d frames have no subtask, and are left out of the form %s",
                self.dataset.root,
                self.unlabeled,
                self.unlabeled + len(self),
                self.form,
            )

    def where(self, row: int) -> str:
        """Which episode and frame a sample is, for a person."""
        episode, step = self.dataset.episodes.locate(int(self.frames.index[row]))
        return f"data set {self.dataset.root}, episode {episode}, frame {step}"

    def _padded_actions(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`actions` [B, H, D], `action_is_pad` [B, H] and `action_dim_mask` [B, D] of the model's sizes."""
        chunks, is_pad = self.chunks(rows)
        count, horizon, dim = chunks.shape

        # The model's sizes, zeros beyond the robot's own: where noisy, they are t · noise, and serving leads them to 0.
        actions = np.zeros((count, self.sizes.horizon, self.sizes.action_dim), np.float32)
        actions[:, :horizon, :dim] = chunks

        # Without the flow loss every step is padding: the only mask that loss has.
        action_is_pad = np.ones((count, self.sizes.horizon), bool)
        if "flow" in self.data.losses and self.form is not Form.SUBTASK:
            action_is_pad[:, :horizon] = is_pad

        # Also where the flow loss is off: it says what the robot has, not what is scored.
        action_dim_mask = np.zeros((count, self.sizes.action_dim), bool)
        action_dim_mask[:, :dim] = True

        return actions, action_is_pad, action_dim_mask

    def _tokenize(self, rows: np.ndarray) -> None:
        states = self.observer.normalize_state(self.frames.state[self.frames.index[rows]])
        # Without an action behind it a prompt has nothing to score: the token loss is then off by the data alone.
        scores_actions = "fast" in self.data.losses and self.form is not Form.SUBTASK
        chunks = self.chunks(rows)[0] if scores_actions else [None] * len(rows)
        for row, state, chunk in zip(rows.tolist(), states, chunks, strict=True):
            self.table.put(row, self._tokenized(row, state, chunk))

    def _tokenized(self, row: int, state: np.ndarray, chunk: np.ndarray | None) -> Tokenized:
        task, subtask = self.instructions[row], self.subtasks[row]
        try:
            if self.form is Form.SUBTASK:
                return self.observer.think(task, state, subtask)
            return self.observer.tokenize(task, state, chunk, subtask)
        except (TokenBudgetError, FASTRangeError) as error:
            # A prompt is all the expert knows of the task: it is never given up. Nor is the only thing that a sample
            # teaches.
            hopeless = self.form is Form.SUBTASK or (isinstance(error, TokenBudgetError) and error.part == "prompt")
            if hopeless or self.on_overflow == "error":
                remedy = (
                    "; raise the model's max_fast_len, lower fast_scale, or keep such samples for the flow loss "
                    "only: --on-overflow drop_token_loss"
                )
                said = f"{task!r}" if subtask is None else f"{task!r}, {subtask!r}"
                raise DatasetError(f"{self.where(row)} ({said}): {error}{'' if hopeless else remedy}") from error

        # The prompt stays as it was: the flow loss is learned with what serving will say.
        self.dropped += 1

        return self.observer.tokenize(task, state, None, subtask)


def _check_sizes(dataset: LeRobotDataset, robot: Robot, sizes: Sizes) -> None:
    # Cut off, a robot would lose joints without a word; only padding is harmless.
    for setting, got, limit in (
        ("state_dim", robot.state_dim, sizes.state_dim),
        ("action_dim", robot.action_dim, sizes.action_dim),
        ("horizon", robot.horizon, sizes.horizon),
    ):
        if got > limit:
            raise DatasetError(f"data set {dataset.root}: {setting} is {got}, the model's {limit}; raise it")
