"""What a save reads while the next update already writes over the state."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np


def snapshot(tree: Any) -> Callable[[], Any]:
    """Hold the values of `tree`, which may be donated from now on, and return at once. What is returned makes arrays of
    them again, in any thread."""
    # As little as possible for each of hundreds of arrays: training waits for it.
    leaves, structure = jax.tree.flatten(tree)
    unique = {id(x): x for x in leaves}  # an array that is in the tree twice is held once
    held = [_hold(x) for x in unique.values()]

    def make() -> Any:
        made = dict(zip(unique, map(_made_again, unique.values(), held), strict=True))
        return jax.tree.unflatten(structure, [made[id(x)] for x in leaves])

    return make


def _hold(x: Any) -> Any:
    """What of `x` stays whatever becomes of it: on a CPU the memory itself, which no copy costs, and while it is held
    XLA makes the results of an update elsewhere."""
    if not isinstance(x, jax.Array):
        return x

    devices = x.sharding.device_set
    if not _are_cpus(devices):
        # Into the memory of the hosts, as the accelerator's may have no room for a second state. The copy is queued
        # behind what is being computed, and before the update that is given the memory.
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    # An array on one device is its own only piece: to be cut into it would take as long as all the rest.
    if len(devices) == 1:
        return np.asarray(x)

    return [(np.asarray(piece.data), piece.device) for piece in x.addressable_shards]


def _are_cpus(devices: Iterable[jax.Device]) -> bool:
    return all(device.platform == "cpu" for device in devices)


def _made_again(x: Any, held: Any) -> Any:
    """`x` as it was. Of an array that was donated, shape and sharding are still known."""
    if not isinstance(x, jax.Array) or isinstance(held, jax.Array):
        return held

    views = held if isinstance(held, list) else [(held, *x.sharding.device_set)]
    pieces = [jax.device_put(view, device) for view, device in views]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, pieces)
