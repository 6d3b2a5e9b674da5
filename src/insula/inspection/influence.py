"""What reaches what, by changing it: one part of a sample's input at a time, and how far what is computed moves.

    changed                      velocity     images and prompt   the answer before it   the answer from it on
    a camera, one prompt token   > 0          > 0                                        > 0
    all tokens of the answer     0 exactly    0 exactly                                  > 0
    the answer, taken away       0 exactly    0 exactly
    one token of the answer      0 exactly    0 exactly           0 exactly              > 0
    padding, an absent camera    0 exactly    0 exactly                                  0 exactly
    noisy actions                > 0          0 exactly                                  0 exactly

Gradients cannot show these: the expert reads through a stop-gradient, so a FAST token it can see leaves no gradient.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from insula.batch import Batch
from insula.certificate.proof import Outcome, worst
from insula.compile import compiled_quickly
from insula.inspection.token_columns import ColumnKind, TokenColumns
from insula.model.backbone import run_backbone
from insula.model.config import ModelConfig
from insula.model.expert import run_expert
from insula.model.insulation import insulate
from insula.model.params import Params
from insula.shapes import AnyArray, Array, Float, PRNGKeyArray
from insula.tokens import masks


class ChangeKind(enum.StrEnum):
    """What is changed in the input. The values are what a person reads."""

    CAMERA = "camera"
    ABSENT_CAMERA = "absent camera"
    PROMPT_TOKEN = "one token of the prompt"
    ANSWER_ALL = "all tokens of the answer"
    ANSWER_NONE = "the answer, taken away"
    ANSWER_ONE = "one token of the answer"
    PADDING = "padding"
    NOISY_ACTIONS = "noisy actions"


class Effect(enum.StrEnum):
    """What may move: the expert's velocity, or the backbone's final hidden states of some columns. "It" is the first
    token that was changed."""

    VELOCITY = "velocity"
    PREFIX = "images and prompt"
    BEFORE = "the answer before it"
    AFTER = "the answer from it on"


ANSWER_KINDS = (ChangeKind.ANSWER_ALL, ChangeKind.ANSWER_NONE, ChangeKind.ANSWER_ONE)
READ_KINDS = (ChangeKind.CAMERA, ChangeKind.PROMPT_TOKEN)
"""What the expert is meant to read."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One changed input. `camera` names it where it is one."""

    kind: ChangeKind
    camera: str = ""

    @property
    def label(self) -> str:
        """For a person: "camera front", "one token of the answer"."""
        return f"{self.kind} {self.camera}".strip()


Moved = dict[Effect, float | None]
"""The largest absolute change of each; None where change and effect have nothing to do with each other."""


