"""Our own safetensors: a tree of parameters as one file, leaves named by their path (`backbone.layers.query`)."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from insula.checkpoints.store import CheckpointError
from insula.errors import did_you_mean


def _names(tree: Any) -> list[str]:
    def name(path: tuple[Any, ...]) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".")

    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def save(path: Path, tree: Any, dtype: str = "bfloat16") -> None:
    """Write every leaf in `dtype`."""
    leaves = [np.asarray(jnp.asarray(leaf, dtype)) for leaf in jax.tree.leaves(tree)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(_names(tree), leaves, strict=True)), path)


def load(path: Path, like: Any) -> Any:
    """The tree of `like`, float32, read from `path`.

    Raises CheckpointError where the file is missing or damaged, a leaf is missing, left over, or of another shape.
    """
    names, leaves = _names(like), jax.tree.leaves(like)
    try:
        with safe_open(path, framework="numpy") as file:
            stored = set(file.keys())
            for name in sorted(stored ^ set(names)):
                kind = "left over" if name in stored else "missing"
                raise CheckpointError(
                    f"{path}: weight {name} is {kind}{did_you_mean(name, set(names) ^ stored - {name})}"
                )
            arrays = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    for name, array, leaf in zip(names, arrays, leaves, strict=True):
        if array.shape != leaf.shape:
            raise CheckpointError(f"{path}: {name} has shape {array.shape}, the config expects {leaf.shape}")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(a, jnp.float32) for a in arrays])
