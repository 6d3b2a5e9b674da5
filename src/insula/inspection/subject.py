"""What is looked at: samples of someone's data, as a model sees them."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np

from insula.batch import Batch
from insula.certificate.proof import Outcome
from insula.certificate.stored import stored_certificate
from insula.checkpoints.store import CheckpointStore
from insula.data.config import DataConfig
from insula.data.mixture import SampleSource
from insula.data.samples import Samples
from insula.errors import DatasetError, InputError, MissingFileError, did_you_mean
from insula.inspection.config import InspectConfig
from insula.model.params import Params, abstract_params
from insula.runs.assets import Assets, read_assets
from insula.runs.folder import CERTIFICATE_FILE, CHECKPOINTS_FOLDER, SETTINGS_FILE
from insula.runs.loading import load_model
from insula.testing import randomize
from insula.tokens.dialects import Form
from insula.train.config import TrainConfig, read_config
from insula.train.data import fit_assets, held_out_sources, open_data, training_sources

COPIES = 5
"""How many times the parameters' memory measuring takes: themselves, a gradient for each loss, work space."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A batch of one, `number` of the source `name`. `where`: episode and frame, or row, for a person."""

    batch: Batch
    where: str
    name: str
    number: int
    source: SampleSource


@dataclasses.dataclass(frozen=True)
class Subject:
    """All samples there are to look at, by source, and a model's parameters, or None where it is not to be run.

    `trained` is False where they are random ones: a fresh model's gates are zero, which would hide every leak.
    `certified`: what the certificate in a run's checkpoint says, None without a run.
    """

    name: str
    params: Params | None
    assets: Assets
    sources: dict[str, SampleSource]
    trained: bool
    certified: Outcome | None = None

    @property
    def parameters(self) -> str:
        """What weights the model runs with: "no", "trained" or "random"."""
        if self.params is None:
            return "no"
        return "trained" if self.trained else "random"

    @property
    def first(self) -> str:
        """The source that is looked at unless one is named: the first whose samples have actions, as only those can
        show insulation."""
        robots = {name: samples for name, samples in self.sources.items() if isinstance(samples, Samples)}
        acting = (name for name, samples in robots.items() if samples.form is not Form.SUBTASK)
        return next(acting, next(iter(self.sources)))

    def forms_beside(self, source: SampleSource) -> dict[str, Samples]:
        """The sources of the same robot in its other forms, by name; none of questions."""
        return {
            name: other
            for name, other in self.sources.items()
            # One entry of the mapping, not only an equal one: each has a data set and a split of its own.
            if isinstance(source, Samples) and isinstance(other, Samples)
            if other is not source and other.data is source.data
        }

    def beside(self, sample: Sample) -> list[Sample]:
        """The same frame in the other forms that it has."""
        found = []
        for name, other in self.forms_beside(sample.source).items():
            assert isinstance(sample.source, Samples)
            rows = np.flatnonzero(other.frames.index == sample.source.frames.index[sample.number])
            found += [self.sample(row, name) for row in rows.tolist()]

        return found

    def sample(self, number: int, source: str | None = None) -> Sample:
        """One sample, of `first` unless named. Raises InputError for what does not exist."""
        name = source or self.first
        if name not in self.sources:
            raise InputError(
                f"no source {name!r}{did_you_mean(name, self.sources)}; there are: {', '.join(self.sources)}"
            )

        samples = self.sources[name]
        if not 0 <= number < len(samples):
            raise InputError(f"sample {number} of {name!r} does not exist; it has 0 to {len(samples) - 1}")

        return Sample(samples.batch([number]), samples.where(number), name, number, samples)


def open_subject(config: InspectConfig) -> Subject:
    """What a config asks to look at.

    Raises InputError, MissingFileError, CheckpointError or DatasetError, saying what to give instead.
    """
    if (config.run is None) == (config.data is None):
        raise InputError("give either --run RUN, or --data DATA with --preset")

    refuse_idle_flags(config)
    return _of_run(config) if config.run else _of_data(config)


