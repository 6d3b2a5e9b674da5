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


def insulate(prefix: BackboneOutput, columns: int, stop: bool = True) -> Memory:
    """Keep the first `columns` positions (all images and the longest prompt), hide FAST tokens and padding among
    them, and stop the gradient. `stop=False` is the un-insulated control; FAST tokens stay hidden all the same."""
    # Cut as well as masked: the expert's attention is narrower by the FAST columns, and shapes are those of serving.
    visible = masks.visible_to_expert(prefix.token_mask, prefix.ar_mask)[:, :columns]
    keys, values = prefix.keys[:, :, :columns], prefix.values[:, :, :columns]

    # Keys and values both: either alone would carry the flow loss into every layer below.
    if stop:
        keys, values = jax.lax.stop_gradient((keys, values))

    # Of real tokens, not of columns: neither padding nor FAST tokens may move the expert's rotary positions.
    return Memory(keys, values, visible, jnp.sum(visible, axis=1, dtype=jnp.int32))


def freeze(tree: _Tree) -> _Tree:
    """The same values without any gradient: for parts that are not to be trained."""
    # Here, and not in `losses`, so that this file is the only one in which a gradient can be stopped (a test looks).
    return jax.lax.stop_gradient(tree)
