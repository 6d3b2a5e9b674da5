"""A training run from data set to checkpoints: what `insula train` does."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from insula.batch import Batch, LossName
from insula.certificate.gradients import make_prover
from insula.certificate.stored import write_certificate
from insula.checkpoints.hub import local
from insula.checkpoints.loading import load_params
from insula.checkpoints.pretrained import load_pretrained
from insula.checkpoints.store import CheckpointStore
from insula.data.loader import Loader
from insula.data.mapping import Mapping
from insula.data.mixture import Mixture, SampleSource, quarantined
from insula.errors import CheckpointError, FileError, InputError
from insula.files import check_output_folder, write_json
from insula.losses import Metrics, compute_loss
from insula.model.params import Params, add_lora, init_params
from insula.parallel.mesh import ONE_DEVICE, check_batch_size, local_rows, make_mesh, put_batch, put_everywhere
from insula.parallel.processes import check_same, is_main, on_main
from insula.parallel.sharding import put
from insula.runs.assets import read_assets
from insula.runs.folder import (
    CERTIFICATE_FILE,
    CHECKPOINTS_FOLDER,
    DAMAGED_FOLDER,
    INIT_FILE,
    LOCK_FILE,
    METRICS_FILE,
    PROFILE_FOLDER,
    QUARANTINE_FILE,
    SETTINGS_FILE,
    SKIPPED_FILE,
)
from insula.runs.loading import refuse_leaking
from insula.shapes import PRNGKeyArray
from insula.tokens.dialects import Form
from insula.train.augment import augment
from insula.train.config import TrainConfig, to_dict
from insula.train.data import fingerprint, fit_assets, held_out_sources, open_data, training_mixture, write_data
from insula.train.loop import Every, MetricRow, MetricsLog, run_loop
from insula.train.optimizer import averaged, make_optimizer
from insula.train.profile import Profile
from insula.train.rates import make_rates
from insula.train.resume import resumed_settings, tell_changes
from insula.train.sinks import open_sinks
from insula.train.step import TrainState, abstract_state, make_train_state, make_train_step, served_params

log = logging.getLogger(__name__)
CERTIFIED = 4
"""Samples that a checkpoint's insulation is measured on."""
HELD_OUT_BATCHES = 8
"""Of each source, at every look."""
LORA_KEY = 1 << 16
"""Folded into the key of the initial weights: apart from all that `initialize` derives from it."""


def train(config: TrainConfig, quiet: bool = False, base: TrainConfig | None = None) -> bool:
    """Train until `config.steps`. Returns False where a signal ended it early; `resume` then goes on.

    With `resume`, settings are those of the run and what was asked for: where `config` differs from `base`, which is
    `TrainConfig(run)` unless given (insula.train.resume).

    Raises InputError, DatasetError, CheckpointError, InsulationError or NonFiniteError, each with what to do about it.
    """
    stored = None
    if config.resume:
        stored, config = resumed_settings(config, base)

    on_main(lambda: check_output_folder(config.run, "run"))
    folder = config.run / CHECKPOINTS_FOLDER
    # The lock first: opening a store clears away what an interrupted save left, which may be another process's.
    with only_trainer(config.run), CheckpointStore(folder, config.keep, config.keep_every) as store:
        aside = config.run / DAMAGED_FOLDER
        newest = on_main(lambda: store.latest() if stored is None else store.set_damaged_aside(aside))
        store.look_again()
        met = config.run / LOCK_FILE  # process 0 has written there, by now
        check_same(
            "the run's folder",
            met.read_text(encoding="utf-8") if met.is_file() else "nothing",
            f"{config.run} must lie on a disk that all share",
        )
        if stored is None and newest is not None:
            raise CheckpointError(f"{config.run} holds a run at step {newest}; resume it, or choose another folder")

        if stored is not None and newest is not None:
            refuse_leaking(store.assets())  # more training does not mend a gradient that goes where it must not
            if _is_finished(config, store, newest):
                log.warning("%s: already at step %d of %d; --steps M goes on", config.run, newest, config.steps)
                return True
            tell_changes(stored, config, newest)

        return _train(config, stored, store, quiet)


