"""Reading a model from any known format: what is there, what is missing, what is left over, then array by array."""

import dataclasses
import fnmatch
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from insula.checkpoints.formats import recognize
from insula.checkpoints.sources import WeightSource, open_source
from insula.checkpoints.tensor_map import Format, TensorPart, paths, resolve
from insula.errors import CheckpointError, did_you_mean
from insula.files import write_json
from insula.model.config import ModelConfig
from insula.model.params import Params, weight_table
from insula.model.weights import initialize, is_weight
from insula.shapes import PRNGKeyArray

PADDED_ROWS = 64
"""PaliGemma's embedding on the hub ends in this many rows that no token uses."""


class Reader:
    """A source read as weights of ours. Shapes and names are checked before any value is read.

    `loaded` maps each weight found to the foreign names that hold it, `missing` are weights of the config without any,
    `leftover` foreign names without a place. Raises CheckpointError where a tensor has another shape than the config
    expects, or a tied one other values.
    """

    def __init__(self, source: WeightSource, format: Format, config: ModelConfig):
        self.source, self.format = source, format
        tensors = resolve(format.table(config), config)
        actual: dict[str, str] = {}
        for name in source.entries:
            canonical = format.canonical(name)
            if canonical in actual:
                raise CheckpointError(f"{source.path}: {name} and {actual[canonical]} are the same weight")
            actual[canonical] = name
        for second, first in format.tied:
            self._merge(actual, second, first)
        for name in format.unused(config):
            actual.pop(name, None)

        self._parts: dict[str, list[tuple[str, TensorPart]]] = defaultdict(list)
        for canonical, tensor in tensors.items():
            if canonical in actual:
                name = actual.pop(canonical)
                self._check(name, tensor.shape, tensor.parts[0].ours, config)
                for part in tensor.parts:
                    self._parts[part.ours].append((name, part))
        weights = paths(weight_table(config))
        self.shapes = {path: weight.shape for path, weight in weights.items()}
        absent = {part.ours for name, t in tensors.items() for part in t.parts if not self._has(name, part)}
        self.missing = [path for path in weights if path in absent or path not in self._parts]
        self.loaded = {path: [name for name, _ in self._parts[path]] for path in weights if path not in self.missing}
        self.leftover = sorted(actual.values())
        self._last: tuple[str, np.ndarray] | None = None

    def _has(self, canonical: str, part: TensorPart) -> bool:
        return any(p is part for _, p in self._parts[part.ours])

    def _merge(self, actual: dict[str, str], second: str, first: str) -> None:
        if second not in actual:
            return
        name = actual.pop(second)
        if first not in actual:
            actual[first] = name
        elif self._digest(name) != self._digest(actual[first]):
            raise CheckpointError(
                f"{self.source.path}: {name} and {actual[first]} differ; this model has tied embeddings, one for both"
            )

    def _digest(self, name: str) -> bytes:
        """Two large tensors are compared without holding both."""
        return hashlib.blake2b(np.ascontiguousarray(self.source.read(name)).view(np.uint8).data).digest()

    def _check(self, name: str, expected: tuple[int, ...], ours: str, config: ModelConfig) -> None:
        shape = self.source.entries[name].shape
        padded = (expected[0] + PADDED_ROWS, *expected[1:])
        if shape != expected and not (ours == "backbone.embedding" and shape == padded):
            raise CheckpointError(
                f"{self.source.path}: {name} has shape {list(shape)}, config {config.name!r} expects {list(expected)} "
                f"for {ours}"
            )

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One weight, or one layer of it, in the dtype it is stored in."""
        parts = self._parts[path]
        if parts[0][1].layer is None:
            (name, part), *_ = parts
            whole = part.cut(self._tensor(name, part))
            return whole if layer is None else whole[layer]
        if layer is not None:
            name, part = next(p for p in parts if p[1].layer == layer)
            return part.cut(self._tensor(name, part))
        out = np.empty(self.shapes[path], self.source.entries[parts[0][0]].dtype)
        for name, part in parts:
            out[part.layer] = part.cut(self._tensor(name, part))
        return out

    def _tensor(self, name: str, part: TensorPart) -> np.ndarray:
        """Neighbors in a table often share a tensor: the last one read is kept."""
        if self._last is None or self._last[0] != name:
            self._last = None  # not two at a time
            self._last = name, self.source.read(name)
        tensor = self._last[1]
        rows = part.spread[0]
        return tensor[:rows] if part.ours == "backbone.embedding" else tensor


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a load did: weights loaded (path → foreign names), freshly initialized, and foreign tensors left over."""

    source: str
    format: str
    loaded: dict[str, list[str]]
    fresh: list[str]
    leftover: list[str]

    def write(self, path: Path) -> None:
        write_json(path, dataclasses.asdict(self))

    def summary(self) -> str:
        lines = [f"{self.source}: {self.format}, {len(self.loaded)} weights loaded"]
        lines += [f"  freshly initialized: {path}" for path in self.fresh]
        lines += [f"  left over: {name}" for name in self.leftover]
        return "\n".join(lines)


