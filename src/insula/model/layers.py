"""The small functions every tower is made of. All are plain functions of (weights, inputs).

Precision, in one place. Matrix products read `dtype` and accumulate in float32. What they give, as all that layers hand
on, has the type of what they are given: `enter` decides it once, where a sequence enters its tower. Norms, softmax,
rotary angles and the loss are computed in float32 whatever is handed on: a mean of squares would lose its last digits.

    on a CPU             handed on in float32: products with a bfloat16 result are the slowest there are
    on an accelerator    handed on in bfloat16: half of the memory, and of what is read and written between products
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from insula.model.config import ComputeConfig
from insula.model.lora import LoRA
from insula.shapes import AnyArray, Array, Float, Int, Leaf, Shaped

PRODUCT = "product"
"""The name of a matrix product's result, for `ComputeConfig.remat`: JAX's own policies do not see into `_product`."""
BATCH_AXES = ("data", "fsdp")
"""Axes of the mesh (insula.parallel) over which samples are split."""


def enter(x: Float[Array, "*b W"], compute: ComputeConfig) -> Float[Array, "*b W"]:
    """The same values in the type that layers hand on (`ComputeConfig.stream`)."""
    wide = compute.stream == "float32" or (compute.stream == "auto" and jax.default_backend() == "cpu")
    return x.astype("float32" if wide else compute.dtype)


# A custom backward pass, because the one JAX derives would multiply the float32 gradient of the result, not `dtype`.
# On a CPU with AVX-512, bfloat16 in and float32 out is the fastest, and bfloat16 in and out the slowest.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Array, dtype: str) -> Array:
    """[..., i] @ [i, o]. Reads `dtype`, accumulates float32 and gives the type of x, forwards and backwards."""
    return lax.dot_general(
        x.astype(dtype), w.astype(dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=x.dtype
    )


def _product_forward(x: Array, w: Array, dtype: str) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, w, dtype), (x, w)


def _product_backward(dtype: str, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    rows = tuple(range(x.ndim - 1))
    g16, x16, w16 = g.astype(dtype), x.astype(dtype), w.astype(dtype)
    dx = lax.dot_general(g16, w16, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    # Always in float32: gradients of parts of a batch are added up.
    dw = lax.dot_general(x16, g16, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def _contract(x: Array, w: Array | LoRA, axes: int, dtype: str) -> Array:
    """The last `axes` axes of x against the first of w. With LoRA the merged matrix never exists."""
    if isinstance(w, LoRA):
        update = _contract(_contract(x, w.a, axes, dtype), w.b, 1, dtype)
        return _contract(x, w.base, axes, dtype) + w.scale * update

    # Always one plain product: CPUs are slow at a contraction over several axes, and `_product` has one backward pass.
    batch, out = x.shape[: x.ndim - axes], w.shape[axes:]
    flat = _product(x.reshape(*batch, -1), w.reshape(math.prod(w.shape[:axes]), -1), dtype)
    return checkpoint_name(flat.reshape(*batch, *out), PRODUCT)


def widen(x: Shaped[AnyArray, "*c"], rank: int) -> Shaped[AnyArray, "..."]:
    """Axes of one in front, up to `rank` axes: how a scale or bias of the last axes meets what it is applied to."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def matmul(x: Float[Array, "*b i"], w: Float[Array, "i *o"] | LoRA, dtype: str) -> Float[Array, "..."]:
    """A matrix product over the last axis of x and the first of w; further axes of w (heads) come out as they are."""
    return _contract(x, w, 1, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix and an offset."""

    kernel: Leaf
    bias: Leaf


def linear(x: Float[Array, "*b i"], weight: Linear, dtype: str) -> Float[Array, "..."]:
    """x · kernel + bias. Further axes of the kernel (heads) come out as they are, with a bias of their own."""
    y = matmul(x, weight.kernel, dtype)
    return add_bias(y, weight.bias)


def add_bias(y: Float[Array, "..."], bias: Float[Array, "*o"]) -> Float[Array, "..."]:
    """An offset of the last axes, in the type of y."""
    return y + widen(bias, y.ndim).astype(y.dtype)


def merge_heads(x: Float[Array, "*b N E"], w: Float[Array, "N E W"] | LoRA, dtype: str) -> Float[Array, "*b W"]:
    """The attention output projection: heads and head dimension back to the residual width."""
    return _contract(x, w, 2, dtype)


def rms_norm(x: Float[Array, "*b W"], scale: Float[Array, "W"]) -> Float[Array, "*b W"]:
    """Gemma's RMSNorm over the last axis."""
    # The learned scale is an offset from one, so that zeros are the identity. Gemma's files hold that offset: without
    # the 1 they would load without an error and answer nonsense.
    return (_unit_rms(x) * (1 + widen(scale, x.ndim))).astype(x.dtype)


def ada_rms_norm(
    x: Float[Array, "B K A W"], modulation: Float[Array, "B K 3*W"] | Float[Array, "B K A 3*W"]
) -> tuple[Float[Array, "B K A W"], Float[Array, "B K _ W"]]:
    """adaRMS (π0.5, arXiv 2504.16054): scale and shift come from the flow time, and so does the gate of the branch.

    Returns the modulated input and the gate, for `x + gate * branch(...)`. This is adaLN-Zero of DiT (Peebles & Xie
    2023, §3.2) with an RMSNorm. One modulation for all tokens of a chunk, or one for each.
    """
    # Usually all tokens of a chunk share one flow time. With a clean prefix (`flow.hold`) each has its own.
    if modulation.ndim < x.ndim:
        modulation = modulation[:, :, None, :]

    scale, shift, gate = jnp.split(modulation, 3, axis=-1)  # openpi's order; weights are read in it
    return (_unit_rms(x) * (1 + scale) + shift).astype(x.dtype), gate.astype(x.dtype)


def _unit_rms(x: Array) -> Array:
    x = x.astype(jnp.float32)
    # 1e-6 as in Gemma: small beside any real activation, and a row of zeros stays zeros rather than NaN.
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def layer_norm(x: Float[Array, "*b W"], scale: Float[Array, "W"], bias: Float[Array, "W"]) -> Float[Array, "*b W"]:
    """Over the last axis, as in the ViT. Here the scale is a plain factor, not an offset from one."""
    # From centered values: the mean of squares less the square of the mean would cancel in float32.
    exact = x.astype(jnp.float32)
    centered = exact - jnp.mean(exact, axis=-1, keepdims=True)
    unit = centered * lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + 1e-6)
    return (unit * widen(scale, x.ndim) + widen(bias, x.ndim)).astype(x.dtype)


