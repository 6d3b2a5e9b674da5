"""Token cross-entropy, flow-matching error, and their weighted sum.

    gradient of    on vision, backbone    on the expert
    token loss     > 0                    0 exactly: no logit depends on it
    flow loss      0 exactly, insulated   > 0

`insula.certificate` measures these four on any model.

The flow loss scores every real action. With `objective.rtc_max_delay` (training-time real-time chunking) the first d
steps of a noise draw are given clean and not asked for, and it scores every real action but these: a velocity at
t = 0, of what is known already, is never used. d = 0 is among the delays, so no step is left out for good.
"""

import dataclasses

import jax
import jax.numpy as jnp

from insula import flow
from insula.batch import Batch
from insula.errors import InputError
from insula.model.backbone import BackboneOutput, gather_positions, run_backbone
from insula.model.config import ModelConfig
from insula.model.cross_entropy import cross_entropy
from insula.model.expert import Expert, run_expert
from insula.model.insulation import Memory, freeze, insulate
from insula.model.mistakes import mistaken_memory
from insula.model.params import Params, trainable
from insula.shapes import Array, Bool, Float, Int, PRNGKeyArray
from insula.tokens import masks

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """The randomness of a batch's flow loss: K noises for each chunk, each at a time of its own, t = 1 is noise.
    `delay`: how many steps are given clean; None without `rtc_max_delay`."""

    time: Float[Array, "B K"]
    noise: Float[Array, "B K H D"]
    delay: Int[Array, "B K"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scored:
    """How many values of a whole batch the two means are over."""

    tokens: Float[Array, ""]
    steps: Float[Array, ""]


def compute_loss(
    params: Params, config: ModelConfig, batch: Batch, rng: PRNGKeyArray
) -> tuple[Float[Array, ""], Metrics]:
    """total = flow + ki_fast_loss_weight · fast, from one backbone pass (Driess et al. 2025, arXiv 2505.23705).

    `metrics`: the differentiable scalars "fast" and "flow", "scored_tokens" (how many the token loss averages over)
    and "token_accuracy". Without tokens, or with none to score, "fast" is 0.

    A sample that scores more than `max_fast_len` tokens, or has a prompt longer than `max_prompt_len`, makes its loss
    NaN: a compiled function cannot raise, and must not score less than it was given. `FASTTokenizer` refuses both.
    """
    draws = draw(config, batch.actions.shape[0], rng)
    return share_of_loss(params, config, batch, draws, count_scored(batch, draws))


def share_of_loss(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    draws: Draws,
    whole: Scored,
    gamma: float | Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """What one part of a batch adds to `compute_loss` of all of it, whose counts are `whole`: shares of the loss, of
    its gradient and of its metrics add up to those of the whole batch, however unevenly what is scored is spread.
    `gamma`: how much of the flow loss's gradient passes, where it is another than the objective's."""
    params = freeze_untrained(params, config)
    targets = scored_tokens(batch, config)
    prefix = read_batch(params, config, batch, targets)
    gamma = config.objective.gamma if gamma is None else gamma
    if config.objective.mistake == "none":
        memory = insulate(prefix, config.num_memory, gamma)
    else:
        memory = mistaken_memory(params, config, batch, prefix, gamma)

    # Both read the same pass: the token loss its hidden states at FAST positions, the expert its keys and values on the
    # prefix, which no FAST token can have changed.
    fast, token_metrics = token_loss(prefix.hidden, params.backbone.embedding, targets, config, whole)
    error = expert_loss(params.expert, config, memory, batch, draws, whole)

    # A prompt that reaches past the memory's columns would be read in part: no loss rather than that.
    cut_off = masks.visible_to_expert(prefix.token_mask, prefix.ar_mask)[:, config.num_memory :]
    losses = {"fast": fast, "flow": jnp.where(jnp.any(cut_off), jnp.nan, error)}

    # λ is on the token loss. The papers put their weight, α, on the flow loss; insulated, either way both optimizers
    # see the same gradients but for a factor, which Adam all but divides out.
    weights = {"fast": config.objective.ki_fast_loss_weight, "flow": 1.0}
    assert losses.keys() == weights.keys() and all(loss.shape == () for loss in losses.values())
    total = jnp.sum(jnp.stack([weights[name] * losses[name] for name in losses]))
    return total, losses | token_metrics


def language_share(
    params: Params, config: ModelConfig, batch: Batch, draws: Draws | None, whole: Scored
) -> tuple[Float[Array, ""], Metrics]:
    """The token loss alone, for samples without actions; the expert is not run, and `draws` not used. Same signature as
    `share_of_loss`, so a train step takes either."""
    params = freeze_untrained(params, config)
    targets = scored_tokens(batch, config)
    prefix = read_batch(params, config, batch, targets)
    fast, metrics = token_loss(prefix.hidden, params.backbone.embedding, targets, config, whole)
    return fast, {"fast": fast} | metrics


def count_scored(batch: Batch, draws: Draws | None) -> Scored:
    """What a batch has to score; without `draws`, of its tokens alone."""
    tokens = jnp.zeros(()) if batch.loss_mask is None else jnp.sum(batch.loss_mask, dtype=jnp.float32)
    if draws is None:
        return Scored(tokens, jnp.zeros(()))

    # A step counts once for every noise it is drawn with, if any of its values is asked for.
    scored = jnp.broadcast_to(_scored_actions(batch, draws).any(axis=-1), draws.noise.shape[:-1])
    return Scored(tokens, jnp.sum(scored, dtype=jnp.float32))


def freeze_untrained(params: Params, config: ModelConfig) -> Params:
    """The same parameters, those that are not to be trained without a gradient."""
    # They still run, but nothing is kept for their backward pass.
    return jax.tree.map(lambda learns, tree: tree if learns else freeze(tree), trainable(config), params)


def predict_tokens(params: Params, config: ModelConfig, batch: Batch) -> tuple[Int[Array, "B U"], "Targets"]:
    """The likeliest token at each scored position given the true ones before it, and the true ones.

    Raises InputError where the batch has no tokens to score.
    """
    targets = scored_tokens(batch, config)
    if targets is None:
        raise InputError("predict_tokens: the batch has no tokens or no loss_mask; tokenize with the answer or actions")

    # All logits at once, unlike in the loss: this is for evaluating, and keeps nothing for a backward pass.
    prefix = read_batch(params, config, batch, targets)
    return jnp.argmax(prefix.hidden @ params.backbone.embedding.T, axis=-1), targets


def read_batch(params: Params, config: ModelConfig, batch: Batch, targets: "Targets | None") -> BackboneOutput:
    """The one backbone pass of a training sample, with the final hidden states of the scored positions alone."""
    # Gathered before the vocabulary product: logits of all positions would be the largest array of a step. With 257,152
    # entries a step took an eleventh of the time, and a twelfth of the memory, of one with all logits, one-hot labels
    # and a second pass (docs/log.md).
    positions = targets.positions if targets else None
    return run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask, positions)


# --- flow ------------------------------------------------------------------------------------------------------------


def draw(config: ModelConfig, batch_size: int, rng: PRNGKeyArray) -> Draws:
    """Times, noises and delays for a batch."""
    time_rng, noise_rng = jax.random.split(rng)
    shape = (batch_size, config.objective.flow_samples)
    delay = None
    if config.objective.rtc_max_delay > 0:
        # A third key beside the two above, so that times and noise are those of training without delays.
        delay = flow.sample_delay(jax.random.split(rng, 3)[2], shape, config.objective.rtc_max_delay)

    noise = jax.random.normal(noise_rng, (*shape, config.horizon, config.action_dim))
    return Draws(flow.sample_time(time_rng, shape), noise, delay)


def expert_loss(
    expert: Expert,
    config: ModelConfig,
    memory: Memory,
    batch: Batch,
    draws: Draws,
    whole: Scored | None = None,
) -> Float[Array, ""]:
    """Flow-matching error of a batch's chunks, each noised K times: a scalar, 0 without actions. With delays the mean
    is over the steps after them. `whole`: as in `share_of_loss`; this batch's own counts unless given."""
    # K draws of noise share one chunk: an axis of one broadcasts against them.
    actions = batch.actions[:, None]
    noisy, time = flow.add_noise(actions, draws.noise, draws.time), draws.time
    if draws.delay is not None:
        noisy, time = flow.hold(noisy, time, actions, flow.first_steps(draws.delay, config.horizon))

    velocity = run_expert(expert, config, memory, batch.observation.state, noisy, time)
    action_mask = _scored_actions(batch, draws)
    error = flow_matching_loss(velocity, flow.target_velocity(actions, draws.noise), action_mask)
    return masked_mean(error, action_mask, None if whole is None else whole.steps)


def _scored_actions(batch: Batch, draws: Draws) -> Bool[Array, "B _ H D"]:
    """Every real action value, but for steps that are given clean."""
    action_mask = jnp.asarray(batch.action_mask)[:, None]
    if draws.delay is None:
        return action_mask

    # Steps past an episode's end come last: a delay that reaches them leaves nothing to score, and nothing is.
    return action_mask & ~flow.first_steps(draws.delay, batch.actions.shape[1])[..., None]


def flow_matching_loss(
    velocity: Float[Array, "*b H D"], target: Float[Array, "*b H D"], action_mask: Bool[Array, "*c H D"]
) -> Float[Array, "*b H"]:
    """Squared error of each step of the horizon: the mean over the action dimensions the robot has."""
    # `where` and not a product: 0 · NaN is NaN. No other mask: `loss_mask` is about tokens and never comes here.
    error = jnp.where(action_mask, jnp.square(velocity - target), 0.0)

    # By the robot's own dimensions: divided by the model's 32, a robot of 7 would count for a quarter.
    return jnp.sum(error, axis=-1) / jnp.maximum(jnp.sum(action_mask, axis=-1), 1)


def masked_mean(
    per_step: Float[Array, "*b H"], action_mask: Bool[Array, "*c H D"], count: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    """Mean over every real step; 0 where there is none. Padded steps hold 0 already and are not counted. `count`:
    divide by this instead, the steps of a batch of which these are a part."""
    # Divided by the real count, and not by B·K·H: else a batch with many episode ends would teach less.
    if count is None:
        count = jnp.sum(jnp.broadcast_to(jnp.any(action_mask, axis=-1), per_step.shape))
    return jnp.sum(per_step) / jnp.maximum(count, 1)


# --- tokens ----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What the token loss scores, at most U = `max_fast_len` tokens a sample.

    `positions`: where the hidden state that predicts the token is, images counted: one before the token itself.
    `labels`: the tokens. `valid`: whether a slot holds one. `complete`: every token of `loss_mask` found a slot.
    """

    positions: Int[Array, "B U"]
    labels: Int[Array, "B U"]
    valid: Bool[Array, "B U"]
    complete: Bool[Array, ""]


def scored_tokens(batch: Batch, config: ModelConfig) -> Targets | None:
    """The tokens of `loss_mask`, in order. None without tokens."""
    if batch.observation.tokens is None or batch.loss_mask is None:
        return None

    # A stable sort brings the scored tokens to the front in their order, so that their number is a static size. Where
    # fewer are scored, the last slots hold others: their labels are never counted.
    loss_mask = jnp.asarray(batch.loss_mask, bool)
    order = jnp.argsort(~loss_mask, axis=1, stable=True)[:, : config.max_fast_len]
    valid = gather_positions(loss_mask, order)

    return Targets(
        # A hidden state predicts the token after its own. The first text column is BOS, so with images before it even
        # an unscored slot points at a column that exists.
        positions=config.num_image_tokens + order - 1,
        labels=gather_positions(jnp.asarray(batch.observation.tokens), order),
        valid=valid,
        complete=jnp.sum(valid) == jnp.sum(loss_mask),  # of the whole batch: one sample cut short is enough
    )


def token_loss(
    hidden: Float[Array, "B _ W"],
    embedding: Float[Array, "V W"],
    targets: Targets | None,
    config: ModelConfig,
    whole: Scored,
) -> tuple[Float[Array, ""], Metrics]:
    """Next-token cross-entropy summed over exactly `targets`, over the scored tokens of the whole batch; `hidden` are
    the states at `targets.positions`, gathered before the vocabulary product. NaN where not every scored token found a
    slot (`compute_loss`)."""
    if targets is None:
        nothing = jnp.zeros(())
        return nothing, {"scored_tokens": nothing, "token_accuracy": nothing}

    # Few rows: float32, because their gradient is summed over the pieces of the vocabulary.
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
    labels = targets.labels.reshape(-1)
    loss, correct = cross_entropy(rows, embedding, labels, config.compute.dtype, config.compute.vocab_chunk)

    # A mean over all scored tokens of the batch, not of samples: a long chunk counts for as many tokens as it has.
    weight = targets.valid.reshape(-1).astype(jnp.float32)
    denominator = jnp.maximum(whole.tokens, 1)  # nothing to score gives 0, not 0 / 0

    return jnp.where(targets.complete, jnp.sum(loss * weight) / denominator, jnp.nan), {
        "scored_tokens": jnp.sum(weight),
        "token_accuracy": jnp.sum(correct * weight) / denominator,
    }
