"""A training run from data set to checkpoints: what `insula train` does."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from insula.certificate import make_prover, write_certificate
from insula.checkpoints.hub import local
from insula.checkpoints.loading import load_params
from insula.checkpoints.pretrained import load_pretrained
from insula.checkpoints.store import CheckpointStore
from insula.data.loader import Loader
from insula.data.mapping import Mapping
from insula.data.mixture import Mixture, SampleSource, quarantined
from insula.errors import CheckpointError, InputError
from insula.files import write_json
from insula.losses import compute_loss
from insula.model.params import Params, add_lora, init_params
from insula.runs.assets import read_assets
from insula.runs.folder import (
    CERTIFICATE_FILE,
    CHECKPOINTS_FOLDER,
    INIT_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    SETTINGS_FILE,
)
from insula.shapes import PRNGKeyArray
from insula.train.augment import augmented_loss
from insula.train.config import TrainConfig, read_config, to_dict
from insula.train.data import fit_assets, held_out_sources, open_data, training_mixture, write_mapping
from insula.train.loop import Every, Metrics, MetricsLog, fit
from insula.train.optimizer import make_optimizer
from insula.train.step import TrainState, make_train_state, make_train_step

log = logging.getLogger(__name__)
CERTIFIED = 4
"""Samples that a checkpoint's insulation is measured on."""
LORA_KEY = 1 << 16
"""Folded into the key of the initial weights: apart from all that `initialize` derives from it."""


def train(config: TrainConfig, quiet: bool = False) -> bool:
    """Train until `config.steps`. Returns False where Ctrl-C ended it early; `resume` then goes on.

    Raises DatasetError, CheckpointError, ValueError or NonFiniteError, each with what to do about it.
    """
    if config.resume:
        config = _stored(config)
    data = open_data(config)
    with CheckpointStore(config.run / CHECKPOINTS_FOLDER) as store:
        if not config.resume and store.latest() is not None:
            raise CheckpointError(
                f"{config.run} holds a run at step {store.latest()}; resume it, or choose another folder"
            )
        assets = read_assets(store.assets()) if config.resume else fit_assets(config, data)
        mixture = training_mixture(config, assets, data)
        unseen = held_out_sources(config, assets, data)
        write_json(config.run / SETTINGS_FILE, to_dict(dataclasses.replace(config, resume=False)))
        write_mapping(config, data.mapping)

        init_rng, step_rng, eval_rng = jax.random.split(jax.random.key(config.seed), 3)
        optimizer = make_optimizer(config.optimizer, config.model, config.steps)
        if config.resume:  # what it started from need not be there any more
            like = jax.eval_shape(lambda key: make_train_state(init_params(config.model, key), optimizer), init_rng)
            state = store.restore("train_state", like)
        else:
            state = make_train_state(start_params(config, init_rng), optimizer)
        loss = augmented_loss if config.augment else compute_loss
        step = make_train_step(config.model, optimizer, config.optimizer.ema_decay, step_rng, loss)

        certify = make_certifier(config, mixture, eval_rng) if config.certify else None

        def save(state: TrainState) -> None:
            if store.has(int(state.step)):
                return
            write_proof = certify(state) if certify else _nothing

            def write(folder: Path) -> None:
                assets.write(folder)
                write_proof(folder)

            store.save(int(state.step), state.ema_params, state, write)

        hooks = [Every(config.checkpoint_every, save)]
        if unseen:
            hooks.insert(0, Every(config.evaluate_every, make_held_out_losses(config, data.mapping, unseen, eval_rng)))
        if config.on_bad_sample == "quarantine":
            hooks.append(Every(config.log_every, lambda _: {"quarantined": float(quarantined(mixture))}))
        shard = (jax.process_index(), jax.process_count())
        with (
            contextlib.closing(_metrics_log(config)) as metrics,
            Loader(mixture, config.batch_size, config.seed, int(state.step), config.workers, shard) as batches,
        ):
            state, complete = fit(state, step, batches, config.steps, metrics, config.log_every, tuple(hooks), quiet)
        save(state)
    if bad := quarantined(mixture):
        log.warning("%d samples were left out, see %s", bad, config.run / QUARANTINE_FILE)
    return complete


