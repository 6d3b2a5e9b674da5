"""LoRA (Hu et al. 2021, §4.1): a matrix that stays as it is, and a product of two thin ones that learns beside it.

A `LoRA` stands where a matrix stood, so code that walks the parameters (initialization, checkpoints, averaging, layers)
needs to know nothing of it, but for `layers.matmul` and `layers.merge_heads`, which multiply by it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from insula.model.config import LoraConfig
from insula.model.weights import Weight, dense, is_weight, zeros
from insula.shapes import Leaf

INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}
"""The matrices of a Gemma layer, and how many of their axes (after depth) a product sums over."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Multiplies like base + scale · a·b. Stacked over depth: base [X, inputs, outputs], a [X, inputs, r], b
    [X, r, outputs], where inputs and outputs are as many axes as the base has. `scale` is alpha / rank."""

    base: Leaf
    a: Leaf
    b: Leaf
    scale: float = dataclasses.field(metadata={"static": True})  # a leaf would be trained, averaged and clipped


def is_lora(x: object) -> bool:
    """For `is_leaf`: a `LoRA` is a node of the tree, and is to be met whole where a matrix is."""
    return isinstance(x, LoRA)


def adapt(part: Any, config: LoraConfig) -> Any:
    """The weight table of a backbone or expert with a `LoRA` of weights in place of each matrix of `INPUT_AXES`."""
    # Norms are few numbers already, and the embedding is read by a lookup: there is no product to put an update beside.
    adapted = {name: _adapted(getattr(part.layers, name), inputs, config) for name, inputs in INPUT_AXES.items()}
    return dataclasses.replace(part, layers=dataclasses.replace(part.layers, **adapted))


def _adapted(base: Weight, inputs: int, config: LoraConfig) -> LoRA:
    """b starts at zero: nothing is changed yet. a starts as any matrix does: else no gradient would reach b."""
    # The depth is an axis of both: every layer has its own update.
    split, rank = 1 + inputs, config.rank
    a = dense(f"{base.axes[:split]}r", *base.shape[:split], rank, fan_in=math.prod(base.shape[1:split]))
    b = zeros(f"{base.axes[0]}r{base.axes[split:]}", base.shape[0], rank, *base.shape[split:])
    return LoRA(base, a, b, config.alpha / rank)


def trained(part: Any) -> Any:
    """Of an adapted weight table: True for each a and b, False for all else, norms and embeddings among it."""

    def mark(leaf: Weight | LoRA) -> Any:
        return dataclasses.replace(leaf, base=False, a=True, b=True) if isinstance(leaf, LoRA) else False

    # A `Weight` has fields, but is one leaf.
    return jax.tree.map(mark, part, is_leaf=lambda x: is_lora(x) or is_weight(x))


def merge(params: Any) -> Any:
    """Plain parameters that do the same, base + scale · a·b in float32: to export, or to serve a little faster.

    They belong to the config with `lora=None`.
    """

    def plain(leaf: Leaf) -> Leaf:
        if not isinstance(leaf, LoRA):
            return leaf

        depth, rank = leaf.b.shape[:2]
        a, b = leaf.a.reshape(depth, -1, rank), leaf.b.reshape(depth, rank, -1)
        update = jnp.matmul(a, b, precision="highest")  # GPUs and TPUs would round the inputs to fewer bits
        return leaf.base + leaf.scale * update.reshape(leaf.base.shape)

    return jax.tree.map(plain, params, is_leaf=is_lora)
