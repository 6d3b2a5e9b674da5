"""Writing a model in any known format, one array at a time."""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from insula.checkpoints.tensor_map import Format, paths, resolve
from insula.errors import CheckpointError
from insula.model.config import ModelConfig
from insula.model.params import Params, weight_table

Read = Callable[[str, int | None], np.ndarray]
"""(path of a weight, layer or None) → its values."""
_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def from_params(params: Params) -> Read:
    """Weights in memory."""
    weights = paths(params)

    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(weights[path] if layer is None else weights[path][layer])

    return read


def require_names(format: Format, config: ModelConfig) -> None:
    """Raises CheckpointError where the config has weights the format has no name for."""
    named = {part.ours for tensor in resolve(format.table(config), config).values() for part in tensor.parts}
    if nameless := [path for path in paths(weight_table(config)) if path not in named]:
        raise CheckpointError(
            f"{format.name} has no name for {', '.join(nameless)} of config {config.name!r}; "
            "it stores PaliGemma's architecture, such as the preset 'pi05'"
        )


def foreign_shapes(format: Format, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a file of this format holds."""
    tensors = resolve(format.table(config), config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return shapes | {second: shapes[first] for second, first in format.tied} | format.unused(config)


def foreign_tensors(format: Format, config: ModelConfig, read: Read, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `foreign_shapes`, in its order."""
    tensors = resolve(format.table(config), config)
    second_names = dict(format.tied)

    for name in foreign_shapes(format, config):
        tensor = tensors.get(second_names.get(name, name))
        if tensor is None:  # what a strict loader wants and never reads
            yield name, np.zeros(format.unused(config)[name], dtype)
            continue

        out = np.empty(tensor.shape, dtype)
        for part in tensor.parts:
            place = part.place(out)
            for layer in range(len(place)) if part.stacked else [part.layer]:  # a layer at a time: less memory
                view = place[layer] if part.stacked else place
                view[...] = read(part.ours, layer).reshape(view.shape)
        yield name, out
        del out, place, view  # nor two tensors at a time


def write_safetensors(path: Path, format: Format, config: ModelConfig, read: Read, dtype: str) -> None:
    """A .safetensors file, complete or not there at all. The library wants all tensors at once; this needs one.

    Layout: the header's length (8 bytes, little endian), the header (JSON, padded with blanks to 8 bytes), the data.
    """
    # The header comes first and names the place of every byte, so all shapes must be known before any value is.
    shapes = foreign_shapes(format, config)
    size = np.dtype(dtype).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + size * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    unfinished = path.with_name(path.name + ".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in foreign_tensors(format, config, read, dtype):
            assert tensor.shape == shapes[name]
            file.write(tensor.reshape(-1).view(np.uint8).data)
            del tensor

        # Renamed only once it is on the disk: a crash must not leave a whole name on half a file.
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_orbax(path: Path, format: Format, config: ModelConfig, read: Read, dtype: str) -> None:
    """An Orbax tree under the item "params", names split at slashes. Values wait on disk until Orbax takes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Mapped files in place of arrays: Orbax takes the tree as a whole, and memory holds one leaf.
        tree: dict[str, Any] = {}
        for number, (name, tensor) in enumerate(foreign_tensors(format, config, read, dtype)):
            waiting = Path(folder) / str(number)
            tensor.tofile(waiting)
            shape, kind = tensor.shape, tensor.dtype
            del tensor
            *above, last = name.split("/")
            branch = tree
            for key in above:
                branch = branch.setdefault(key, {})
            branch[last] = np.memmap(waiting, kind, "r", shape=shape)

        leaves = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)  # else all are in memory at once
        registry = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, leaves), (jax.Array, ocp.type_handlers.ArrayHandler())
        )
        handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path.absolute(), ocp.args.PyTreeSave({"params": tree}))
