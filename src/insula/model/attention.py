"""Grouped-query attention, for one sequence and for the expert's reading of the backbone's memory.

Queries arrive scaled and rotated. Scores and softmax are float32; a masked score is so low that its weight is exactly
zero, which is what makes hidden columns hidden and not merely faint.

Each is written as `einsum`, for every letter to be seen: that is the reference, and the fastest on a CPU. What arrives
in fewer bits, as on accelerators, goes through JAX's own attention, as one call (`_fused`).
"""

import jax
import jax.numpy as jnp

from insula.shapes import Array, Bool, Float

# Gemma's number. Far below any score, so exp underflows to exactly 0.0 beside one that is not masked. It is finite on
# purpose: the row of a padding token has every key masked, and a softmax over -inf alone is NaN, which the backward
# pass would carry into every weight. Over equal finite scores it is uniform, and nothing ever reads that row.
MASKED = -2.3819763e38


def attend(
    q: Float[Array, "B queries N E"],
    k: Float[Array, "B J G E"],
    v: Float[Array, "B J G E"],
    mask: Bool[Array, "B queries J"] | None,
) -> Float[Array, "B queries N E"]:
    """Softmax attention; `mask[b, i, j]`: may query i see key j? None: everything."""
    if q.dtype != jnp.float32:
        return _fused(q, k, v, None if mask is None else mask[:, None])

    queries = _fold(q, k.shape[-2])  # [B, Q = queries·R, G, E]
    scores = jnp.einsum("bqge,bjge->bgqj", queries, k)

    if mask is not None:
        repeated = jnp.repeat(mask, queries.shape[1] // q.shape[1], axis=1)  # the R heads of a query see the same keys
        scores = jnp.where(repeated[:, None], scores, MASKED)

    weights = jax.nn.softmax(scores, axis=-1)
    return _unfold(jnp.einsum("bgqj,bjge->bqge", weights, v), q.shape)


def attend_with_memory(
    q: Float[Array, "B K A N E"],
    k: Float[Array, "B K A G E"],
    v: Float[Array, "B K A G E"],
    memory_k: Float[Array, "B M G E"],
    memory_v: Float[Array, "B M G E"],
    memory_mask: Bool[Array, "B M"],
    self_mask: Bool[Array, "A A"],
) -> Float[Array, "B K A N E"]:
    """One softmax over memory and self, as if both stood in one sequence: the expert's layers share the backbone's
    attention (π0 §IV). No output depends on another flow sample."""
    if q.dtype != jnp.float32:
        return _attend_to_one_sequence(q, k, v, memory_k, memory_v, memory_mask, self_mask)

    batch, samples = q.shape[:2]
    queries = _fold(q, k.shape[-2])  # [B, K, Q = A·R, G, E]
    per_sample, groups = queries.shape[2], queries.shape[3]
    weights = _memory_weights(queries, k, memory_k, memory_mask, self_mask)

    # Memory has no sample axis: all K samples read it in one product, and it is never repeated K times. Each reads its
    # own actions in another. Four samples cost a step 10 % more than one (docs/log.md).
    split = memory_k.shape[1]
    from_self = weights[..., split:].reshape(batch, groups, samples, per_sample, -1)
    out = jnp.einsum("bgqm,bmge->bqge", weights[..., :split], memory_v).reshape(queries.shape)
    return _unfold(out + jnp.einsum("bgkqa,bkage->bkqge", from_self, v), q.shape)


def memory_weights(
    q: Float[Array, "B K A N E"],
    k: Float[Array, "B K A G E"],
    memory_k: Float[Array, "B M G E"],
    memory_mask: Bool[Array, "B M"],
    self_mask: Bool[Array, "A A"],
) -> Float[Array, "B K A N M+A"]:
    """How much each query of `attend_with_memory` reads of each column: memory, then self. Rows sum to one."""
    q, k, memory_k = (x.astype(jnp.float32) for x in (q, k, memory_k))
    queries = _fold(q, k.shape[-2])
    weights = _memory_weights(queries, k, memory_k, memory_mask, self_mask)
    split = weights.reshape(*weights.shape[:2], *queries.shape[1:3], -1)  # [B, G, K, A·R, M+A]
    return _unfold(jnp.moveaxis(split, 1, 3), (*q.shape[:-1], weights.shape[-1]))


def _memory_weights(queries: Array, k: Array, memory_k: Array, memory_mask: Array, self_mask: Array) -> Array:
    """Of folded queries [B, K, A·R, G, E]: [B, G, K·A·R, M + A]."""
    batch, samples, per_sample, groups, width = queries.shape
    length = k.shape[2]
    everyone = queries.reshape(batch, -1, groups, width)

    # Every action token may see every visible column, so memory needs a row of mask, not a matrix.
    to_memory = jnp.einsum("bqge,bmge->bgqm", everyone, memory_k)
    to_memory = jnp.where(memory_mask[:, None, None, :], to_memory, MASKED)

    to_self = jnp.einsum("bkqge,bkage->bgkqa", queries, k)
    repeated = jnp.repeat(self_mask, per_sample // length, axis=0)
    to_self = jnp.where(repeated[None, None, None], to_self, MASKED)
    to_self = to_self.reshape(batch, groups, samples * per_sample, length)

    # One softmax over both: two would give memory half of the weight however little it has to say.
    return jax.nn.softmax(jnp.concatenate([to_memory, to_self], axis=-1), axis=-1)


def _attend_to_one_sequence(
    q: Array, k: Array, v: Array, memory_k: Array, memory_v: Array, memory_mask: Array, self_mask: Array
) -> Array:
    """`attend_with_memory`, with all flow samples in the one sequence [memory | sample 1 | … | sample K]."""
    batch, samples, length = q.shape[:3]
    own = jax.scipy.linalg.block_diag(*[self_mask] * samples)  # each sample sees its own actions alone
    memory = jnp.broadcast_to(memory_mask[:, None, :], (batch, samples * length, memory_mask.shape[-1]))
    mask = jnp.concatenate([memory, jnp.broadcast_to(own[None], (batch, *own.shape))], axis=-1)

    def join(memory: Array, x: Array) -> Array:
        return jnp.concatenate([memory.astype(x.dtype), x.reshape(batch, -1, *x.shape[3:])], axis=1)

    flat = q.reshape(batch, samples * length, *q.shape[3:])
    return _fused(flat, join(memory_k, k), join(memory_v, v), mask[:, None]).reshape(q.shape)


def _fused(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """JAX's attention: float32 scores and softmax of inputs of any type. `mask`: [B, 1, queries, J]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0)


def _fold(q: Array, groups: int) -> Array:
    """[..., queries, N, E] → [..., queries·R, G, E]: the R query heads that share a key head become R queries."""
    # An axis of its own for R would cost a third more time (68 against 50 ms a layer), even where R is 1.
    *lead, length, heads, width = q.shape
    return q.reshape(*lead, length, groups, heads // groups, width).swapaxes(-2, -3).reshape(*lead, -1, groups, width)


def _unfold(out: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_fold`, back to `shape`."""
    *lead, length, heads, width = shape
    groups = out.shape[-2]
    return out.reshape(*lead, length, heads // groups, groups, width).swapaxes(-2, -3).reshape(shape)