@dataclasses.dataclass(frozen=True)
class Influence:
    """What every change moved. `outcome` and `findings` are as of a `Proof`."""

    table: dict[Change, Moved]
    outcome: Outcome
    findings: tuple[str, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The table's rows as plain values, without the effects that a change has nothing to do with."""
        return [
            {
                "kind": change.kind,
                "camera": change.camera or None,
                "moved": {effect: value for effect, value in moved.items() if value is not None},
            }
            for change, moved in self.table.items()
        ]


# --- measuring -------------------------------------------------------------------------------------------------------

Forward = Callable[[Params, Batch, Float[AnyArray, "1 1 H D"]], tuple[Array, Array]]


def make_forward(config: ModelConfig) -> Forward:
    """A program for (hidden [T, W], velocity [H, D]) of a batch of one at t = 0.5, compiled once; float32."""
    # One program for every change, so that equal inputs give equal bits: two compiled for two shapes would differ in
    # their last digits, and "0 exactly" could not be asked for. So the answer is taken away by masking it, not by a
    # shorter batch.
    config = config.with_compute(dtype="float32")

    def run(params: Params, batch: Batch, noisy: Array) -> tuple[Array, Array]:
        prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
        memory = insulate(prefix, config.num_memory)

        # In the middle, where both the noisy actions and what the expert reads matter.
        time = jnp.full((1, 1), 0.5)
        velocity = run_expert(params.expert, config, memory, batch.observation.state, noisy, time)
        return prefix.hidden[0], velocity[0, 0]

    return compiled_quickly(run)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A changed input, ready to be run. `first`: the column of the first changed token, where it is one of the answer's
    and others stand before it. `has_answer`: whether the changed input still holds an answer that could move."""

    change: Change
    batch: Batch
    noisy: Array
    has_answer: bool
    first: int | None = None


def measure_influence(
    run: Forward, params: Params, config: ModelConfig, batch: Batch, seen: TokenColumns, rng: PRNGKeyArray
) -> Influence:
    """Of a batch of one. Without actions the velocity is left out, without an answer what concerns the answer."""
    noisy = jax.random.normal(rng, (1, 1, config.horizon, config.action_dim))
    hidden, velocity = run(params, batch, noisy)

    # Padding is neither: its hidden states are read by nothing, and do change.
    has_actions = bool(np.asarray(batch.action_mask).any())
    suffix = seen.token_mask & np.asarray(masks.is_suffix(seen.ar_mask))
    prefix = seen.token_mask & ~suffix
    column = np.arange(len(suffix))
    table: dict[Change, Moved] = {}

    for trial in _trials(config, batch, seen, suffix, noisy, has_actions):
        new_hidden, new_velocity = run(params, trial.batch, trial.noisy)
        shift = jnp.max(jnp.abs(new_hidden - hidden), axis=1)  # of each column
        first = trial.first or 0
        table[trial.change] = {
            Effect.VELOCITY: _largest(jnp.abs(new_velocity - velocity)) if has_actions else None,
            Effect.PREFIX: _largest(shift[prefix]),
            Effect.BEFORE: _largest(shift[suffix & (column < first)]) if trial.first is not None else None,
            Effect.AFTER: _largest(shift[suffix & (column >= first)]) if trial.has_answer else None,
        }

    return Influence(table, *judge_influence(table))


def _trials(
    config: ModelConfig, batch: Batch, seen: TokenColumns, suffix: np.ndarray, noisy: Array, has_actions: bool
) -> Iterator[Trial]:
    """Every change that this sample allows. Columns of the text are counted without the images before it."""
    images = config.num_image_tokens
    observation = batch.observation
    has_answer = bool(suffix.any())

    for camera, present in observation.image_mask.items():
        # Inverted: 255 − x is never x for a whole number, so every pixel changes, whatever the picture is.
        kind = ChangeKind.CAMERA if np.asarray(present)[0] else ChangeKind.ABSENT_CAMERA
        inverted = observation.images | {camera: 255 - observation.images[camera]}
        yield Trial(Change(kind, camera), _with_observation(batch, images=inverted), noisy, has_answer)

    # A word from the middle: the first ones are the same in every prompt, so a model may learn to ignore them.
    prompt = seen.where(ColumnKind.PROMPT)
    words = prompt[~suffix[prompt]] - images  # some dialects also write words after it, which are generated
    other = _other_tokens(batch, config, words[[len(words) // 2]])
    yield Trial(Change(ChangeKind.PROMPT_TOKEN), other, noisy, has_answer)

    # All of it is the largest change, but says nothing of order; one in the middle has tokens before and after it.
    answer = np.flatnonzero(suffix) - images
    if has_answer:
        other = _other_tokens(batch, config, answer)
        yield Trial(Change(ChangeKind.ANSWER_ALL), other, noisy, has_answer)

        yield Trial(Change(ChangeKind.ANSWER_NONE), _without_tokens(batch, answer), noisy, has_answer=False)

        middle = answer[[len(answer) // 2]]
        other = _other_tokens(batch, config, middle)
        yield Trial(Change(ChangeKind.ANSWER_ONE), other, noisy, has_answer, first=int(middle[0]) + images)

    padding = seen.where(ColumnKind.PADDING) - images
    if len(padding):
        yield Trial(Change(ChangeKind.PADDING), _other_tokens(batch, config, padding), noisy, has_answer)

    if has_actions:
        yield Trial(Change(ChangeKind.NOISY_ACTIONS), batch, noisy + 1, has_answer)


def _other_tokens(batch: Batch, config: ModelConfig, columns: np.ndarray) -> Batch:
    """Another token at each of these text columns."""
    # Half a vocabulary further: never the same token, and not a neighbor that means nearly the same.
    tokens = np.array(batch.observation.tokens)
    tokens[:, columns] = (tokens[:, columns] + config.vocab_size // 2) % config.vocab_size
    return _with_observation(batch, tokens=tokens)


def _without_tokens(batch: Batch, columns: np.ndarray) -> Batch:
    """As serving sees it: these text columns are padding."""
    token_mask = np.array(batch.observation.token_mask)
    ar_mask = np.array(batch.ar_mask)

    token_mask[:, columns] = False
    ar_mask[:, columns] = False
    return dataclasses.replace(_with_observation(batch, token_mask=token_mask), ar_mask=ar_mask)


def _with_observation(batch: Batch, **fields: object) -> Batch:
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, **fields))  # type: ignore[arg-type]


def _largest(moved: Array) -> float:
    # Of nothing it is 0: no column, no change.
    return float(jnp.max(moved, initial=0.0))


# --- judging ---------------------------------------------------------------------------------------------------------


def judge_influence(table: dict[Change, Moved]) -> tuple[Outcome, tuple[str, ...]]:
    """What a table shows, and the entries that show it, as `insula.certificate.proof.judge` does for gradients."""
    broken, leaks, vacuous = [], [], []

    # As for gradients, no tolerance: a masked score weighs exactly 0, so what is hidden moves not even the last bit.
    for change, moved in table.items():
        for effect, value in moved.items():
            if value is None:
                continue

            if not np.isfinite(value):
                broken.append(f"changing {change.label}: the change of {effect} is {value}")
            elif value != 0 and _must_stay(change.kind, effect):
                leaks.append(f"changing {change.label} moves {effect} by {value:.3g}")
            elif value == 0 and _must_move(change.kind, effect):
                vacuous.append(f"changing {change.label} moves nothing of {effect}")

    # One black camera may move nothing, but an expert that reads no input at all shows nothing by not reading FAST.
    read = [moved.get(Effect.VELOCITY) for change, moved in table.items() if change.kind in READ_KINDS]
    if not any(value is None or value != 0 for value in read):
        vacuous.append("no camera and no prompt moves the velocity, so that FAST tokens do not shows nothing")

    return worst(broken, leaks, vacuous)


def _must_stay(kind: ChangeKind, effect: Effect) -> bool:
    if kind in ANSWER_KINDS:
        return effect is not Effect.AFTER
    if kind is ChangeKind.NOISY_ACTIONS:
        return effect is not Effect.VELOCITY

    return kind in (ChangeKind.PADDING, ChangeKind.ABSENT_CAMERA)


def _must_move(kind: ChangeKind, effect: Effect) -> bool:
    """A camera may be black, a prompt of no consequence: only what cannot but move."""
    if kind in ANSWER_KINDS:
        return effect is Effect.AFTER

    return kind is ChangeKind.NOISY_ACTIONS and effect is Effect.VELOCITY
