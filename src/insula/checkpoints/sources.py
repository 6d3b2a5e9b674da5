"""Files of named arrays, read one array at a time: safetensors (one file, or sharded), NumPy's npz, Orbax.

Nothing else is read: no pickle, no code. A source knows names, shapes and dtypes without reading any values.
"""

import contextlib
import dataclasses
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from safetensors import safe_open

from insula.errors import CheckpointError, InsulaError, brief
from insula.files import read_json

SAFETENSORS, SHARDS = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("float32", "bfloat16", "float16", "float64")
"""What a weight may be stored as."""
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """`dtype` by name: one of FLOATS, or something that can be listed and left over but is no weight of ours."""

    shape: tuple[int, ...]
    dtype: str


@runtime_checkable
class WeightSource(Protocol):
    """Named arrays that can be read one by one."""

    path: Path
    entries: dict[str, Entry]

    def read(self, name: str) -> np.ndarray: ...


def open_source(path: Path) -> WeightSource:
    """The file or directory at `path`. Raises CheckpointError where it is none of the above, damaged or truncated."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        return SafetensorsSource(path, [path])
    if path.suffix == ".npz" and path.is_file():
        return NpzSource(path)
    if (path / SAFETENSORS).is_file():
        return SafetensorsSource(path, [path / SAFETENSORS])
    if (path / SHARDS).is_file():
        return SafetensorsSource(path, _shards(path / SHARDS))

    # openpi's folders hold the tree as `params`; a path may name either.
    for folder in (path, path / "params"):
        if (folder / "_METADATA").is_file():
            return OrbaxSource(folder)

    if (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path}: a run, not weights; insula convert {path} OUT --to insula writes those of a run"
        )

    what = "no weights of a known kind" if path.exists() else "no such file or directory"
    raise CheckpointError(
        f"{path}: {what}; expected a .safetensors or .npz file, or a directory with {SAFETENSORS}, {SHARDS} "
        "or an Orbax checkpoint (params/)"
    )


class SafetensorsSource:
    """One file, or several as one."""

    def __init__(self, path: Path, files: list[Path]):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            with _reading(file), safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    piece = opened.get_slice(name)
                    if name in self.entries:
                        raise CheckpointError(f"{file}: {name} is also in {self._file[name]}")
                    stored = piece.get_dtype()
                    self.entries[name] = Entry(tuple(piece.get_shape()), _DTYPES.get(stored, stored))
                    self._file[name] = file

    def read(self, name: str) -> np.ndarray:
        with _reading(self._file[name]), safe_open(self._file[name], framework="numpy") as opened:
            return opened.get_tensor(name)


class NpzSource:
    """big_vision's format. Slashes in names are kept."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        with _reading(path), zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    self.entries[member.removesuffix(".npy")] = _npy_entry(file)

    def read(self, name: str) -> np.ndarray:
        with _reading(self.path), np.load(self.path, allow_pickle=False) as arrays:
            return _as_float(arrays[name])


class OrbaxSource:
    """A tree saved by Orbax; names are its keys joined by slashes."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._keys: dict[str, tuple[str, ...]] = {}
        with _reading(path), ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata
            if metadata is None:
                raise CheckpointError(f"{path}: no Orbax tree here")
            for keys, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree):
                names = tuple(str(getattr(key, "key", key)) for key in keys)
                self.entries["/".join(names)] = Entry(tuple(leaf.shape), np.dtype(leaf.dtype).name)
                self._keys["/".join(names)] = names

    def read(self, name: str) -> np.ndarray:
        # Orbax restores what a tree of the same form asks for: here, one leaf.
        item: Any = 0
        for key in reversed(self._keys[name]):
            item = {key: item}

        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        with _reading(self.path), ocp.PyTreeCheckpointer() as checkpointer:
            wanted = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
            return jax.tree.leaves(checkpointer.restore(self.path.absolute(), wanted))[0]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Libraries raise dozens of kinds for a damaged file; each means the same to the caller. Nothing but their calls
    belongs inside."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or truncated ({brief(error)}); fetch it again"
        ) from error


def read_settings(path: Path, *needed: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint. Raises CheckpointError naming the file and what is wrong in it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is no regular file' if path.exists() else 'is not there'}; fetch it again")
    try:
        return read_json(path, *needed)
    except InsulaError as error:
        raise CheckpointError(f"{error}; fetch the file again") from None
    except (OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); fetch the file again") from None


def _shards(index: Path) -> list[Path]:
    """The files that an index of shards names."""
    shards = read_settings(index, "weight_map")["weight_map"]
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map is no table of tensors and their files; fetch the file again")

    # A name with a folder in it could lead anywhere on this machine.
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it; fetch all shards")

    return [index.parent / name for name in names]


def _npy_entry(file: Any) -> Entry:
    # The header alone, in NumPy's own words: the values stay where they are.
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return Entry(shape, "bfloat16" if dtype == np.dtype("V2") else dtype.name)


def _as_float(array: np.ndarray) -> np.ndarray:
    """NumPy stores bfloat16 as two nameless bytes."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