def open_weights(path: Path, config: ModelConfig) -> Reader:
    """Raises CheckpointError where the file is damaged, of no known format, or does not fit the config."""
    source = open_source(path)
    return Reader(source, recognize(source, config), config)


def settle(reader: Reader, fresh: Sequence[str] = (), ignore: Sequence[str] = ()) -> LoadReport:
    """Nothing is loaded in part unless named: `fresh` are patterns ("expert.*") of weights to initialize rather than
    load, `ignore` of foreign tensors to leave over. Raises CheckpointError naming what is not covered, and patterns
    that match nothing."""
    path = str(reader.source.path)
    known = {"fresh": list(reader.shapes), "ignore": list(reader.source.entries)}
    for option, patterns in (("fresh", fresh), ("ignore", ignore)):
        names = known[option]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                near = did_you_mean(pattern, names)
                raise CheckpointError(f"{path}: {option} {pattern!r} matches nothing{near}")
    started = [name for name in reader.shapes if _matches(name, fresh)]
    missing = [name for name in reader.missing if name not in started]
    leftover = [name for name in reader.leftover if not _matches(name, ignore)]
    if missing or leftover:
        raise CheckpointError(
            f"{path} ({reader.format.name}) does not fit the config exactly.\n"
            + _listed("missing", missing, "to initialize them: insula train --init ... --fresh 'expert.*'")
            + _listed("left over", leftover, "to leave them: --ignore PATTERN")
        )
    loaded = {name: theirs for name, theirs in reader.loaded.items() if name not in started}
    return LoadReport(path, reader.format.name, loaded, started, reader.leftover)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(what: str, names: list[str], remedy: str) -> str:
    if not names:
        return ""
    shown = "".join(f"\n    {name}" for name in names[:20])
    more = f"\n    … and {len(names) - 20} more" if len(names) > 20 else ""
    return f"  {what} ({len(names)}; {remedy}):{shown}{more}\n"


def load_params(
    path: Path,
    config: ModelConfig,
    rng: PRNGKeyArray,
    fresh: Sequence[str] = (),
    ignore: Sequence[str] = (),
    dtype: str = "float32",
    shardings: Any = None,
) -> tuple[Params, LoadReport]:
    """The config's parameters from a checkpoint of any known format, and what was done.

    Weights go to their device(s) one by one: `shardings` is a tree like the parameters, or None for the default device.
    Raises CheckpointError as `open_weights` and `settle` do.
    """
    reader = open_weights(path, config)
    report = settle(reader, fresh, ignore)
    table = weight_table(config)
    names, tree = list(paths(table)), jax.tree.structure(table, is_leaf=is_weight)
    places = [None] * len(names) if shardings is None else jax.tree.leaves(shardings)
    started = _draw(table, report.fresh, rng) if report.fresh else {}
    leaves = []
    for name, place in zip(names, places, strict=True):
        value = started[name] if name in started else reader.read(name)
        leaves.append(jax.device_put(value.astype(dtype), place))
    return jax.tree.unflatten(tree, leaves), report


def _draw(table: Params, names: list[str], rng: PRNGKeyArray) -> dict[str, Any]:
    """These weights as `init_params` would draw them; the others are not computed."""

    def draw(key: PRNGKeyArray) -> dict[str, Any]:
        drawn = paths(initialize(table, key))
        return {name: drawn[name] for name in names}

    return jax.jit(draw)(rng)
