"""Reading a trained model back: from a run, or from what `insula convert --to insula` wrote."""

from pathlib import Path

import jax

from insula.checkpoints.loading import load_params
from insula.checkpoints.sources import SAFETENSORS
from insula.checkpoints.store import CheckpointStore
from insula.errors import CheckpointError
from insula.model.params import Params, abstract_params
from insula.runs.assets import Assets, read_assets
from insula.runs.folder import CHECKPOINTS_FOLDER, TOKENIZER_FOLDER


def load_model(run: str | Path, step: int | None = None) -> tuple[Params, Assets]:
    """The newest checkpoint of a run, the one at `step`, or what `insula convert --to insula` wrote.

    Raises CheckpointError where there is none or it is damaged.
    """
    run = Path(run)
    if (run / CHECKPOINTS_FOLDER).is_dir():
        with CheckpointStore(run / CHECKPOINTS_FOLDER) as store:
            assets = read_assets(store.assets(step))
            return store.restore("params", abstract_params(assets.config), step), assets
    if (run / SAFETENSORS).is_file() and (run / TOKENIZER_FOLDER).is_dir():
        assets = read_assets(run)
        return load_params(run, assets.config, jax.random.key(0))[0], assets
    raise CheckpointError(
        f"{run}: no checkpoints here; expected what `insula train --run` wrote (checkpoints/), or a trained "
        f"policy from `insula convert --to insula` ({SAFETENSORS}, {TOKENIZER_FOLDER}/)"
    )
