"""What a save reads while the next update already writes over the state."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def snapshot(tree: Any) -> Callable[[], Any]:
    """Hold the values of `tree`, which may be donated from now on, and return at once. What is returned makes arrays of
    them again, in any thread."""
    leaves, structure = jax.tree.flatten(tree)
    held = {id(x): _hold(x) for x in leaves}  # an array that is in the tree twice is held once

    def make() -> Any:
        made = {key: again() for key, again in held.items()}
        return jax.tree.unflatten(structure, [made[id(x)] for x in leaves])

    return make


def _hold(x: Any) -> Callable[[], Any]:
    if not isinstance(x, jax.Array):
        return lambda: x
    if _is_on_cpu(x):
        return _share(x)

    # Into the memory of the hosts, as the accelerator's may have no room for a second state. The copy is queued behind
    # what is being computed, and before the update that is given the memory.
    copied = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
    return lambda: copied


def _is_on_cpu(x: jax.Array) -> bool:
    return all(piece.device.platform == "cpu" for piece in x.addressable_shards)


def _share(x: jax.Array) -> Callable[[], jax.Array]:
    """The same memory, which no copy costs: while it is held, XLA makes the results of an update elsewhere."""
    shape, sharding = x.shape, x.sharding
    views = [(np.asarray(piece.data), piece.device) for piece in x.addressable_shards]

    def again() -> jax.Array:
        pieces = [jax.device_put(view, device) for view, device in views]
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return again
