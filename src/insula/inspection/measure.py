"""What a model makes of one sample: every token's probability, the flow error over time, where the expert looks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from insula import flow
from insula.batch import Batch, Observation
from insula.compile import compiled_quickly
from insula.decode.flow import sample_actions
from insula.decode.look import expert_look
from insula.losses import Targets, draw, expert_loss, scored_tokens
from insula.model.backbone import BackboneOutput, run_backbone
from insula.model.config import ModelConfig
from insula.model.expert import Expert, run_expert
from insula.model.insulation import Memory, insulate
from insula.model.params import Params
from insula.shapes import AnyArray, Array, Bool, PRNGKeyArray
from insula.tokens import masks

TOP = 5
"""Likeliest tokens to show in a token's place."""
TIMES = tuple(np.linspace(0.05, 1.0, 20).round(2).tolist())
"""Flow times the error is measured at; 1 is noise."""
DRAWS = 8
"""Noise draws for each of them, the same for all."""
EXPECTED_DRAWS = 64
"""Draws of noise and time for the flow loss as training takes it."""
LOOK_TIMES = (1.0, 0.5, 0.1)
"""Flow times at which the expert's attention is watched."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenScores:
    """[U] for each scored token: its column, −log p and p; [U, TOP] the likeliest tokens in its place and their p.
    Slots where `valid` is False hold nothing."""

    column: Array
    valid: Array
    loss: Array
    probability: Array
    likeliest: Array
    likelihood: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowScores:
    """error [TIMES, H, D]: mean squared error of the velocity, 0 where nothing is scored. loss: what training would
    see, the mean over EXPECTED_DRAWS. chunk [H, D]: what the policy does, normalized."""

    error: Array
    loss: Array
    chunk: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleMeasures:
    """look [LOOK_TIMES, X, N, M+A]: how much the action tokens read of each column of the memory, then of each other,
    the mean over them."""

    tokens: TokenScores
    flow: FlowScores
    look: Array


Measure = Callable[[Params, Batch, Bool[AnyArray, "H D"], PRNGKeyArray], SampleMeasures]
Score = Callable[[Params, Batch], TokenScores]


def make_measure(config: ModelConfig) -> Measure:
    """A function of parameters, a batch of one, which values of a chunk its robot has, and a key; compiled once. In
    float32, whatever the config computes in."""
    config = config.with_objective(flow_samples=EXPECTED_DRAWS).with_compute(dtype="float32")

    def measure(params: Params, batch: Batch, has_value: Array, rng: PRNGKeyArray) -> SampleMeasures:
        prefix, tokens = _read(params, config, batch)
        memory = insulate(prefix, config.num_memory)

        # The policy's chunk is read as serving reads it, with no answer in sight: what it shows is what a robot would
        # do.
        noise = jax.random.normal(rng, (DRAWS, *batch.actions.shape[1:]))
        served = as_served(batch, config)
        flow_scores = FlowScores(
            error=_flow_error(params.expert, config, memory, batch, noise),
            loss=expert_loss(params.expert, config, memory, batch, draw(config, 1, rng)),
            chunk=sample_actions(params, config, served, noise[:1], real=has_value)[0],
        )

        return SampleMeasures(tokens, flow_scores, _expert_look(params.expert, config, memory, batch, noise[0]))

    return compiled_quickly(measure)


def make_score(config: ModelConfig) -> Score:
    """The token scores of `make_measure` alone, for a batch of one that may have been put together by hand."""
    config = config.with_compute(dtype="float32", scan_layers=False, remat="none")
    return compiled_quickly(lambda params, batch: _read(params, config, batch)[1])


def as_served(batch: Batch, config: ModelConfig) -> Observation:
    """The prompt alone, as when acting."""
    # The causal part becomes padding, and the columns that only it can reach are cut off.
    seen, width = batch.observation, config.max_prompt_len
    assert seen.tokens is not None and seen.token_mask is not None

    prompt = jnp.asarray(seen.token_mask, bool) & ~masks.is_suffix(batch.ar_mask)
    return dataclasses.replace(seen, tokens=seen.tokens[:, :width], token_mask=prompt[:, :width])


def _read(params: Params, config: ModelConfig, batch: Batch) -> tuple[BackboneOutput, TokenScores]:
    """One backbone pass over all of the sequence, and what it makes of each scored token."""
    targets = scored_tokens(batch, config)
    assert targets is not None
    prefix = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask, targets.positions)
    return prefix, _token_scores(prefix.hidden[0], params.backbone.embedding, targets)


def _token_scores(hidden: Array, embedding: Array, targets: Targets) -> TokenScores:
    """As `insula.losses.token_loss` scores them, with every logit at hand: one sample is small enough."""
    log_p = jax.nn.log_softmax(hidden @ embedding.T, axis=-1)
    own = jnp.take_along_axis(log_p, targets.labels[0][:, None], axis=1)[:, 0]
    best, which = jax.lax.top_k(log_p, TOP)

    return TokenScores(
        column=targets.positions[0] + 1,  # a position is where the token is predicted, one before the token itself
        valid=targets.valid[0],
        loss=-own,
        probability=jnp.exp(own),
        likeliest=which,
        likelihood=jnp.exp(best),
    )


def _flow_error(expert: Expert, config: ModelConfig, memory: Memory, batch: Batch, noise: Array) -> Array:
    """[TIMES, H, D], mean over the draws."""
    # All times and draws in one call, as flow samples of one chunk. The same noise at every time, so that the curve
    # over time is not rough by chance.
    time = jnp.repeat(jnp.asarray(TIMES), DRAWS)[None]
    noise = jnp.tile(noise, (len(TIMES), 1, 1))[None]
    actions = batch.actions[:, None]

    velocity = run_expert(expert, config, memory, batch.observation.state, flow.add_noise(actions, noise, time), time)
    error = jnp.square(velocity - flow.target_velocity(actions, noise))
    error = jnp.where(batch.action_mask[:, None], error, 0.0)
    return jnp.mean(error.reshape(len(TIMES), DRAWS, *error.shape[2:]), axis=1)


def _expert_look(expert: Expert, config: ModelConfig, memory: Memory, batch: Batch, noise: Array) -> Array:
    """[LOOK_TIMES, X, N, M+A], with one draw of noise."""
    time = jnp.asarray(LOOK_TIMES)[None]
    noisy = flow.add_noise(batch.actions[:, None], jnp.broadcast_to(noise, (1, len(LOOK_TIMES), *noise.shape)), time)
    return expert_look(expert, config, memory, batch.observation.state, noisy, time)[0]