def start_params(config: TrainConfig, rng: PRNGKeyArray) -> Params:
    """Parameters from `init`, from the embedded backbone, or fresh, and LoRA around them where the model has it. What
    `init` gave is written to init.json.

    Raises ValueError for LoRA on an expert that starts fresh: its adaRMS gates are zero, and frozen they would stay so,
    which hides everything between them from the flow loss.
    """
    plain, lora = dataclasses.replace(config.model, lora=None), config.model.lora
    trained_expert = False
    if config.from_scratch:
        params = init_params(plain, rng)
    elif config.init is None:
        params = load_pretrained(plain, rng)
    else:
        params, report = load_params(local(config.init), plain, rng, config.fresh, config.ignore)
        log.warning("%s", report.summary())
        report.write(config.run / INIT_FILE)
        trained_expert = not any(name.startswith("expert.layers.") for name in report.fresh)
    if lora is None:
        return params
    if "expert" in lora.parts and not trained_expert:
        raise InputError(
            f"config {plain.name!r}: lora.parts {lora.parts} would freeze an expert that starts from random weights "
            "and gates of zero, so it could never learn; train it whole with lora.parts ('backbone',)"
        )
    return add_lora(params, config.model, jax.random.fold_in(rng, LORA_KEY))


def make_certifier(
    config: TrainConfig, mixture: Mixture, rng: PRNGKeyArray
) -> Callable[[TrainState], Callable[[Path], None]]:
    """What measures the insulation of a state and returns a writer of its certificate. The samples are always the same.

    Raises InsulationError where the flow loss reaches the backbone although the model is to be insulated.
    """
    measure = make_prover(config.model)
    source, rows = mixture.order(config.batch_size, config.seed)[0]
    batch = mixture.batch(source, rows)
    assert batch.loss_mask is not None  # every source tokenizes
    both = batch.action_mask.any((1, 2)) & batch.loss_mask.any(1)
    chosen = np.flatnonzero(both)[:CERTIFIED] if both.any() else np.arange(min(CERTIFIED, len(rows)))
    some = jax.tree.map(lambda x: x[chosen], batch)
    sources = list(mixture.sources.values())
    samples = [sources[source[i]].where(int(rows[i])) for i in chosen]

    def certify(state: TrainState) -> Callable[[Path], None]:
        proof = measure(state.ema_params, some, rng)
        if proof.outcome == "leaks":
            proof.check()
        about = {"step": int(state.step), "seed": config.seed, "samples": samples}
        return lambda folder: write_certificate(folder / CERTIFICATE_FILE, proof, config.model, about)

    return certify


def _nothing(folder: Path) -> None:
    """No certificate."""


def make_held_out_losses(
    config: TrainConfig, mapping: Mapping, unseen: dict[str, SampleSource], rng: PRNGKeyArray, batches: int = 8
) -> Callable[[TrainState], Metrics]:
    """Mean losses of the averaged parameters on the same unseen samples, noise and times each time. The only robot's
    are called "held_out/flow" and so on; those of other sources carry their name."""
    loss = jax.jit(lambda params, batch, key: compute_loss(params, config.model, batch, key))
    read: dict[str, Mixture] = {}
    groups: dict[str, list[np.ndarray]] = {}
    for name, samples in unseen.items():
        quarantine = config.run / QUARANTINE_FILE
        read[name] = Mixture({f"held_out/{name}": samples}, None, config.on_bad_sample, quarantine)
        size = min(config.batch_size, len(samples))
        rows = np.random.default_rng(config.seed).permutation(len(samples))[: batches * size]
        groups[name] = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]

    def look(state: TrainState) -> Metrics:
        metrics: Metrics = {}
        for name in unseen:
            made = (read[name].batch(np.zeros_like(rows), rows) for rows in groups[name])
            found = [loss(state.ema_params, batch, jax.random.fold_in(rng, i))[1] for i, batch in enumerate(made)]
            prefix = "held_out" if name in mapping.robots and len(mapping.robots) == 1 else f"held_out/{name}"
            kinds = ("flow", "fast", "token_accuracy") if name in mapping.robots else ("fast", "token_accuracy")
            metrics |= {f"{prefix}/{kind}": float(np.mean([m[kind] for m in found])) for kind in kinds}
        return metrics

    return look


def _metrics_log(config: TrainConfig) -> MetricsLog:
    writer = None
    if config.tensorboard:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InputError("tensorboard=True needs the extra: pip install 'insula[tensorboard]'") from error
        writer = SummaryWriter(str(config.run / "tensorboard"))
    return MetricsLog(config.run / METRICS_FILE, writer)


def _stored(config: TrainConfig) -> TrainConfig:
    """The settings a run was started with."""
    path = Path(config.run) / SETTINGS_FILE
    if not path.is_file():
        raise CheckpointError(f"{config.run}: nothing to resume, {path.name} is not there; start without resume")
    return dataclasses.replace(read_config(path), run=config.run, resume=True)
