"""Which axis of a weight is split over which axis of the mesh: one rule, over the axis letters of the weight tables.

    weight                    letters    fsdp    tensor
    query, key, value         XWNE       W       N
    out                       XNEW       W       N
    gate, up                  XWF        W       F
    down                      XFW        W       F
    embedding                 VW         W       V
    norms, biases, positions             copies

Depth is never split: each layer is needed by all. Everything that is like the parameters (their average, an optimizer's
moments, gradients) lives where they do.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from insula.model.config import ModelConfig
from insula.model.params import weight_table
from insula.model.weights import Weight, is_weight
from insula.parallel.mesh import FSDP, TENSOR, everywhere

LETTERS = {TENSOR: "NGFV", FSDP: "WOFVZD"}
"""By axis of the mesh, the letters that it may split, the best first. An axis whose size it does not divide is left
whole: the next letter is tried, and a weight without any is copied. Inputs of products have lower-case letters of no
size of their own, and stay whole."""
SMALL = 2**14
"""Numbers: a weight with fewer is copied. Splitting it would save kilobytes, and cost a message whenever it is used."""


def partition(weight: Weight, mesh: Mesh) -> PartitionSpec:
    """How one weight is split."""
    if math.prod(weight.shape) < SMALL:
        return PartitionSpec()

    split: dict[int, str] = {}
    for axis, letters in LETTERS.items():
        size = mesh.shape[axis]
        places = (weight.axes.find(letter) for letter in letters if size > 1)
        fits = (i for i in places if i >= 0 and i not in split and weight.shape[i] % size == 0)
        if (place := next(fits, None)) is not None:
            split[place] = axis

    return PartitionSpec(*(split.get(i) for i in range(len(weight.shape))))


def params_sharding(config: ModelConfig, mesh: Mesh) -> Any:
    """`Params` with a sharding at each leaf."""
    table = weight_table(config)
    return jax.tree.map(lambda weight: NamedSharding(mesh, partition(weight, mesh)), table, is_leaf=is_weight)


def shard_like_params(tree: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """`tree` (of arrays or of shapes) with a sharding at each leaf: that of the parameter it belongs to, and a copy
    everywhere for what belongs to none, such as a count."""
    # An average or a moment of a parameter is found at the end of a path that ends like the parameter's own.
    of_params = dict(jax.tree_util.tree_leaves_with_path(params_sharding(config, mesh)))
    shapes = {path: w.shape for path, w in jax.tree_util.tree_leaves_with_path(weight_table(config), is_leaf=is_weight)}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        ends = (path[i:] for i in range(len(path)))
        found = next((end for end in ends if end in of_params and shapes[end] == leaf.shape), None)
        return everywhere(mesh) if found is None else of_params[found]

    return jax.tree_util.tree_map_with_path(place, tree)


def put(tree: Any, sharding: Any) -> Any:
    """Arrays where they are to live. Every process has all of them, and gives its devices their pieces."""

    def place(x: Any, where: NamedSharding) -> jax.Array:
        if where.is_fully_addressable:
            return jax.device_put(x, where)
        return jax.make_array_from_callback(x.shape, where, lambda index: np.asarray(x)[index])

    return jax.tree.map(place, tree, sharding)
