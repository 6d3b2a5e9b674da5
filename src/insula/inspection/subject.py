"""What is looked at: samples of someone's data, as a model sees them."""

import dataclasses
import json
from pathlib import Path

import jax

from insula.assets import Assets
from insula.batch import Batch
from insula.data.mixture import Source
from insula.data.schema import DatasetError
from insula.errors import did_you_mean
from insula.model import Params, abstract_params
from insula.model.config import Config
from insula.policy import load_model
from insula.testing import randomise
from insula.train.config import TrainConfig, from_dict
from insula.train.data import fit_assets, held_out_sources, open_data, training_mixture


@dataclasses.dataclass(frozen=True)
class Subject:
    """Parameters, and all samples there are to look at, by source. `trained` is False where the parameters are random
    ones: a fresh model's gates are zero, which would hide every leak."""

    params: Params
    assets: Assets
    sources: dict[str, Source]
    trained: bool

    def sample(self, number: int, source: str | None = None) -> tuple[Batch, str]:
        """A batch of one, and where it is from. Raises IndexError or ValueError for what does not exist."""
        name = source or next(iter(self.sources))
        if name not in self.sources:
            raise ValueError(
                f"no source {name!r}{did_you_mean(name, self.sources)}; there are: {', '.join(self.sources)}"
            )
        samples = self.sources[name]
        if not 0 <= number < len(samples):
            raise IndexError(f"sample {number} of {name!r} does not exist; it has 0 to {len(samples) - 1}")
        return samples.batch([number]), samples.where(number)


def of_run(run: Path, held_out: bool = True) -> Subject:
    """The newest checkpoint of a run and what it never trained on, or what it did.

    Raises FileNotFoundError, CheckpointError, DatasetError.
    """
    path = run / "train.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no {path.name} here; expected what `insula train --run` wrote")
    config = dataclasses.replace(from_dict(json.loads(path.read_text(encoding="utf-8")), str(path)), run=run)
    params, assets = load_model(run)
    data = open_data(dataclasses.replace(config, resume=True))
    if not held_out:
        return Subject(params, assets, dict(training_mixture(config, assets, data).sources), trained=True)
    sources = held_out_sources(config, assets, data)
    if not sources:
        raise DatasetError(f"{run}: nothing was held out of its training; look at its training samples instead")
    return Subject(params, assets, sources, trained=True)


def of_data(model: Config, data: Path) -> Subject:
    """Random parameters of a model, and a data set or a mapping as training would read it."""
    config = TrainConfig(run=Path(), data=data, model=model, held_out_fraction=0.0, on_overflow="drop_token_loss")
    opened = open_data(config)
    assets = fit_assets(config, opened)
    params = randomise(abstract_params(model), jax.random.key(0))
    return Subject(params, assets, dict(training_mixture(config, assets, opened).sources), trained=False)