def refuse_idle_flags(config: InspectConfig) -> None:
    """Raises InputError for a flag that another one leaves without effect."""
    # A flag counts as given where its value is not the default: `InspectConfig` does not say where a value comes from.
    default = InspectConfig()
    of_run = config.run is not None
    of_serve = config.serve

    # What to drop or to add, and the flags that then say nothing.
    idle = {
        "without --run": ("model", "reading") if of_run else (),
        "with --run": () if of_run else ("training",),
        "without --serve": ("out", "certificate") if of_serve else (),
        "with --serve": () if of_serve else ("port",),
        "without --tokens-only, which does not run the model": ("certificate",) if config.tokens_only else (),
    }

    for goes, names in idle.items():
        for name in names:
            if getattr(config, name) != getattr(default, name):
                shared = {"model": "--preset or --model", "reading": _first_flag(config.reading, default.reading)}
                flag = shared.get(name) or f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} goes {goes}; drop one of them")


def _first_flag(given: DataConfig, default: DataConfig) -> str:
    # The fields of `reading` are flags of their own, without its name before them.
    changed = [f.name for f in dataclasses.fields(given) if getattr(given, f.name) != getattr(default, f.name)]
    return f"--{changed[0].replace('_', '-')}" if changed else ""


def _of_run(config: InspectConfig) -> Subject:
    """The newest checkpoint of a run and what it never trained on, or what it did."""
    assert config.run is not None
    run, path = config.run, config.run / SETTINGS_FILE
    if not path.is_file():
        near = f"; there is one in {run / 'run'}" if (run / "run" / path.name).is_file() else ""
        raise MissingFileError(f"{run}: no {path.name} here{near}; expected what `insula train --run` wrote")

    # A run may have been moved since: it is where it was found, not where its settings say.
    trained = dataclasses.replace(read_config(path), run=run)
    with CheckpointStore(run / CHECKPOINTS_FOLDER) as store:
        folder = store.assets()
        assets = read_assets(folder)

    # A checkpoint whose certificate says that it leaks is refused elsewhere. Here is where one finds out why.
    params = None if config.tokens_only else load_model(run, even_leaking=True)[0]
    certified = Outcome(stored_certificate(folder / CERTIFICATE_FILE)["outcome"])

    data = open_data(dataclasses.replace(trained, resume=True))  # as its folder says, not as its data set is today
    chosen = training_sources if config.training else held_out_sources
    sources = chosen(trained, assets, data)
    if not sources:
        raise DatasetError(f"{run}: nothing was held out of its training; look at that with --training")

    return Subject(str(run), params, assets, sources, trained=True, certified=certified)


def _of_data(config: InspectConfig) -> Subject:
    """Random parameters of a model, and a data set or a mapping as training would read it."""
    # Before anything is allocated: a machine without room would not refuse, but be brought down.
    model = config.model
    size = 4 * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(model)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not config.tokens_only and COPIES * size > memory:
        raise InputError(
            f"measuring {model.name!r} ({size / 2**30:.1f} GiB of float32 parameters) takes about "
            f"{COPIES * size / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f}; look at its sequence and masks "
            "with --tokens-only, or override sizes: --model.backbone.width, ..."
        )

    # Read as training would read it, but all of it, and a chunk that is too long is shown with the reason.
    trains = TrainConfig(
        run=Path(),
        data=config.data,
        model=model,
        reading=config.reading,
        held_out_fraction=0.0,
    )

    data = open_data(trains)
    assets = fit_assets(trains, data)
    sources = training_sources(trains, assets, data)

    # Randomized and not initialized: fresh gates are zero, and everything would come out as "vacuous".
    params = None if config.tokens_only else randomize(abstract_params(model), jax.random.key(0))
    return Subject(str(config.data), params, assets, sources, trained=False)
