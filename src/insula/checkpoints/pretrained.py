"""The embedded pretrained backbone that ships with the package."""

from importlib.resources import files
from pathlib import Path

from insula.checkpoints import weights
from insula.checkpoints.store import CheckpointError
from insula.model import Params, abstract_params
from insula.model.config import Config

FOLDER = Path(str(files("insula"))) / "pretrained"


def load_pretrained(config: Config, params: Params) -> Params:
    """`params` with vision and backbone from the embedded weights; the expert stays as it is.

    Raises CheckpointError where the config has other sizes than the embedded backbone.
    """
    like = abstract_params(config)
    try:
        loaded = weights.load(FOLDER / "backbone.safetensors", {"vision": like.vision, "backbone": like.backbone})
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the embedded backbone fits the preset 'tiny' only, use --from-scratch"
        ) from error
    return Params(loaded["vision"], loaded["backbone"], params.expert)
