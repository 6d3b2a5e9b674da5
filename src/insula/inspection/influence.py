"""What reaches what, by changing it: one part of a sample's input at a time, and how far what is computed moves.

    changed                    velocity     images and prompt   answer, before it   answer, from it on
    a camera, the prompt       > 0          > 0                                     > 0
    all FAST tokens            0 exactly    0 exactly                               > 0
    no FAST tokens at all      0 exactly    0 exactly
    one FAST token             0 exactly    0 exactly           0 exactly           > 0
    padding, absent camera     0 exactly    0 exactly                               0 exactly
    noisy actions              > 0          0 exactly                               0 exactly

Gradients cannot show these: the expert reads through a stop-gradient, so a FAST token it can see leaves no gradient.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from insula.batch import Batch
from insula.certificate import Outcome, compiled_quickly
from insula.inspection.token_columns import TokenColumns
from insula.model.backbone import run_backbone
from insula.model.config import ModelConfig
from insula.model.expert import run_expert
from insula.model.insulation import insulate
from insula.model.params import Params
from insula.shapes import AnyArray, Array, Float, PRNGKeyArray
from insula.tokens import masks

VELOCITY, PREFIX, BEFORE, AFTER = "velocity", "images and prompt", "answer, before it", "answer, from it on"
EFFECTS = (VELOCITY, PREFIX, BEFORE, AFTER)
Forward = Callable[[Params, Batch, Float[AnyArray, "1 1 H D"]], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class Influence:
    """`table[changed][effect]`: the largest change of the expert's velocity, or of the backbone's final hidden states;
    None where the two have nothing to do with each other. `outcome` and `findings` as of a `Proof`."""

    table: dict[str, dict[str, float | None]]
    outcome: Outcome
    findings: tuple[str, ...]


def forward(config: ModelConfig) -> Forward:
    """(hidden [T, W], velocity [H, D]) of a batch of one at t = 0.5, compiled once; float32."""
    config = config.with_compute(dtype="float32")

    def run(params: Params, batch: Batch, noisy: Array) -> tuple[Array, Array]:
        prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
        memory = insulate(prefix, config.num_memory)
        time = jnp.full((1, 1), 0.5)
        velocity = run_expert(params.expert, config, memory, batch.observation.state, noisy, time)
        return prefix.hidden[0], velocity[0, 0]

    return compiled_quickly(run)


def influence(
    run: Forward, params: Params, config: ModelConfig, batch: Batch, seen: TokenColumns, rng: PRNGKeyArray
) -> Influence:
    """Of a batch of one. Without actions the velocity is left out, without an answer what concerns the answer."""
    noisy = jax.random.normal(rng, (1, 1, config.horizon, config.action_dim))
    acts = bool(np.asarray(batch.action_mask).any())
    base = run(params, batch, noisy)
    causal = seen.token_mask & np.asarray(masks.is_suffix(seen.ar_mask))
    prefix = seen.token_mask & ~causal
    answers = bool(causal.any())
    table: dict[str, dict[str, float | None]] = {}

    def measure(name: str, changed: Batch, noise: Array = noisy, at: int | None = None, answer: bool = answers) -> None:
        hidden, velocity = run(params, changed, noise)
        moved = jnp.max(jnp.abs(hidden - base[0]), axis=1)
        column = np.arange(len(causal))
        split = 0 if at is None else at
        table[name] = {
            VELOCITY: _largest(jnp.abs(velocity - base[1])) if acts else None,
            PREFIX: _largest(moved[prefix]),
            BEFORE: _largest(moved[causal & (column < split)]) if at is not None else None,
            AFTER: _largest(moved[causal & (column >= split)]) if answer else None,
        }

    observation = batch.observation
    for camera, present in observation.image_mask.items():
        inverted = observation.images | {camera: 255 - observation.images[camera]}
        name = f"camera {camera}" if np.asarray(present)[0] else f"camera {camera} (absent)"
        measure(name, _observe(batch, images=inverted))
    images = config.num_image_tokens
    words = seen.where("prompt") - images
    measure("prompt: one token", _other_tokens(batch, config, words[[len(words) // 2]]))
    answer = np.flatnonzero(causal) - images
    if len(answer):
        middle = int(answer[len(answer) // 2])
        measure("answer: all its tokens", _other_tokens(batch, config, answer))
        measure("answer: none at all", _without(batch, answer), answer=False)
        measure("answer: one token", _other_tokens(batch, config, np.array([middle])), at=middle + images)
    padding = seen.where("padding") - images
    if len(padding):
        measure("padding", _other_tokens(batch, config, padding))
    if acts:
        measure("noisy actions", batch, noise=noisy + 1)
    return Influence(table, *_judge(table))


def _judge(table: dict[str, dict[str, float | None]]) -> tuple[Outcome, tuple[str, ...]]:
    entries = [(c, e, v) for c, row in table.items() for e, v in row.items() if v is not None]
    broken = [f"changing {c}: {e} is not finite" for c, e, v in entries if not np.isfinite(v)]
    leaks = [f"changing {c} moves {e} by {v:.3g}" for c, e, v in entries if _must_stay(c, e) and v != 0]
    vacuous = [f"changing {c} moves nothing of {e}" for c, e, v in entries if _must_move(c, e) and v == 0]
    read = [v for c, e, v in entries if e == VELOCITY and (c.startswith("prompt") or _is_present_camera(c))]
    if read and not any(read):
        vacuous.append("no camera and no prompt moves the velocity, so that FAST tokens do not shows nothing")
    outcomes: list[tuple[Outcome, list[str]]] = [("not finite", broken), ("leaks", leaks), ("vacuous", vacuous)]
    return next(((outcome, tuple(found)) for outcome, found in outcomes if found), ("holds", ()))


def _must_stay(changed: str, effect: str) -> bool:
    if changed.startswith("answer"):
        return effect != AFTER
    return changed == "padding" or changed.endswith("(absent)") or (changed == "noisy actions" and effect != VELOCITY)


def _is_present_camera(changed: str) -> bool:
    return changed.startswith("camera") and not changed.endswith("(absent)")


def _must_move(changed: str, effect: str) -> bool:
    """A camera may be black, a prompt of no consequence: only what cannot but move."""
    return (changed == "noisy actions" and effect == VELOCITY) or (changed.startswith("answer") and effect == AFTER)


def _other_tokens(batch: Batch, config: ModelConfig, columns: np.ndarray) -> Batch:
    """Another token at each of these text columns."""
    tokens = np.array(batch.observation.tokens)
    tokens[:, columns] = (tokens[:, columns] + config.vocab_size // 2) % config.vocab_size
    return _observe(batch, tokens=tokens)


def _without(batch: Batch, columns: np.ndarray) -> Batch:
    """As serving sees it: these text columns are padding."""
    token_mask, ar_mask = np.array(batch.observation.token_mask), np.array(batch.ar_mask)
    token_mask[:, columns] = ar_mask[:, columns] = False
    return dataclasses.replace(_observe(batch, token_mask=token_mask), ar_mask=ar_mask)


def _observe(batch: Batch, **fields: object) -> Batch:
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, **fields))  # type: ignore[arg-type]


def _largest(moved: Array) -> float:
    return float(jnp.max(moved, initial=0.0))
