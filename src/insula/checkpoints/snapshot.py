"""What a save reads while the next update already writes over the state."""

from typing import Any

import jax
import numpy as np


def snapshot(tree: Any) -> Any:
    """The same values, which stay when the arrays are donated. Returns at once."""
    copies: dict[int, jax.Array] = {}  # an array that is in the tree twice is copied once

    def keep(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if id(x) not in copies:
            copies[id(x)] = _alias(x) if _is_on_cpu(x) else _to_host(x)
        return copies[id(x)]

    return jax.tree.map(keep, tree)


def _is_on_cpu(x: jax.Array) -> bool:
    return all(piece.device.platform == "cpu" for piece in x.addressable_shards)


def _alias(x: jax.Array) -> jax.Array:
    """A second array over the same memory, which no copy costs: while it is held, XLA makes the results of an update
    elsewhere rather than in place."""
    pieces = [jax.device_put(np.asarray(piece.data), piece.device) for piece in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)


def _to_host(x: jax.Array) -> jax.Array:
    """Its pieces in the memory of their hosts: an accelerator's may have no room for a second state. The copy is queued
    behind what is being computed, and before the update that is given the memory."""
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