def geglu(x: Array, gate: Array | LoRA, up: Array | LoRA, down: Array | LoRA, dtype: str) -> Array:
    """Gemma's feed-forward: down(gelu(gate(x)) · up(x))."""
    # JAX's default GELU is the tanh approximation, which is the one Gemma and SigLIP were trained with.
    return matmul(jax.nn.gelu(matmul(x, gate, dtype)) * matmul(x, up, dtype), down, dtype)


def rope(
    x: Float[Array, "*b tokens heads E"], positions: Int[Array, "*#b tokens"]
) -> Float[Array, "*b tokens heads E"]:
    """Rotary position embedding (Su et al. 2021) of queries or keys, wavelengths 2π … 10,000 · 2π (Gemma)."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)

    # float32 even where products read bfloat16, which cannot tell position 257 from 256.
    angle = positions[..., None, None].astype(jnp.float32)
    angle = angle * widen(frequency, angle.ndim)
    sin, cos = jnp.sin(angle), jnp.cos(angle)

    # The first half turns against the second, as in Gemma. Neighbors turning in pairs, as the paper has it, is the same
    # function of other weights, so weights of one kind are worthless in the other.
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def time_embedding(
    time: Float[Array, "*b"], width: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "*b width"]:
    """Sine and cosine of the flow time at `width / 2` periods, spaced geometrically from `min_period` to `max_period`.

    All float32, in openpi's order: at 250 turns rounding shows in the fourth digit, and weights were trained with it.
    """
    # numpy and not jnp: computed once, and rounded the same way inside a compiled program as outside.
    fraction = np.linspace(0.0, 1.0, width // 2, dtype=np.float32)
    period = np.float32(min_period) * np.float32(max_period / min_period) ** fraction
    angle = time[..., None] * widen(np.float32(1) / period * np.float32(2 * np.pi), time.ndim + 1)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def place(x: Shaped[Array, "*c"], *axes: str | tuple[str, ...] | None) -> Shaped[Array, "*c"]:
    """The same values, each axis split over these axes of the mesh, if there is a mesh and it fits: said where XLA's
    own choice was a bad one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x

    for size, split in zip(x.shape, axes, strict=False):
        names = (split,) if isinstance(split, str) else split or ()
        if size % math.prod(mesh.shape[name] for name in names):  # a few samples are on every device
            return x

    return lax.with_sharding_constraint(x, PartitionSpec(*axes))


