"""Token cross-entropy, flow-matching error, and their weighted sum."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from insula import flow
from insula.batch import Batch
from insula.errors import InputError
from insula.model import Params, trainable
from insula.model.backbone import run_backbone, take
from insula.model.config import Config
from insula.model.expert import Expert, run_expert
from insula.model.insulation import Memory, freeze, insulate
from insula.shapes import Array, Bool, Float, Int, PRNGKeyArray
from insula.tokens import masks

Metrics = dict[str, Array]


def compute_loss(params: Params, config: Config, batch: Batch, rng: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
    """total = flow + ki_fast_loss_weight · fast, from one backbone pass (π0.5 + KI, Driess et al. 2025, eq. 4).

    `metrics`: the differentiable scalars "fast" and "flow", "scored_tokens" (how many the token loss averages over)
    and "token_accuracy". Without tokens, or with none to score, "fast" is 0.

    A sample that scores more than `max_fast_len` tokens, or has a prompt longer than `max_prompt_len`, makes its loss
    NaN: a compiled function cannot raise, and must not score less than it was given. `FASTTokenizer` refuses both.
    """
    params = jax.tree.map(lambda learns, tree: tree if learns else freeze(tree), trainable(config), params)
    targets = scored_tokens(batch, config)
    read = targets.read if targets else None
    prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask, read)
    memory = insulate(prefix, config.num_memory, stop=config.knowledge_insulation)

    error = expert_loss(params.expert, config, memory, batch, rng)
    fast, token_metrics = token_loss(prefix.hidden, params.backbone.embedding, targets, config)
    unseen = masks.visible_to_expert(prefix.input_mask, prefix.ar_mask)[:, config.num_memory :]
    losses = {"fast": fast, "flow": jnp.where(jnp.any(unseen), jnp.nan, error)}
    weights = {"fast": config.ki_fast_loss_weight, "flow": 1.0}
    assert losses.keys() == weights.keys() and all(loss.shape == () for loss in losses.values())
    total = jnp.sum(jnp.stack([weights[name] * losses[name] for name in losses]))
    return total, losses | token_metrics


def language_loss(params: Params, config: Config, batch: Batch, rng: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
    """The token loss alone, for samples without actions; the expert is not run. Same signature as `compute_loss`."""
    targets = scored_tokens(batch, config)
    read = targets.read if targets else None
    prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask, read)
    fast, metrics = token_loss(prefix.hidden, params.backbone.embedding, targets, config)
    return fast, {"fast": fast} | metrics


def predict_tokens(params: Params, config: Config, batch: Batch) -> tuple[Int[Array, "B s"], "Targets"]:
    """The likeliest token at each scored position given the true ones before it, and the true ones.

    Raises ValueError where the batch has no tokens to score.
    """
    targets = scored_tokens(batch, config)
    if targets is None:
        raise InputError("predict_tokens: the batch has no tokens or no loss_mask; tokenise with the answer or actions")
    prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask, targets.read)
    return jnp.argmax(prefix.hidden @ params.backbone.embedding.T, axis=-1), targets


def expert_loss(expert: Expert, config: Config, memory: Memory, batch: Batch, rng: PRNGKeyArray) -> Float[Array, ""]:
    """Flow-matching error of a batch's chunks, each noised `flow_samples` times."""
    time_rng, noise_rng = jax.random.split(rng)
    draws = (batch.actions.shape[0], config.flow_samples)
    time = flow.sample_time(time_rng, draws)
    noise = jax.random.normal(noise_rng, (*draws, *batch.actions.shape[1:]))
    actions, mask = batch.actions[:, None], batch.action_mask[:, None]
    noisy = flow.add_noise(actions, noise, time)
    velocity = run_expert(expert, config, memory, batch.observation.state, noisy, time)
    return average(flow_loss(velocity, flow.target_velocity(actions, noise), mask), mask)


def flow_loss(
    velocity: Float[Array, "*b H D"], target: Float[Array, "*b H D"], action_mask: Bool[Array, "*c H D"]
) -> Float[Array, "*b H"]:
    """Squared error of each step of the horizon: the mean over the action dimensions the robot has."""
    error = jnp.where(action_mask, jnp.square(velocity - target), 0.0)
    return jnp.sum(error, axis=-1) / jnp.maximum(jnp.sum(action_mask, axis=-1), 1)


