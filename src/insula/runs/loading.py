"""Reading a trained model back: from a run, or from what `insula convert --to insula` wrote."""

import logging
from pathlib import Path

import jax

from insula.checkpoints.loading import load_params
from insula.checkpoints.sources import SAFETENSORS
from insula.checkpoints.store import CheckpointStore
from insula.errors import CheckpointError, InsulationError
from insula.files import is_named, read_json
from insula.model.params import Params, abstract_params
from insula.runs.assets import Assets, read_assets
from insula.runs.folder import CERTIFICATE_FILE, CHECKPOINTS_FOLDER, ROBOTS_FOLDER

log = logging.getLogger(__name__)


def load_model(run: str | Path, step: int | None = None, *, even_leaking: bool = False) -> tuple[Params, Assets]:
    """The newest checkpoint of a run, the one at `step`, or what `insula convert --to insula` wrote.

    Raises CheckpointError where there is none or it is damaged, InsulationError where its certificate says that its
    insulation leaks, unless it is to be looked at `even_leaking`.
    """
    run = Path(run)

    if (run / CHECKPOINTS_FOLDER).is_dir():
        with CheckpointStore(run / CHECKPOINTS_FOLDER) as store:
            folder = store.assets(step)

            # Before the weights, which may be gigabytes.
            if not even_leaking:
                refuse_leaking(folder)
            if not (folder / CERTIFICATE_FILE).is_file():
                log.warning("%s: no certificate, the insulation of this checkpoint was not measured", folder)

            assets = read_assets(folder)
            return store.restore("params", abstract_params(assets.config), step), assets
    if (run / SAFETENSORS).is_file() and (run / ROBOTS_FOLDER).is_dir():
        assets = read_assets(run)
        return load_params(run, assets.config, jax.random.key(0))[0], assets  # no weight is drawn: all are there

    raise CheckpointError(
        f"{run}: no checkpoints here; expected what `insula train --run` wrote (checkpoints/), or a trained "
        f"policy from `insula convert --to insula` ({SAFETENSORS}, {ROBOTS_FOLDER}/)"
    )


def assets_folder(run: str | Path, step: int | None = None) -> Path:
    """Where the files lie that travel with the weights which `load_model` reads. Raises CheckpointError where a run has
    no such step."""
    run = Path(run)
    if not (run / CHECKPOINTS_FOLDER).is_dir():
        return run

    with CheckpointStore(run / CHECKPOINTS_FOLDER) as store:
        return store.assets(step)


def refuse_leaking(folder: Path) -> None:
    """Raises InsulationError where the certificate among a checkpoint's files says that its insulation leaks,
    CheckpointError where it is damaged."""
    path = folder / CERTIFICATE_FILE
    if not is_named(path):
        return

    found = read_json(path, "outcome", "findings")
    outcome, findings = found["outcome"], found["findings"]
    if not isinstance(outcome, str) or not isinstance(findings, list):  # never a pass
        raise CheckpointError(
            f"{path}: damaged, outcome is {outcome!r:.80} and findings {findings!r:.80}; measure it again: "
            "insula inspect --run RUN --certificate FILE.json"
        )
    if outcome == "leaks":
        said = "; ".join(map(str, findings))
        raise InsulationError(f"{path}: this model's insulation leaks: {said}; look at it with insula inspect")
