"""Grouped-query attention, for one sequence and for the expert's reading of the backbone's memory.

Queries arrive scaled and rotated. Scores and softmax are float32; a masked score is so low that its weight is exactly
zero, which is what makes hidden columns hidden and not merely faint.
"""

import jax
import jax.numpy as jnp

from insula.shapes import Array, Bool, Float

MASKED = -2.3819763e38  # as in Gemma: exp underflows to 0.0, yet a fully masked row stays finite


def attend(
    q: Float[Array, "B T N E"], k: Float[Array, "B S G E"], v: Float[Array, "B S G E"], mask: Bool[Array, "B T S"] | None
) -> Float[Array, "B T N E"]:
    """Softmax attention; `mask[b, t, s]`: may t see s? None: everything."""
    grouped = _group(q, k.shape[-2])
    scores = jnp.einsum("btgre,bsge->bgrts", grouped, k)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    out = jnp.einsum("bgrts,bsge->btgre", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(q.shape)


def attend_with_memory(
    q: Float[Array, "B K A N E"],
    k: Float[Array, "B K A G E"],
    v: Float[Array, "B K A G E"],
    memory_k: Float[Array, "B M G E"],
    memory_v: Float[Array, "B M G E"],
    memory_mask: Bool[Array, "B M"],
    self_mask: Bool[Array, "A A"],
) -> Float[Array, "B K A N E"]:
    """One softmax over memory and self. The K flow samples read one memory, which is never repeated for them."""
    grouped = _group(q, k.shape[-2])
    to_memory = jnp.einsum("bkagre,bmge->bgrkam", grouped, memory_k)
    to_self = jnp.einsum("bkagre,bkcge->bgrkac", grouped, k)
    to_memory = jnp.where(memory_mask[:, None, None, None, None], to_memory, MASKED)
    to_self = jnp.where(self_mask, to_self, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_memory, to_self], axis=-1), axis=-1)
    split = memory_k.shape[1]
    out = jnp.einsum("bgrkam,bmge->bkagre", weights[..., :split], memory_v)
    out += jnp.einsum("bgrkac,bkcge->bkagre", weights[..., split:], v)
    return out.reshape(q.shape)


def _group(q: Array, groups: int) -> Array:
    """[..., N, E] → [..., G, R, E]: consecutive query heads share a key/value head."""
    return q.reshape(*q.shape[:-2], groups, q.shape[-2] // groups, q.shape[-1])
