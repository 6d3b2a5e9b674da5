"""Devices as a grid of three axes, each a way to share the work.

    data      copies of the model, each with its own samples
    fsdp      one copy in pieces, each device with its own samples; a weight is put together where it is used (ZeRO-3,
              Rajbhandari et al. 2020, arXiv 1910.02054; FSDP)
    tensor    one copy in pieces that stay where they are: each device computes some heads and a part of each
              feed-forward, of the same samples (Megatron, Shoeybi et al. 2019, arXiv 1909.08053)

A single device is a mesh of one: there is no other code for it.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from insula.checks import check_integer
from insula.errors import InputError
from insula.model.layers import BATCH_AXES

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)
assert BATCH_AXES == (DATA, FSDP)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each axis. Raises InputError for numbers that cannot be."""

    data: int = 1
    fsdp: int | None = None
    """None: all devices that the other two leave."""
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) is not None:
                check_integer(f"mesh: {name}", getattr(self, name), 1)


ALL_DEVICES, ONE_DEVICE = MeshConfig(), MeshConfig(fsdp=1)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `devices`, all of this and every other process unless given; the first of them where fewer are asked
    for. Raises InputError where the numbers do not fit them, or would leave a process without work."""
    devices = jax.devices() if devices is None else devices
    others = config.data * config.tensor
    fsdp = max(1, len(devices) // others) if config.fsdp is None else config.fsdp
    sizes = (config.data, fsdp, config.tensor)

    asked, there = math.prod(sizes), len(devices)
    told = f"mesh: data {sizes[0]} × fsdp {sizes[1]} × tensor {sizes[2]} = {asked} devices"
    if asked > there or (config.fsdp is None and asked != there):
        raise InputError(f"{told}, but there are {there}; leave out fsdp, or give numbers whose product is {there}")
    used = list(devices)[:asked]
    if {d.process_index for d in used} != {d.process_index for d in devices}:
        raise InputError(f"{told}, which leaves some of {jax.process_count()} processes without work; use all {there}")

    # Neighbors in JAX's order are near each other: tensor, which sends most, is the axis that changes fastest.
    return Mesh(np.array(used).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices with samples of their own, the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def everywhere(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a batch that devices of this process have. Where several processes share a sample, each of them makes
    it."""
    places = split_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({index[0].indices(batch_size)[:2] for index in places if index is not None})
    # Devices stand in the mesh in the order of their processes (`make_mesh`).
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    return slice(spans[0][0], spans[-1][1])


def check_batch_size(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Raises InputError unless every device gets as many samples, of each of `parts` parts."""
    pieces = batch_shards(mesh) * parts
    if batch_size % pieces:
        near = max(pieces, round(batch_size / pieces) * pieces)
        raise InputError(
            f"batch_size {batch_size} does not divide into {pieces} equal parts (mesh: data {mesh.shape[DATA]} × fsdp "
            f"{mesh.shape[FSDP]}; accumulate {parts}); the nearest that does is {near}"
        )


def put_batch(tree: Any, mesh: Mesh, batch_size: int) -> Any:
    """A batch on the devices. Each process gives its rows (`local_rows`), all together are the batch."""
    sharding = split_batch(mesh)

    def put(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (batch_size, *x.shape[1:]))

    return jax.tree.map(put, tree)


def put_everywhere(tree: Any, mesh: Mesh) -> Any:
    """What every process has, on every device: a few samples that are looked at and not trained on."""
    sharding = everywhere(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), x.shape), tree)
