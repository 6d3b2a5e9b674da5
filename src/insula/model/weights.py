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
    """

    shape: tuple[int, ...]
    axes: str
    init: Literal["zeros", "ones", "normal", "grid"] = "normal"
    std: float = 0.0


def zeros(axes: str, *shape: int) -> Weight:
    return Weight(shape, axes, "zeros")


def dense(axes: str, *shape: int, fan_in: int) -> Weight:
    """A matrix that keeps the variance of its input."""
    return Weight(shape, axes, "normal", 1 / math.sqrt(fan_in))


def _grid(shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Sine and cosine of row and column, a quarter of the width each, at up to one period per two patches.

    The usual geometric frequencies leave most entries constant on a small grid; these all tell patches apart.
    """
    patches, width = shape
    side = math.isqrt(patches)
    center = (np.stack(np.divmod(np.arange(patches), side)) + 0.5) / side
    angle = np.pi * center[..., None] * np.linspace(0.5, side, -(-width // 4))
    table = np.concatenate([np.sin(angle[0]), np.cos(angle[0]), np.sin(angle[1]), np.cos(angle[1])], axis=1)
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
    return isinstance(x, Weight)


def initialize(table: Any, rng: PRNGKeyArray) -> Any:
    """The table's tree with every `Weight` drawn, float32."""
    leaves, tree = jax.tree.flatten(table, is_leaf=is_weight)
    keys = jax.random.split(rng, len(leaves))
    return jax.tree.unflatten(tree, [_initial(w, key) for w, key in zip(leaves, keys, strict=True)])
