"""Reading a model from any known format: what is there, what is missing, what is left over, then array by array."""

import dataclasses
import fnmatch
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from insula.checkpoints.formats import recognize
from insula.checkpoints.sources import FLOATS, WeightSource, open_source
from insula.checkpoints.tensor_map import Format, Tensor, TensorPart, paths, resolve
from insula.errors import CheckpointError, did_you_mean
from insula.files import write_json
from insula.model.config import ModelConfig
from insula.model.params import Params, weight_table
from insula.model.weights import initialize, is_weight
from insula.shapes import PRNGKeyArray

EMBEDDING = "backbone.embedding"
PADDED_ROWS = 64
"""PaliGemma's embedding on the hub ends in this many rows that no token uses."""


class Reader:
    """A source read as weights of ours. Shapes and names are compared before any value is read.

    `loaded` maps each weight found to the foreign names that hold it, `missing` are weights of the config without any,
    `misfits` says of each weight whose tensor has another shape or kind than the config expects what it has, and
    `leftover` are foreign names without a place. What is wrong is judged by `settle`, which knows what is wanted.
    Raises CheckpointError where two names stand for one weight.
    """

    def __init__(self, source: WeightSource, format: Format, config: ModelConfig, prefix: str = "") -> None:
        self.source = source
        self.format = format

        # What a format carries without use is neither loaded nor left over.
        tensors = resolve(format.table(config), config)
        actual = self._by_canonical_name(prefix)
        self._tied = self._merge_tied(actual)
        for name in format.unused(config):
            actual.pop(name, None)

        self._parts: dict[str, list[tuple[str, TensorPart]]] = defaultdict(list)
        self.misfits: dict[str, str] = {}
        for canonical, tensor in tensors.items():
            if canonical not in actual:
                continue
            name = actual.pop(canonical)
            found = self._misfit(name, tensor, config)
            for part in tensor.parts:
                if found:
                    self.misfits[part.ours] = f"{found} for {part.ours}"
                else:
                    self._parts[part.ours].append((name, part))

        weights = paths(weight_table(config))
        self.shapes = {path: weight.shape for path, weight in weights.items()}
        absent = {part.ours for t in tensors.values() for part in t.parts if not self._has(part)}
        self.missing = [
            path for path in weights if path not in self.misfits and (path in absent or path not in self._parts)
        ]
        unread = {*self.missing, *self.misfits}
        self.loaded = {path: [name for name, _ in self._parts[path]] for path in weights if path not in unread}
        self.leftover = sorted(actual.values())
        self._last: tuple[str, np.ndarray] | None = None

    def _by_canonical_name(self, prefix: str) -> dict[str, str]:
        """The table's name → the file's; what does not begin with the prefix keeps its own."""
        actual: dict[str, str] = {}
        for name in self.source.entries:
            canonical = self.format.canonical(name.removeprefix(prefix)) if name.startswith(prefix) else name

            # Two layouts in one file, perhaps merged by hand: taking either would be a guess.
            if canonical in actual:
                raise CheckpointError(f"{self.source.path}: {name} and {actual[canonical]} are the same weight")
            actual[canonical] = name

        return actual

    def _merge_tied(self, actual: dict[str, str]) -> list[tuple[str, str]]:
        """Leaves one of two names for a tensor, and returns the pairs in the file that are yet to be compared."""
        pairs = []
        for second, first in self.format.tied:
            if second not in actual:
                continue
            name = actual.pop(second)
            if first in actual:
                pairs.append((name, actual[first]))
            else:
                actual[first] = name

        return pairs

    def _has(self, part: TensorPart) -> bool:
        return any(p is part for _, p in self._parts[part.ours])

    def _misfit(self, name: str, tensor: Tensor, config: ModelConfig) -> str | None:
        """What is wrong with a tensor's shape or kind, or None."""
        entry = self.source.entries[name]
        expected = tensor.shape
        where = f"config {config.name!r} expects"

        # An integer tensor under a weight's name is a quantized model, whose scales we would not apply.
        if entry.dtype not in FLOATS:
            return f"{name} holds {entry.dtype}, {where} one of {', '.join(FLOATS)}"

        padded = (expected[0] + PADDED_ROWS, *expected[1:])
        if entry.shape == expected or (tensor.parts[0].ours == EMBEDDING and entry.shape == padded):
            return None
        return f"{name} has shape {list(entry.shape)}, {where} {list(expected)}"

    def compare_tied(self, ignore: Sequence[str] = ()) -> None:
        """Raises CheckpointError where a tensor that is stored twice has different values, unless the second of the
        names is to be left over. Rows that no token uses do not count, and where one was rounded the other is rounded
        for the comparison."""
        rows = self.shapes[EMBEDDING][0]
        for second, first in self._tied:
            if _matches(second, ignore):
                continue

            # One of them may have been rounded when the model was saved in two dtypes.
            kinds = [self.source.entries[name].dtype for name in (second, first)]
            coarser = min(kinds, key=lambda kind: np.dtype(kind).itemsize if kind in FLOATS else 0)
            if coarser not in FLOATS or self._digest(second, rows, coarser) != self._digest(first, rows, coarser):
                raise CheckpointError(
                    f"{self.source.path}: {second} and {first} differ; this model has tied embeddings, one for both. "
                    f"Leave one of them over: --ignore '{second}'"
                )

    def _digest(self, name: str, rows: int, dtype: str) -> bytes:
        """Two large tensors are compared without holding both."""
        values = np.ascontiguousarray(self.source.read(name)[:rows], dtype)
        return hashlib.blake2b(values.view(np.uint8).data).digest()

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One weight, or one layer of it, in the dtype it is stored in."""
        parts = self._parts[path]

        # The whole weight lies in one tensor, all layers stacked: big_vision's and our own way.
        if parts[0][1].layer is None:
            (name, part), *_ = parts
            whole = part.cut(self._tensor(name, part))
            return whole if layer is None else whole[layer]

        # A tensor for each layer: PyTorch's way.
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
            self._refuse_non_finite(*self._last)

        # Rows that no token uses are cut off where a file pads its embedding.
        tensor = self._last[1]
        rows = part.spread[0]
        return tensor[:rows] if part.ours == EMBEDDING else tensor

    def _refuse_non_finite(self, name: str, tensor: np.ndarray) -> None:
        """A sum is NaN or infinite where any value is, and takes no memory."""
        if not np.isfinite(np.sum(tensor, dtype=np.promote_types(tensor.dtype, np.float32))):
            raise CheckpointError(
                f"{self.source.path}: {name} holds NaN or infinite values; this model was saved after its training "
                "failed, take an earlier checkpoint"
            )


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


def open_weights(path: Path, config: ModelConfig, ignore: Sequence[str] = ()) -> Reader:
    """A reader of the weights at `path`. Foreign names that match a pattern of `ignore` are not what the format is
    told by. Raises CheckpointError where the file is damaged or of no known format."""
    source = open_source(path)
    format, prefix = recognize(source, config, ignore)
    return Reader(source, format, config, prefix)


def settle(reader: Reader, fresh: Sequence[str] = (), ignore: Sequence[str] = ()) -> LoadReport:
    """Nothing is loaded in part unless named: `fresh` are patterns ("expert.*") of weights to initialize rather than
    load, whatever the file has for them, `ignore` of foreign tensors to leave over.

    Raises CheckpointError naming everything that does not fit and is not covered, and patterns that match nothing.
    """
    path = str(reader.source.path)
    known = {"fresh": list(reader.shapes), "ignore": list(reader.source.entries)}
    # A pattern that matches nothing is a misspelling, and what it was meant for would fail in other words below.
    for option, patterns in (("fresh", fresh), ("ignore", ignore)):
        names = known[option]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                near = did_you_mean(pattern, names)
                raise CheckpointError(f"{path}: {option} {pattern!r} matches nothing{near}")

    started = [name for name in reader.shapes if _matches(name, fresh)]
    missing = [name for name in reader.missing if name not in started]
    misfits = {name: said for name, said in reader.misfits.items() if name not in started}
    leftover = [name for name in reader.leftover if not _matches(name, ignore)]
    if missing or leftover or misfits:
        raise CheckpointError(
            f"{path} ({reader.format.name}) does not fit the config exactly.\n"
            + _listed("that do not fit", list(misfits.values()), _remedy(misfits))
            + _listed("missing", missing, _remedy(missing))
            + _listed("left over", leftover, "to leave them: --ignore PATTERN")
        )

    # Last, since it reads values: two tensors of half a gigabyte.
    if EMBEDDING not in started:
        reader.compare_tied(ignore)
    loaded = {name: theirs for name, theirs in reader.loaded.items() if name not in started}
    return LoadReport(path, reader.format.name, loaded, started, reader.leftover)


def _remedy(names: Iterable[str]) -> str:
    """The flag that covers these weights, as short as it can be said."""
    parts = sorted({f"{name.rpartition('.')[0]}.*" for name in names})
    if len(parts) > 4:
        parts = sorted({f"{name.partition('.')[0]}.*" for name in names})
    return f"to initialize them: insula train --init ... --fresh {' '.join(map(repr, parts))}"


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
    reader = open_weights(path, config, ignore)
    report = settle(reader, fresh, ignore)

    table = weight_table(config)
    names = list(paths(table))
    tree = jax.tree.structure(table, is_leaf=is_weight)
    places = [None] * len(names) if shardings is None else jax.tree.leaves(shardings)
    started = _draw(table, report.fresh, rng) if report.fresh else {}

    # One by one onto the device: the host never holds the model.
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