def _train(config: TrainConfig, stored: TrainConfig | None, store: CheckpointStore, quiet: bool) -> bool:
    """From the data to the last checkpoint. `stored`: the settings so far, of a run that goes on."""
    mesh = make_mesh(config.mesh)
    check_batch_size(mesh, config.batch_size, config.accumulate)
    check_same("settings", json.dumps(to_dict(config)), "start all of them alike")
    with _metrics_log(config) as metrics, jax.set_mesh(mesh):
        moved = config.data if stored is not None and config.data != stored.data else None
        data = open_data(config, moved)
        check_same("data", fingerprint(data), "each must read the same episodes")
        assets = read_assets(store.assets()) if stored is not None else fit_assets(config, data)
        mixture = training_mixture(config, assets, data)
        unseen = held_out_sources(config, assets, data)

        # Only once all data could be opened: a run that could not start leaves no settings. And before the first
        # update, since a checkpoint without them could not be resumed.
        if is_main():
            kept = dataclasses.replace(config, resume=False, profile_steps=None)
            write_json(config.run / SETTINGS_FILE, to_dict(kept))
            write_data(config, data)

        init_rng, step_rng, eval_rng = jax.random.split(jax.random.key(config.seed), 3)
        optimizer = make_optimizer(config.optimizer, config.model, config.steps)
        state, places = start_state(config, stored, store, optimizer, mesh, init_rng)
        step = make_train_step(
            config.model,
            optimizer,
            config.optimizer.ema_decay,
            step_rng,
            prepare=augment if config.augment else None,
            parts=config.accumulate,
            places=places,
            steps=config.steps,
        )

        def save(state: TrainState) -> None:
            store.save(int(state.step), state, served_params, assets.write)

        certify = make_certifier(config, mixture, eval_rng, store, mesh) if config.certify else _nothing
        if stored is not None:  # the run may have been killed between its checkpoint and that one's certificate
            certify(state)

        # Saving comes first. Measuring takes longer, and may raise or be killed: the updates must not be lost to it.
        hooks = [Every(config.checkpoint_every, save, kept=True)]
        if unseen:
            look = make_held_out_losses(config, data.mapping, unseen, eval_rng, mesh)
            hooks.append(Every(config.evaluate_every, look))
        hooks += [Every(config.checkpoint_every, certify), Every(config.log_every, lambda _: store.check())]
        if config.reading.on_bad_sample == "quarantine":
            hooks.append(Every(config.log_every, lambda _: {"quarantined": float(quarantined(mixture))}))

        state, complete = update_all(config, state, step, mixture, mesh, metrics, tuple(hooks), quiet)
        save(state)
        store.wait()  # a scheduler kills soon after its signal: weights first, then their certificate
        certify(state)

    if bad := quarantined(mixture):
        log.warning("%d samples were left out, see %s", bad, config.run / QUARANTINE_FILE)
    return complete


def update_all(
    config: TrainConfig,
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    mixture: Mixture,
    mesh: Mesh,
    metrics: MetricsLog,
    hooks: tuple[Every, ...],
    quiet: bool,
) -> tuple[TrainState, bool]:
    """The loop over batches of the mixture. Returns and raises as `run_loop`, WorkerError as `Loader`."""
    tell = make_skipped_log(config, mixture)
    profile = Profile(config.run / PROFILE_FOLDER, config.profile_steps)
    rows = local_rows(mesh, config.batch_size)
    with Loader(mixture, config.batch_size, config.seed, int(state.step), config.workers, rows) as loader:
        batches = (put_batch(batch, mesh, config.batch_size) for batch in loader)
        return run_loop(
            state,
            step,
            batches,
            config.steps,
            metrics,
            config.log_every,
            hooks,
            quiet,
            tell,
            rates=make_rates(config, mesh),
            profile=profile,
        )


