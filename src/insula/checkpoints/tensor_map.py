"""How our weights lie in a foreign checkpoint: a table of names and axes, read in both directions.

A line of the table says which weight of ours a foreign tensor holds, and the axes it has there, in the letters of the
weight table (`model/weights.py`)::

    backbone.layers.query   language_model.layers.{}.self_attn.q_proj.weight   (NE)W

`{}` counts layers; without it the tensor holds all of them, on an axis X. Letters in brackets share one axis. A digit
is an axis of which this weight is that one index: "X0GWE" and "X1GWE" are the key and the value in one tensor.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from insula.errors import InputError
from insula.model.config import ModelConfig
from insula.model.params import weight_table
from insula.model.weights import Weight, is_weight


@dataclasses.dataclass(frozen=True)
class Line:
    """`ours` is stored as `theirs`, with `axes`."""

    ours: str
    theirs: str
    axes: str


WRAPPERS = r"(^|\.)((_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
"""What PyTorch puts into the names of a model that was compiled, or trained in parallel: left out."""


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of storing a model.

    `table` gives the lines for a config. `renames` turn the names of older or newer layouts, by regular expression,
    into those of the table. `tied` are second names of a tensor: a file may hold either or both, then with equal
    values; both are written. `unused` names tensors the format carries and the model does not have, with their shapes:
    skipped when read, zero when written, since a strict loader wants them.
    """

    name: str
    table: Callable[[ModelConfig], list[Line]]
    renames: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    """(second name, name in the table)."""
    unused: Callable[[ModelConfig], dict[str, tuple[int, ...]]] = lambda config: {}

    def canonical(self, name: str) -> str:
        """The table's name for a name in a file."""
        name = re.sub(WRAPPERS, r"\1", name)
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """A weight of ours, or one layer of it, inside a foreign tensor: how to cut it out and where to put it."""

    ours: str
    layer: int | None
    stacked: bool
    """Whether all layers are here, on the first axis of ours."""
    shape: tuple[int, ...]
    """Of ours, without the layer axis where `layer` is given."""
    spread: tuple[int, ...]
    """Of the foreign tensor, with every letter and digit an axis of its own."""
    select: tuple[int | slice, ...]
    """The digits."""
    order: tuple[int, ...]
    """The foreign letters in the order of ours."""

    def cut(self, tensor: np.ndarray) -> np.ndarray:
        """Foreign tensor → ours."""
        return tensor.reshape(self.spread)[self.select].transpose(self.order).reshape(self.shape)

    def place(self, tensor: np.ndarray) -> np.ndarray:
        """A view of the foreign tensor with the axes of ours, to write into."""
        return tensor.reshape(self.spread)[self.select].transpose(self.order)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One foreign tensor and all that it holds."""

    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]


def paths(tree: Any) -> dict[str, Any]:
    """Leaves by their path: `backbone.layers.query`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def resolve(lines: list[Line], config: ModelConfig) -> dict[str, Tensor]:
    """Every foreign tensor of a model of this size, by name. No memory is used.

    Raises InputError where a line names no weight of this config.
    """
    weights = paths(weight_table(config))
    patch = config.vision.patch_sizes[0]

    # How long the digit axis of a tensor is, nobody says: as long as the largest digit of its lines asks for.
    picks: dict[str, int] = defaultdict(lambda: 1)
    for line in lines:
        picks[line.theirs] = max([picks[line.theirs], *(int(d) + 1 for d in re.findall(r"\d", line.axes))])

    # By name, since several lines may share a tensor, and a line with "{}" stands for a tensor of each layer.
    found: dict[str, list[tuple[Line, TensorPart]]] = defaultdict(list)
    for line in lines:
        if line.ours not in weights:
            raise InputError(f"config {config.name!r} has no weight {line.ours}, which the format stores")
        weight = weights[line.ours]
        layers = range(weight.shape[0]) if "{}" in line.theirs else [None]
        for layer in layers:
            name = line.theirs if layer is None else line.theirs.format(layer)
            found[name].append((line, _part(line, weight, layer, patch, picks[line.theirs])))

    return {name: _tensor(name, entries) for name, entries in found.items()}


def _part(line: Line, weight: Weight, layer: int | None, patch: int, picks: int) -> TensorPart:
    axes, shape = weight.axes, weight.shape
    if layer is not None:
        axes, shape = axes[1:], shape[1:]

    # A patch is one axis here, Z, and a small picture there.
    sizes = dict(zip(axes, shape, strict=True)) | {"h": patch, "w": patch, "c": 3}
    flat = line.axes.replace("(", "").replace(")", "")
    ours = axes.replace("Z", "hwc") if "h" in flat else axes  # row by row

    letters = re.sub(r"\d", "", flat)
    assert sorted(letters) == sorted(ours), f"{line}: axes {line.axes} are not those of ours, {ours}"

    return TensorPart(
        ours=line.ours,
        layer=layer,
        stacked=axes.startswith("X"),
        shape=shape,
        spread=tuple(picks if axis.isdigit() else sizes[axis] for axis in flat),
        select=tuple(int(axis) if axis.isdigit() else slice(None) for axis in flat),
        order=tuple(letters.index(axis) for axis in ours),
    )


def _tensor(name: str, entries: list[tuple[Line, TensorPart]]) -> Tensor:
    # Every line that shares a tensor tells its shape, which is a check of the table as a whole.
    shapes = set()
    for line, part in entries:
        groups = [group.strip("()") for group in re.findall(r"\(\w+\)|\w", line.axes)]
        spread = iter(part.spread)
        shapes.add(tuple(math.prod(next(spread) for _ in group) for group in groups))

    assert len(shapes) == 1, f"{name}: its parts disagree about its shape, {shapes}"
    return Tensor(shapes.pop(), tuple(part for _, part in entries))