def split_by_sample(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
    """Each device has its own samples, whole."""
    return place(x, BATCH_AXES)


def look_up(table: Float[Array, "V W"], tokens: Int[Array, "B L"]) -> Float[Array, "B L W"]:
    """Rows of an embedding."""
    # A device has some columns of every row (insula.parallel.sharding). It reads these for its whole group, and the
    # columns change places with the samples: the table, a gigabyte and more, stays where it is.
    data, fsdp = BATCH_AXES
    columns = place(table[place(tokens, data)], data, None, fsdp)
    return split_by_sample(columns)


Layer = Callable[[Any, Any], tuple[Any, Any]]
"""(carry, the weights of one layer) → (carry, what is kept of it)."""

KEPT = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "all": jax.checkpoint_policies.nothing_saveable,
}
"""By `ComputeConfig.remat`, what the backward pass finds beside each layer's input: the results of its matrix products
with weights, or nothing. All else is computed again."""


def walk(body: Layer, carry: Any, layers: Any, compute: ComputeConfig, last: Layer | None = None) -> tuple[Any, Any]:
    """`lax.scan(body, carry, layers)` over stacked layers: unrolled, or one compiled body.

    Unrolled the last layer can have a body of its own, `last`. Unrolled a step is faster on a CPU; scanned it needs
    a fraction of the time to compile, and with `remat` of the memory. So a small model is unrolled and a large one
    scanned.
    """
    scan = compute.scan_layers

    # Weights come to the samples, not samples to the weights: said where a layer begins, or XLA might choose otherwise
    # for some of them, and send activations round.
    def prepared(body: Layer) -> Layer:
        def local(carry: Any, layer: Any) -> tuple[Any, Any]:
            return body(jax.tree.map(split_by_sample, carry), layer)

        if compute.remat == "none":
            return local

        # Inside a scan nothing can be merged with its recomputed copy, so `prevent_cse`, which costs time to rule that
        # out, is not needed there.
        return jax.checkpoint(local, policy=KEPT[compute.remat], prevent_cse=not scan)

    if scan:
        assert last is None
        return lax.scan(prepared(body), carry, layers)

    # One `split`, whose gradient is one concatenation. The gradient of indexing would be the whole stack, zero but for
    # one layer, and all of these would be added up.
    leaves, tree = jax.tree.flatten(layers)
    depth = leaves[0].shape[0]
    pieces = [[piece[0] for piece in lax.split(leaf, [1] * depth)] for leaf in leaves]

    bodies = [body] * (depth - 1) + [last or body]
    outputs = []
    for i, layer in enumerate(bodies):
        carry, out = prepared(layer)(carry, jax.tree.unflatten(tree, [piece[i] for piece in pieces]))
        outputs.append(out)

    return carry, jax.tree.map(lambda *xs: jnp.stack(xs), *outputs)