def start_state(
    config: TrainConfig,
    stored: TrainConfig | None,
    store: CheckpointStore,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rng: PRNGKeyArray,
) -> tuple[TrainState, TrainState]:
    """The newest state of a run that goes on, else the one before the first update; and where each leaf of it lives."""
    # Shapes are enough to restore into: what a run was started from (`init`) need not be there any more.
    having = averaged(config.optimizer, config.model)
    like = abstract_state(config.model, optimizer, mesh, having)
    places = jax.tree.map(lambda leaf: leaf.sharding, like)
    if stored is not None:
        return store.restore("train_state", like), places

    # On one device of this process: each process makes or reads all of them, and gives its devices their pieces.
    with jax.set_mesh(make_mesh(ONE_DEVICE, jax.local_devices()[:1])):
        params = start_params(config, jax.device_get(rng))
    params = put(params, places.params)
    start = jax.jit(lambda params: make_train_state(params, optimizer, having), out_shardings=places, donate_argnums=0)
    return start(params), places


@contextlib.contextmanager
def only_trainer(run: Path) -> Iterator[None]:
    """Keeps a second training out of the folder of a run. Raises FileError where there is one in it already."""
    if not is_main():  # process 0 holds the lock for all of its training
        yield
        return

    with (run / LOCK_FILE).open("a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel's, gone with this process however it ends
        except BlockingIOError:
            raise FileError(f"{run}: another process is training here; wait for it, or choose another folder") from None

        file.truncate(0)
        file.write(uuid.uuid4().hex)  # by which other processes of this training know the folder again
        file.flush()
        yield


def _is_finished(config: TrainConfig, store: CheckpointStore, newest: int) -> bool:
    """Whether nothing is left to do. Raises InputError where fewer steps are asked for than were made."""
    if newest > config.steps:
        raise InputError(f"--steps {config.steps}: {config.run} is at step {newest} already; ask for more")

    # Without its certificate there is one thing left to do, which `_train` does before its loop of no updates.
    certified = (store.assets(newest) / CERTIFICATE_FILE).is_file()
    return newest == config.steps and (certified or not config.certify)


def start_params(config: TrainConfig, rng: PRNGKeyArray) -> Params:
    """Parameters from `init`, from the embedded backbone, or fresh, and LoRA around them where the model has it. What
    `init` gave is written to init.json.

    Raises InputError for LoRA on an expert that starts fresh: its adaRMS gates are zero, and frozen they would stay so,
    which hides everything between them from the flow loss. Else as `load_params` and `load_pretrained`.
    """
    # Weights are loaded and drawn as for the model without LoRA, which is put around them and starts as no change.
    plain, lora = dataclasses.replace(config.model, lora=None), config.model.lora
    trained_expert = False
    if config.from_scratch:
        params = init_params(plain, rng)
    elif config.init is None:
        params = load_pretrained(plain, rng)
    else:
        params, report = load_params(local(config.init), plain, rng, config.fresh, config.ignore)
        log.warning("%s", report.summary())
        if is_main():
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
    config: TrainConfig, mixture: Mixture, rng: PRNGKeyArray, store: CheckpointStore, mesh: Mesh
) -> Callable[[TrainState], None]:
    """What measures the insulation of a state and adds the certificate to its checkpoint, once that is on disk.

    It raises InsulationError where the flow loss reaches the backbone although the model is to be insulated. That
    checkpoint stays, as evidence; its certificate keeps it from being resumed or served.
    """
    measure = make_prover(config.model)

    # Samples of the first batch, so always the same ones: certificates differ by the weights alone.
    source, rows = mixture.order(config.batch_size, config.seed)[0]
    batch = mixture.batch(source, rows)
    assert batch.loss_mask is not None  # every source tokenizes

    # Those with an action and with tokens, where there are any: a loss that is not asked for has no gradient to find.
    both = batch.action_mask.any((1, 2)) & batch.loss_mask.any(1)
    chosen = np.flatnonzero(both)[:CERTIFIED] if both.any() else np.arange(min(CERTIFIED, len(rows)))
    some = put_everywhere(jax.tree.map(lambda x: x[chosen], batch), mesh)
    sources = list(mixture.sources.values())
    samples = [sources[source[i]].where(int(rows[i])) for i in chosen]

    certified: set[int] = set()  # of which some may not be on disk yet

    def certify(state: TrainState) -> None:
        step = int(state.step)
        if step in certified or on_main(lambda: store.has_file(step, CERTIFICATE_FILE)):
            return
        certified.add(step)

        proof = measure(served_params(state), some, rng)
        about = {"step": step, "seed": config.seed, "samples": samples}
        store.add_file(step, CERTIFICATE_FILE, lambda path: write_certificate(path, proof, config.model, about))
        if proof.outcome == "leaks":
            store.wait()  # the certificate keeps this checkpoint from being resumed: it must be there before we end
            proof.check()

    return certify


