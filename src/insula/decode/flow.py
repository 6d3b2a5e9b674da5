"""Flow sampling: one backbone pass, then Euler steps on the expert alone (π0, Black et al. 2024, §IV)."""

import jax.numpy as jnp

from insula import flow
from insula.batch import Observation, Previous
from insula.decode.realtime import guide, keep
from insula.model.backbone import run_backbone
from insula.model.config import ModelConfig
from insula.model.expert import run_expert
from insula.model.insulation import Memory, insulate
from insula.model.params import Params
from insula.shapes import AnyArray, Array, Bool, Float

FLOW_STEPS = 10  # as in π0 (§IV) and openpi


def sample_actions(
    params: Params,
    config: ModelConfig,
    observation: Observation,
    noise: Float[Array, "B H D"],
    steps: int = FLOW_STEPS,
    real: Bool[AnyArray, "H D"] | None = None,
    previous: Previous | None = None,
) -> Float[Array, "B H D"]:
    """Normalized chunks: the prefix is read once, then the expert alone takes `steps` Euler steps from t = 1 to 0.

    `noise` is x at t = 1, standard normal: the caller draws it, so that a chunk can be replayed.
    `real` marks the values this robot has, all by default. The others go straight to 0, as the expert saw them do in
    training: t · noise. (It is not asked for their velocity, on which it was never scored.)
    `previous` is what the chunks go on from (`insula.decode.realtime`): a model trained with `rtc_max_delay` is given
    the steps of the delay, which may not be longer than that; any other is guided.
    """
    memory = read_prefix(params, config, observation)

    def velocity(x: Array, time: Array) -> Array:
        # Training gives the expert K draws of noise for each chunk: here K is 1. Time is [B], or [B, H] as in training
        # with delays.
        found = run_expert(params.expert, config, memory, observation.state, x[:, None], time[:, None])[:, 0]
        return found if real is None else jnp.where(real[None], found, noise)

    if previous is None:
        return flow.integrate(velocity, noise, steps)

    if config.objective.rtc_max_delay > 0:
        return flow.integrate(*keep(velocity, noise, previous), steps)

    return flow.integrate(guide(velocity, previous, real), noise, steps)


def read_prefix(params: Params, config: ModelConfig, observation: Observation) -> Memory:
    """The same path as in training, with no FAST suffix."""
    prefix = run_backbone(params.vision, params.backbone, config, observation)
    # There is no gradient to stop here. What counts is that the same columns are kept, and FAST's are not among them.
    return insulate(prefix, config.num_memory)
