"""Checkpoints on the Hugging Face hub, by explicit address only: `hf://organization/name`, or `…/name@revision`."""

from pathlib import Path

from insula.errors import CheckpointError, brief

FILES = ["*.json", "*.safetensors", "*.npz", "*.model", "params/*", "assets/*"]
"""What is fetched: nothing that could run."""


def is_address(path: Path) -> bool:
    """Whether this names a model on the hub, and nothing on this disk."""
    return path.parts[:1] == ("hf:",)


def local(path: Path) -> Path:
    """`path` as it is, or where the hub's files are once fetched (they are kept in the hub's own cache).

    Raises CheckpointError where the address is malformed, the hub cannot be reached, or has no such model.
    """
    if not is_address(path):
        return path

    if len(path.parts) != 3:
        raise CheckpointError(f"{path}: expected hf://organization/name or hf://organization/name@revision")
    name, _, revision = path.parts[2].partition("@")

    # Not among the requirements: weights are mostly on this disk already.
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"{path}: fetching needs a library: pip install huggingface_hub") from error

    try:
        fetched = snapshot_download(f"{path.parts[1]}/{name}", revision=revision or None, allow_patterns=FILES)
    except Exception as error:  # the library raises whatever its transport does
        raise CheckpointError(
            f"hf://{path.parts[1]}/{path.parts[2]} cannot be fetched ({brief(error)}); "
            "fetch it where there is a network and give the folder"
        ) from error

    return Path(fetched)
