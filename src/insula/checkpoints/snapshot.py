"""What a save reads while the next update already writes over the state."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def snapshot(tree: Any) -> Callable[[], Any]:
    """Hold the values of `tree`, which may be donated from now on, and return at once. What is returned makes arrays of
    them again, in any thread."""
    leaves, structure = jax.tree.flatten(tree)
    held = {key: _hold(x) for key, x in {id(x): x for x in leaves}.items()}  # what is in the tree twice is held once

    def make() -> Any:
        made = {key: again() for key, again in held.items()}
        return jax.tree.unflatten(structure, [made[id(x)] for x in leaves])

    return make


def _hold(x: Any) -> Callable[[], Any]:
    if not isinstance(x, jax.Array):
        return lambda: x

    pieces = _pieces(x)
    if _is_on_cpu(pieces):
        return _share(x, pieces)

    # Into the memory of the hosts, as the accelerator's may have no room for a second state. The copy is queued behind
    # what is being computed, and before the update that is given the memory.
    copied = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
    return lambda: copied


def _pieces(x: jax.Array) -> list[tuple[jax.Array, jax.Device]]:
    """What this process has of an array, each with the device it is on."""
    if len(x.sharding.device_set) == 1:
        # The array itself: to be cut into its one piece it would take as long as all the rest of a save.
        return [(x, *x.sharding.device_set)]

    return [(piece.data, piece.device) for piece in x.addressable_shards]


def _is_on_cpu(pieces: list[tuple[jax.Array, jax.Device]]) -> bool:
    return all(device.platform == "cpu" for _, device in pieces)


def _share(x: jax.Array, pieces: list[tuple[jax.Array, jax.Device]]) -> Callable[[], jax.Array]:
    """The same memory, which no copy costs: while it is held, XLA makes the results of an update elsewhere."""
    views = [(np.asarray(piece), device) for piece, device in pieces]

    def again() -> jax.Array:
        made = [jax.device_put(view, device) for view, device in views]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, made)  # these outlive its values

    return again
