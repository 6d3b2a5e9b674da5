"""Cross-entropy over a vocabulary too large to hold all logits at once.

A batch of 32 samples with 180 scored tokens and 257,152 entries has 5.9 GB of float32 logits. Here they exist a chunk
of the vocabulary at a time: forwards by an online softmax (Milakov & Gimelshein 2018), backwards computed again.

The chunks are of the vocabulary and not of the tokens: the gradient of the embedding is as large as the embedding,
and chunks of tokens would each add to all of it, which was worse than no chunks. Measured at 257,152 entries: 786 MiB
of temporary memory without chunks, 625 MiB in chunks of 16,072 for a fifth more time, 9,766 MiB with one-hot labels
and logits for every position (docs/log.md).
"""

from functools import partial

import jax
import jax.numpy as jnp

from insula.errors import InputError
from insula.shapes import Array, Bool, Float, Int


def cross_entropy(
    hidden: Float[Array, "n W"], embedding: Float[Array, "V W"], labels: Int[Array, "n"], dtype: str, chunk: int | None
) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """−log softmax(hidden · embeddingᵀ)[label], and whether the label is the likeliest token.

    With `chunk`, logits exist for that many vocabulary entries at a time, in the forward and the backward pass.
    Raises InputError where `chunk` does not divide the vocabulary.
    """
    chunk = chunk or embedding.shape[0]

    # A last chunk of another size would need a second program, or padding with entries that take probability.
    if embedding.shape[0] % chunk:
        raise InputError(f"vocab_chunk is {chunk}, expected a divisor of the vocabulary's {embedding.shape[0]} entries")

    return _cross_entropy(hidden, embedding, labels, dtype, chunk)


def _logits(hidden: Array, piece: Array, dtype: str) -> Array:
    """[n, chunk] float32, whatever is multiplied: a loss is a difference of two large logits, too fine for bfloat16."""
    return jax.lax.dot_general(
        hidden.astype(dtype), piece.astype(dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )


def _pieces(embedding: Array, labels: Array, chunk: int) -> tuple[Array, Array]:
    """The vocabulary in chunks, and where in each chunk every label would be: outside, for all chunks but its own."""
    pieces = embedding.reshape(-1, chunk, embedding.shape[1])
    return pieces, labels[None] - chunk * jnp.arange(pieces.shape[0])[:, None]


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

        # The sum so far is relative to the largest logit so far. When a larger one comes, it is scaled down to that.
        new = jnp.maximum(best, jnp.max(logits, axis=1))
        total = total * jnp.exp(best - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)

        # The label's logit from this very product: from another one it would differ in its last bits, and a label that
        # is the largest would be counted as not the likeliest (accuracies came out 30 to 55 % too low).
        here = jnp.take_along_axis(logits, jnp.clip(label, 0, chunk - 1)[:, None], axis=1)[:, 0]
        return (new, total, jnp.where((label >= 0) & (label < chunk), here, own)), None

    rows = hidden.shape[0]
    # exp(-inf - new) is 0: the first chunk has nothing before it.
    start = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(rows))
    (best, total, own), _ = jax.lax.scan(step, start, _pieces(embedding, labels, chunk))
    log_z = best + jnp.log(total)

    # Kept for the backward pass: one number for each row instead of its logits.
    return (log_z - own, own >= best), (hidden, embedding, labels, log_z)


def _cross_entropy_backward(dtype: str, chunk: int, residuals: tuple, gradient: tuple) -> tuple[Array, Array, None]:
    """(softmax − one-hot) · gradient, the logits computed again."""
    hidden, embedding, labels, log_z = residuals

    def step(d_hidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        piece, label = inputs
        # gradient[0] is the loss's. gradient[1] belongs to a bool, which has none.
        error = jnp.exp(_logits(hidden, piece, dtype) - log_z[:, None]) - (label[:, None] == jnp.arange(chunk)[None])
        error = (error * gradient[0][:, None]).astype(dtype)

        # A chunk's rows of the embedding get their gradient from this chunk alone; the hidden states from all of them.
        d_piece = jax.lax.dot_general(
            error, hidden.astype(dtype), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

        return d_hidden + jnp.dot(error, piece.astype(dtype), preferred_element_type=jnp.float32), d_piece

    d_hidden, d_pieces = jax.lax.scan(step, jnp.zeros_like(hidden), _pieces(embedding, labels, chunk))
    return d_hidden, d_pieces.reshape(embedding.shape), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
