"""Knowledge insulation (Driess et al. 2025, arXiv 2505.23705): the one place where gradients stop.

    backbone layer i ─ keys, values ─╂─► expert layer i        ╂  what the expert reads passes, no gradient comes back
    image | prompt | FAST columns
    ──── visible ───  ─ cut off ─

The expert's only way to the backbone is the `Memory` that `insulate` returns. Stopping the gradient of the prefix
*embeddings* would not do: every layer makes keys and values from its own weights, and measured, every transformer
weight then keeps its full gradient; only embedding and vision drop to zero. So it is stopped at the keys and values
themselves, and the columns of FAST tokens, which spell out the very actions the expert is to find, are cut off.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from insula.model.backbone import BackboneOutput
from insula.shapes import Array, Bool, Float, Int
from insula.tokens import masks

_Tree = TypeVar("_Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What the action expert knows of the observation: keys and values of the visible prefix, every layer."""

    keys: Float[Array, "X B M G E"]
    values: Float[Array, "X B M G E"]
    mask: Bool[Array, "B M"]
    length: Int[Array, "B"]
    """Real prefix tokens of each sample: the rotary position of the expert's first token."""


def insulate(prefix: BackboneOutput, columns: int, scale: float | Float[Array, ""] = 0.0) -> Memory:
    """Keep the first `columns` positions (all images and the longest prompt), hide FAST tokens and padding among
    them, and stop the gradient. `scale` is γ, how much of it passes: 0 is insulation, 1 the un-insulated control, and
    FAST tokens stay hidden with any."""
    # Cut as well as masked: the expert's attention is narrower by the FAST columns, and shapes are those of serving.
    visible = masks.visible_to_expert(prefix.token_mask, prefix.ar_mask)[:, :columns]
    # Keys and values both: either alone would carry the flow loss into every layer below.
    keys, values = scale_gradient((prefix.keys[:, :, :columns], prefix.values[:, :, :columns]), scale)

    # Of real tokens, not of columns: neither padding nor FAST tokens may move the expert's rotary positions.
    return Memory(keys, values, visible, jnp.sum(visible, axis=1, dtype=jnp.int32))


def scale_gradient(tree: _Tree, scale: float | Float[Array, ""]) -> _Tree:
    """The same values, `scale` times the gradient."""
    # The two ends are what everyone trains, and are programs of their own: exactly nothing, and exactly all.
    if isinstance(scale, float) and scale in (0.0, 1.0):
        return tree if scale else jax.lax.stop_gradient(tree)

    return _scale_gradient(tree, jnp.asarray(scale, jnp.float32))


@jax.custom_vjp
def _scale_gradient(tree: _Tree, scale: Float[Array, ""]) -> _Tree:
    return tree


def _scale_forward(tree: _Tree, scale: Array) -> tuple[_Tree, Array]:
    return tree, scale


def _scale_backward(scale: Array, gradient: _Tree) -> tuple[_Tree, Array]:
    return jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradient), jnp.zeros_like(scale)


_scale_gradient.defvjp(_scale_forward, _scale_backward)


def freeze(tree: _Tree) -> _Tree:
    """The same values without any gradient: for parts that are not to be trained."""
    # Here, and not in `losses`, so that this file is the only one in which a gradient can be stopped (a test looks).
    return jax.lax.stop_gradient(tree)
