"""Where the expert looks: the weights of its attention, which the model itself does not return."""

import jax.numpy as jnp

from insula.model.attention import attend_with_memory, memory_weights
from insula.model.config import ModelConfig
from insula.model.expert import Expert, run_expert
from insula.model.insulation import Memory
from insula.shapes import Array, Float


def expert_look(
    expert: Expert,
    config: ModelConfig,
    memory: Memory,
    state: Float[Array, "B S"],
    noisy_actions: Float[Array, "B K H D"],
    time: Float[Array, "B K"],
) -> Float[Array, "B K X N columns"]:
    """How much the action tokens read of each column of the memory, then of each other (M + A columns, which sum to
    one), in every layer and head: the mean over the tokens of each noisy chunk. Arguments as `run_expert` has them."""
    watched: list[Array] = []

    # The attention itself does not return its weights: compute them beside it, layer by layer.
    def attend(q: Array, k: Array, v: Array, memory_k: Array, memory_v: Array, memory_mask: Array, own: Array) -> Array:
        watched.append(memory_weights(q, k, memory_k, memory_mask, own))
        return attend_with_memory(q, k, v, memory_k, memory_v, memory_mask, own)

    # Unrolled: a scan calls it once for all layers.
    unrolled = config.with_compute(scan_layers=False, remat="none")
    run_expert(expert, unrolled, memory, state, noisy_actions, time, attend)

    weights = jnp.stack(watched, axis=2)  # [B, K, X, A, N, M+A]
    return jnp.mean(weights[:, :, :, -config.horizon :], axis=3)  # without the state's token
