"""One table per module says of each weight its shape, its axes and how it is initialized; all else derives from it."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from insula.shapes import Array, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shape, axis letters (`insula.shapes`; lower case for the input of a product) and initial value of one parameter.

    `normal` draws with standard deviation `std`; `grid` is a fixed 2-D sine/cosine position table scaled by `std`.
    Initialization, LoRA and `abstract_params`, which checkpoints are checked against, all start from it, so that none
    can disagree with the model about a shape.
    """

    shape: tuple[int, ...]
    axes: str
    init: Literal["zeros", "ones", "normal", "grid"] = "normal"
    std: float = 0.0


def zeros(axes: str, *shape: int) -> Weight:
    """A bias, or the offset of a norm's scale: nothing yet."""
    return Weight(shape, axes, "zeros")


def dense(axes: str, *shape: int, fan_in: int) -> Weight:
    """A matrix that keeps the variance of its input, summed over `fan_in` entries."""
    # Given and not read off the shape: with depth in front and heads at either end, no rule over axes finds it.
    return Weight(shape, axes, "normal", 1 / math.sqrt(fan_in))


def _grid(shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Sine and cosine of row and column, a quarter of the width each, at up to one period per two patches.

    The usual geometric frequencies leave most entries constant on a small grid; these all tell patches apart.
    """
    patches, width = shape
    side = math.isqrt(patches)

    # Linear frequencies from half a period over the picture, where each place is its own, to one period in two patches,
    # the finest that a grid can show.
    center = (np.stack(np.divmod(np.arange(patches), side)) + 0.5) / side
    angle = np.pi * center[..., None] * np.linspace(0.5, side, -(-width // 4))
    table = np.concatenate([np.sin(angle[0]), np.cos(angle[0]), np.sin(angle[1]), np.cos(angle[1])], axis=1)

    # A width that four does not divide: the last columns of the last quarter are dropped.
    return (scale * table[:, :width]).astype(np.float32)


def _initial(weight: Weight, rng: PRNGKeyArray) -> Array:
    match weight.init:
        case "zeros":
            return jnp.zeros(weight.shape)
        case "ones":
            return jnp.ones(weight.shape)
        case "grid":
            return jnp.asarray(_grid(weight.shape, weight.std))
        case "normal":
            return weight.std * jax.random.normal(rng, weight.shape)


def is_weight(x: object) -> bool:
    """For `is_leaf` of a walk over a weight table."""
    return isinstance(x, Weight)


def initialize(table: Any, rng: PRNGKeyArray) -> Any:
    """The table's tree with every `Weight` drawn, float32."""
    leaves, tree = jax.tree.flatten(table, is_leaf=is_weight)

    # One key for each leaf by its place in the tree, used or not: how one weight starts changes no other's draw.
    keys = jax.random.split(rng, len(leaves))
    return jax.tree.unflatten(tree, [_initial(w, key) for w, key in zip(leaves, keys, strict=True)])
