"""The embedded pretrained backbone that ships with the package."""

from importlib.resources import files
from pathlib import Path

from insula.checkpoints.loading import load_params
from insula.errors import CheckpointError
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.shapes import PRNGKeyArray

FOLDER = Path(str(files("insula"))) / "pretrained"


def load_pretrained(config: ModelConfig, rng: PRNGKeyArray) -> Params:
    """Vision and backbone from the embedded weights, a fresh expert.

    Raises CheckpointError where the config has other sizes than the embedded backbone.
    """
    try:
        return load_params(FOLDER / "backbone.safetensors", config, rng, fresh=["expert.*"])[0]
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the embedded backbone fits the sizes of the preset 'tiny' only: give weights with --init, or "
            "--from-scratch"
        ) from error