def make_skipped_log(config: TrainConfig, mixture: Mixture) -> Callable[[int], None]:
    """What writes the samples of an update that was skipped: one of them may be the reason."""
    sources = list(mixture.sources.values())

    def tell(step: int) -> None:
        if not is_main():
            return
        source, rows = mixture.order(config.batch_size, config.seed)[step - 1]  # the update to step 1 has batch 0
        samples = [sources[i].where(int(row)) for i, row in zip(source, rows, strict=True)]
        with (config.run / SKIPPED_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": samples}) + "\n")

    return tell


def _nothing(state: TrainState) -> None:
    """No certificate."""


def make_held_out_losses(
    config: TrainConfig, mapping: Mapping, unseen: dict[str, SampleSource], rng: PRNGKeyArray, mesh: Mesh
) -> Callable[[TrainState], MetricRow]:
    """Mean losses of what would be served on the same unseen samples, noise and times each time. The only robot's
    are called "held_out/flow" and so on; those of other sources carry their name ("held_out/arm:subtask/fast")."""
    loss = jax.jit(lambda params, batch, key: compute_loss(params, config.model, batch, key))  # never augmented
    read: dict[str, Mixture] = {}
    groups: dict[str, list[np.ndarray]] = {}
    for name, samples in unseen.items():
        quarantine = config.run / QUARANTINE_FILE
        read[name] = Mixture({f"held_out/{name}": samples}, None, config.reading.on_bad_sample, quarantine)

        # Whole batches only: each size would be compiled, and a mean over them weighs every sample alike.
        size = min(config.batch_size, len(samples))
        rows = np.random.default_rng(config.seed).permutation(len(samples))[: HELD_OUT_BATCHES * size]
        groups[name] = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]

    def look(state: TrainState) -> MetricRow:
        metrics: MetricRow = {}
        for name in unseen:
            made = (put_everywhere(read[name].batch(np.zeros_like(rows), rows), mesh) for rows in groups[name])
            params = served_params(state)
            found = [loss(params, batch, jax.random.fold_in(rng, i))[1] for i, batch in enumerate(made)]
            prefix = "held_out" if name in mapping.robots and len(mapping.robots) == 1 else f"held_out/{name}"
            kinds = measured_kinds(mapping, name)
            metrics |= {f"{prefix}/{kind}": float(np.mean([m[kind] for m in found])) for kind in kinds}
        return metrics

    return look


def measured_kinds(mapping: Mapping, name: str) -> list[str]:
    """What a source has to measure: a loss of 0, for want of anything that it scores, must not look like a very good
    one. Questions and subtasks have no action."""
    source = mapping.sources[name]
    taught = mapping.robots[source.entry].losses if source.form not in (None, Form.SUBTASK) else (LossName.FAST,)
    of_tokens = ["fast", "token_accuracy"] if LossName.FAST in taught else []
    return (["flow"] if LossName.FLOW in taught else []) + of_tokens


def _metrics_log(config: TrainConfig) -> MetricsLog:
    if not is_main():  # one of several processes tells
        return MetricsLog(None)

    sinks = open_sinks(config.log_to, config.run, to_dict(config))
    return MetricsLog(config.run / METRICS_FILE, sinks)
