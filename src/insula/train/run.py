"""A training run from data set to checkpoints: what `insula train` does."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from insula.assets import Assets, read_assets
from insula.checkpoints.hub import local
from insula.checkpoints.loading import load_params
from insula.checkpoints.pretrained import load_pretrained
from insula.checkpoints.store import CheckpointError, CheckpointStore
from insula.data.lerobot import LeRobotDataset
from insula.data.loader import Loader
from insula.data.samples import Samples, action_chunks, fit_stats, prepare, split_episodes
from insula.losses import compute_loss
from insula.model import Params, add_lora, init_params
from insula.shapes import PRNGKeyArray
from insula.tokens import text
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer
from insula.train.config import TrainConfig, from_dict, to_dict
from insula.train.loop import Every, Metrics, MetricsLog, fit
from insula.train.optimiser import make_optimiser
from insula.train.step import TrainState, make_train_step, start_state

log = logging.getLogger(__name__)
FAST_FIT_CHUNKS = 20_000
LORA_KEY = 1 << 16
"""Folded into the key of the initial weights: apart from all that `initialise` derives from it."""


def train(config: TrainConfig, quiet: bool = False) -> bool:
    """Train until `config.steps`. Returns False where Ctrl-C ended it early; `resume` then goes on.

    Raises DatasetError, CheckpointError, ValueError or NonFiniteError, each with what to do about it.
    """
    if config.resume:
        config = _stored(config)
    if config.data is None:
        raise ValueError("no data set; give --data, a LeRobot v3.0 folder (insula collect makes one)")
    dataset = LeRobotDataset(config.data)
    episodes, held_out = split_episodes(len(dataset.episodes), config.held_out_fraction, config.seed)
    with CheckpointStore(config.run / "checkpoints") as store:
        if not config.resume and store.latest() is not None:
            raise CheckpointError(
                f"{config.run} holds a run at step {store.latest()}; resume it, or choose another folder"
            )
        assets = read_assets(store.assets()) if config.resume else make_assets(config, dataset, episodes)
        samples = prepare_samples(config, assets, dataset, episodes)
        unseen = prepare_samples(config, assets, dataset, held_out) if len(held_out) else None
        _write_config(config)

        init_rng, step_rng, eval_rng = jax.random.split(jax.random.key(config.seed), 3)
        optimiser = make_optimiser(config.optimiser, config.model, config.steps)
        if config.resume:  # what it started from need not be there any more
            like = jax.eval_shape(lambda key: start_state(init_params(config.model, key), optimiser), init_rng)
            state = store.restore("train_state", like)
        else:
            state = start_state(start_params(config, init_rng), optimiser)
        step = make_train_step(config.model, optimiser, config.optimiser.ema_decay, step_rng)

        def save(state: TrainState) -> None:
            store.save(int(state.step), state.average, state, assets.write)

        hooks = [Every(config.checkpoint_every, save)]
        if unseen is not None:
            hooks.insert(0, Every(config.evaluate_every, held_out_losses(config, unseen, eval_rng)))
        with (
            contextlib.closing(_metrics_log(config)) as metrics,
            Loader(samples, config.batch_size, config.seed, start_step=int(state.step)) as batches,
        ):
            state, complete = fit(state, step, batches, config.steps, metrics, config.log_every, tuple(hooks), quiet)
        save(state)
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
        params, report = load_params(local(config.init), plain, rng, config.fresh, config.leave)
        log.warning("%s", report.summary())
        report.write(config.run / "init.json")
        trained_expert = not any(name.startswith("expert.layers.") for name in report.fresh)
    if lora is None:
        return params
    if "expert" in lora.parts and not trained_expert:
        raise ValueError(
            f"config {plain.name!r}: lora.parts {lora.parts} would freeze an expert that starts from random weights "
            "and gates of zero, so it could never learn; train it whole with lora.parts ('backbone',)"
        )
    return add_lora(params, config.model, jax.random.fold_in(rng, LORA_KEY))


def make_assets(config: TrainConfig, dataset: LeRobotDataset, episodes: np.ndarray) -> Assets:
    """Normalisation and FAST fitted on the training episodes, and the tokenizer made of them."""
    model = config.model
    stats = fit_stats(dataset, episodes)
    for name, width in (("state", model.state_dim), ("actions", model.action_dim)):
        if stats[name].dim != width:
            raise ValueError(
                f"data set {dataset.root}: {name} has {stats[name].dim} dimensions, config {model.name!r} "
                f"expects {width}; set {'state_dim' if name == 'state' else 'action_dim'}={stats[name].dim}"
            )
    chunks = action_chunks(dataset, stats, model.horizon, episodes, limit=FAST_FIT_CHUNKS)
    codec = FASTCodec.load(config.fast) if config.fast else FASTCodec.fit(chunks, config.fast_vocab, config.fast_scale)
    tokenizer = FASTTokenizer(
        text.load(config.text_tokenizer) if config.text_tokenizer else text.embedded(),
        codec,
        config.dialect,
        max_token_len=model.max_token_len,
        max_prompt_len=model.max_prompt_len,
        fast_last_id=config.fast_last_id,
    )
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"text and FAST tokens need {tokenizer.vocab_size} entries, config {model.name!r} has "
            f"vocab_size {model.vocab_size}; raise it, or lower fast_vocab"
        )
    return Assets(model, tokenizer, stats)


def prepare_samples(config: TrainConfig, assets: Assets, dataset: LeRobotDataset, episodes: np.ndarray) -> Samples:
    """Tokenise and normalise `episodes` as this run's model reads them."""
    return prepare(
        dataset,
        assets.tokenizer,
        assets.stats,
        config.model.horizon,
        config.model.cameras,
        config.on_overflow,
        episodes,
        state_in_prompt=config.model.state_input == "prompt",
    )


def held_out_losses(
    config: TrainConfig, samples: Samples, rng: PRNGKeyArray, batches: int = 8
) -> Callable[[TrainState], Metrics]:
    """Mean losses of the averaged parameters on the same unseen samples, noise and times each time."""
    size = min(config.batch_size, len(samples))
    rows = np.random.default_rng(config.seed).permutation(len(samples))[: max(1, batches * size // size) * size]
    groups = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    loss = jax.jit(lambda params, batch, key: compute_loss(params, config.model, batch, key))

    def look(state: TrainState) -> Metrics:
        found = [loss(state.average, samples.batch(g), jax.random.fold_in(rng, i))[1] for i, g in enumerate(groups)]
        return {f"held_out/{k}": float(np.mean([m[k] for m in found])) for k in ("flow", "fast", "token_accuracy")}

    return look


def _metrics_log(config: TrainConfig) -> MetricsLog:
    writer = None
    if config.tensorboard:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard=True needs the extra: pip install 'insula[tensorboard]'") from error
        writer = SummaryWriter(str(config.run / "tensorboard"))
    return MetricsLog(config.run / "metrics.jsonl", writer)


def _write_config(config: TrainConfig) -> None:
    path = config.run / "train.json"
    path.write_text(json.dumps(to_dict(dataclasses.replace(config, resume=False)), indent=1) + "\n", encoding="utf-8")


def _stored(config: TrainConfig) -> TrainConfig:
    """The settings a run was started with."""
    path = Path(config.run) / "train.json"
    if not path.is_file():
        raise CheckpointError(f"{config.run}: nothing to resume, {path.name} is not there; start without resume")
    stored = from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    return dataclasses.replace(stored, run=config.run, resume=True)
