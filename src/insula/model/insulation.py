"""Knowledge insulation (Driess et al. 2025, §III): the one place where gradients stop.

The expert's only way to the backbone is the `Memory` that `insulate` returns. Stopping the gradient of the prefix
*embeddings* would not do: every layer recomputes keys and values from its own weights. So it is stopped at the keys
and values themselves, and the columns of FAST tokens, the answer in another script, are cut off.
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
    visible = masks.visible_to_expert(prefix.token_mask, prefix.ar_mask)[:, :columns]
    keys, values = prefix.keys[:, :, :columns], prefix.values[:, :, :columns]
    if stop:
        keys, values = jax.lax.stop_gradient((keys, values))
    return Memory(keys, values, visible, jnp.sum(visible, axis=1, dtype=jnp.int32))


def freeze(tree: _Tree) -> _Tree:
    """The same values without any gradient: for parts that are not to be trained."""
    return jax.lax.stop_gradient(tree)