def average(per_step: Float[Array, "*b H"], action_mask: Bool[Array, "*c H D"]) -> Float[Array, ""]:
    """Mean over every real step. Padded steps hold 0 already and are not counted."""
    real = jnp.broadcast_to(jnp.any(action_mask, axis=-1), per_step.shape)
    return jnp.sum(per_step) / jnp.maximum(jnp.sum(real), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the token loss scores, at most `max_fast_len` tokens a sample.

    `read`: the position, images counted, whose hidden state predicts the token: the one before it. `label`: the token.
    `used`: whether the slot holds one. `complete`: every token of `loss_mask` found a slot.
    """

    read: Int[Array, "B s"]
    label: Int[Array, "B s"]
    used: Bool[Array, "B s"]
    complete: Bool[Array, ""]


def scored_tokens(batch: Batch, config: Config) -> Targets | None:
    """The tokens of `loss_mask`, in order. None without tokens."""
    if batch.observation.tokens is None or batch.loss_mask is None:
        return None
    loss_mask = jnp.asarray(batch.loss_mask, bool)
    order = jnp.argsort(~loss_mask, axis=1, stable=True)[:, : config.max_fast_len]
    used = take(loss_mask, order)
    return Targets(
        read=config.num_image_tokens + order - 1,
        label=take(jnp.asarray(batch.observation.tokens), order),
        used=used,
        complete=jnp.sum(used) == jnp.sum(loss_mask),
    )


def token_loss(
    hidden: Float[Array, "B _ W"], embedding: Float[Array, "V W"], targets: Targets | None, config: Config
) -> tuple[Float[Array, ""], Metrics]:
    """Mean next-token cross-entropy over exactly `targets`; `hidden` are the states at `targets.read`, gathered before
    the vocabulary product."""
    if targets is None:
        nothing = jnp.zeros(())
        return nothing, {"scored_tokens": nothing, "token_accuracy": nothing}
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss, right = cross_entropy(rows, embedding, targets.label.reshape(-1), config.compute_dtype, config.vocab_chunk)
    weight = targets.used.reshape(-1).astype(jnp.float32)
    count = jnp.sum(weight)
    denominator = jnp.maximum(count, 1)
    return jnp.where(targets.complete, jnp.sum(loss * weight) / denominator, jnp.nan), {
        "scored_tokens": count,
        "token_accuracy": jnp.sum(right * weight) / denominator,
    }


def cross_entropy(
    hidden: Float[Array, "n W"], embedding: Float[Array, "V W"], labels: Int[Array, "n"], dtype: str, chunk: int | None
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """−log softmax(hidden · embeddingᵀ)[label], and whether the label is the likeliest token.

    With `chunk`, logits exist for so many vocabulary entries at a time, in the forward and the backward pass.
    Raises ValueError where `chunk` does not divide the vocabulary.
    """
    chunk = chunk or embedding.shape[0]
    if embedding.shape[0] % chunk:
        raise InputError(f"vocab_chunk is {chunk}, expected a divisor of the vocabulary's {embedding.shape[0]} entries")
    return _cross_entropy(hidden, embedding, labels, dtype, chunk)


def _logits(hidden: Array, piece: Array, dtype: str) -> Array:
    return jax.lax.dot_general(
        hidden.astype(dtype), piece.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _pieces(embedding: Array, labels: Array, chunk: int) -> tuple[Array, Array]:
    """The vocabulary in chunks, and where in each chunk every label would be: outside, for all chunks but its own."""
    pieces = embedding.reshape(-1, chunk, embedding.shape[1])
    return pieces, labels - chunk * jnp.arange(pieces.shape[0])[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _cross_entropy(hidden: Array, embedding: Array, labels: Array, dtype: str, chunk: int) -> tuple[Array, Array]:
    return _cross_entropy_forward(hidden, embedding, labels, dtype, chunk)[0]


def _cross_entropy_forward(
    hidden: Array, embedding: Array, labels: Array, dtype: str, chunk: int
) -> tuple[tuple[Array, Array], tuple]:
    """log Σ exp(logit) by an online softmax, beside the largest logit and the label's own, from the same product."""

    def step(carry: tuple[Array, Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        best, total, own = carry
        piece, label = inputs
        logits = _logits(hidden, piece, dtype)
        new = jnp.maximum(best, jnp.max(logits, axis=1))
        total = total * jnp.exp(best - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        here = jnp.take_along_axis(logits, jnp.clip(label, 0, chunk - 1)[:, None], axis=1)[:, 0]
        return (new, total, jnp.where((label >= 0) & (label < chunk), here, own)), None

    rows = hidden.shape[0]
    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(rows))
    (best, total, own), _ = jax.lax.scan(step, start, _pieces(embedding, labels, chunk))
    log_z = best + jnp.log(total)
    return (log_z - own, own >= best), (hidden, embedding, labels, log_z)


def _cross_entropy_backward(dtype: str, chunk: int, residuals: tuple, gradient: tuple) -> tuple[Array, Array, None]:
    """(softmax − one-hot) · gradient, the logits computed again."""
    hidden, embedding, labels, log_z = residuals

    def step(d_hidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        piece, label = inputs
        error = jnp.exp(_logits(hidden, piece, dtype) - log_z[:, None]) - (label[:, None] == jnp.arange(chunk))
        error = (error * gradient[0][:, None]).astype(dtype)
        d_piece = jax.lax.dot_general(
            error, hidden.astype(dtype), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return d_hidden + jnp.dot(error, piece.astype(dtype), preferred_element_type=jnp.float32), d_piece

    d_hidden, d_pieces = jax.lax.scan(step, jnp.zeros_like(hidden), _pieces(embedding, labels, chunk))
    return d_hidden, d_pieces.reshape(embedding.shape), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
