"""Give the small backbone some knowledge to insulate, from rendered scenes and what the simulator knows about them.

    grounding   image tokens learn the words for what they show, and where      (no sentences yet)
    pointing    "what is on the table" → every name and its two location tokens (the first sentences)
    all         every kind of question

Without the first two, a small backbone learns to ignore its images before it learns to look (docs/log.md). There are no
robot actions in it, and scenes come from seeds that no demonstration and no evaluation uses.

An interrupted pretraining goes on from its last checkpoint when it is started again.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from insula.batch import Batch
from insula.checkpoints.formats import BACKBONE
from insula.checkpoints.store import CheckpointStore
from insula.checkpoints.writing import from_params, write_safetensors
from insula.checks import check_integer, check_number, check_seed
from insula.collect.demonstrations import HELD_OUT_SCENES
from insula.collect.scenes import KIND_WEIGHTS, Scenes, question_batch, render_scenes, tokenize
from insula.errors import InputError
from insula.evaluate.knowledge import Knowledge, measure_knowledge
from insula.files import check_output_folder, read_json, write_json
from insula.losses import language_share
from insula.model.config import TINY_BFLOAT16, ModelConfig
from insula.model.params import Params, init_params
from insula.pretrain.grounding import Head, grounding_loss, name_tokens
from insula.runs.folder import CHECKPOINTS_FOLDER, METRICS_FILE, PRETRAIN_FILE
from insula.shapes import Array, Float
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer
from insula.tokens.text import TextTokenizer, embedded
from insula.train.loop import Every, MetricRow, MetricsLog, run_loop
from insula.train.optimizer import DEFAULT, OptimizerConfig, averaged, make_optimizer
from insula.train.step import TrainState, make_train_state, make_train_step, served_params
from insula.worlds.seeds import PRETRAINING

POINTING = ("scene", "view", "block", "bowl")  # kinds whose answers are places in an image


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Train the small backbone on questions about rendered scenes, without robot actions."""

    out: Path
    """Folder for backbone.safetensors and backbone.json."""
    model: ModelConfig = TINY_BFLOAT16
    scenes: int = 60_000
    held_out_scenes: int = HELD_OUT_SCENES
    questions_each: int = 16
    grounding_steps: int = 2500
    grounding_lr: float = 4e-3
    pointing_steps: int = 2000
    steps: int = 9000
    """All updates on questions, those of pointing among them."""
    batch_size: int = 64
    seed: int = 0
    checkpoint_every: int = 1000
    optimizer: OptimizerConfig = DEFAULT

    def __post_init__(self) -> None:
        counts = ("scenes", "held_out_scenes", "questions_each", "steps", "batch_size", "checkpoint_every")
        for name in counts:
            check_integer(name, getattr(self, name), 1)
        for name in ("grounding_steps", "pointing_steps"):
            check_integer(name, getattr(self, name), 0)  # 0 leaves a stage out, to see what it is good for
        check_number("grounding_lr", self.grounding_lr, "≥ 0", lambda rate: rate >= 0)
        check_seed("seed", self.seed)


def run_pretrain(config: PretrainConfig) -> None:
    """Pretrain, and say what the backbone knows. Raises as `pretrain`."""
    check_output_folder(config.out, "out")
    known = pretrain(config, question_tokenizer(config.model))
    print(
        f"held-out accuracy {known.mean:.1%} over {len(known.accuracy)} kinds, "
        f"locations {known.location_error:.2f} bins of 128 off: {config.out}"
    )


def pretrain(config: PretrainConfig, tokenizer: FASTTokenizer) -> Knowledge:
    """Train vision and backbone, measure on held-out scenes, write the weights.

    Raises KeyboardInterrupt where it was interrupted: it writes weights only when complete. NonFiniteError and
    CheckpointError as in training. InputError where the folder holds a pretraining with other settings.
    """
    model, started = config.model, time.time()
    size = model.vision.image_size

    # All are kept in memory: 1.5 GB for 60,000 with two cameras of 64 px. Held out are the first seeds, which stay the
    # same however many scenes are trained on, and which `insula questions` leaves out.
    seeds = PRETRAINING.take(config.held_out_scenes + config.scenes)
    held_out = render_scenes(seeds[: config.held_out_scenes], config.questions_each, size)
    scenes = render_scenes(seeds[config.held_out_scenes :], config.questions_each, size)

    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    optimizer = make_optimizer(config.optimizer, model, config.steps)
    step = make_train_step(model, optimizer, config.optimizer.ema_decay, step_key, share=language_share)

    def look(state: TrainState) -> MetricRow:
        known = measure_knowledge(served_params(state), model, tokenizer, held_out)
        return {f"held_out/{k}": v for k, v in known.accuracy.items()} | {
            "held_out/location_error": known.location_error
        }

    with (
        CheckpointStore(config.out / CHECKPOINTS_FOLDER, keep=1) as store,
        contextlib.closing(MetricsLog(config.out / METRICS_FILE)) as log,
    ):
        # Grounding takes a few minutes and has no checkpoint of its own: interrupted, it begins again.
        params = start_locations(init_params(model, init_key), tokenizer.text)
        if store.latest() is None:
            write_json(config.out / PRETRAIN_FILE, _settings(config))
            params = ground(params, config, tokenizer.text, scenes, log)

        state = make_train_state(params, optimizer, averaged(config.optimizer, model))
        if store.latest() is not None:
            _refuse_other_settings(config)
            state = store.restore("train_state", state)

        def save_state(state: TrainState) -> None:
            # No assets: nobody serves these.
            store.save(int(state.step), state, served_params, lambda folder: None)

        hooks = (Every(config.checkpoint_every, look), Every(config.checkpoint_every, save_state, kept=True))
        batches = _batches(scenes, tokenizer, config, int(state.step))
        state, complete = run_loop(state, step, batches, config.steps, log, hooks=hooks)
        save_state(state)

    if not complete:
        raise KeyboardInterrupt("pretraining was interrupted; the same command goes on where it stopped")

    known = measure_knowledge(served_params(state), model, tokenizer, held_out)
    save_backbone(config, served_params(state), known, time.time() - started)
    return known


def _settings(config: PretrainConfig) -> dict[str, Any]:
    """All that decides what is learned, as JSON holds it."""
    settings = dataclasses.asdict(config)
    del settings["out"], settings["checkpoint_every"]
    return json.loads(json.dumps(settings))


def _refuse_other_settings(config: PretrainConfig) -> None:
    """Raises InputError where the checkpoint in the folder was begun with others: half of each would be neither."""
    stored = read_json(config.out / PRETRAIN_FILE)
    settings = _settings(config)
    if changed := [name for name in settings if stored.get(name) != settings[name]]:
        raise InputError(
            f"{config.out} was begun with other settings ({', '.join(changed)} differ, see {PRETRAIN_FILE}); give the "
            "same again to go on, or choose a new folder"
        )


def question_tokenizer(model: ModelConfig) -> FASTTokenizer:
    """The embedded text tokenizer with the model's limits. Questions have no FAST tokens: the codec is a stand-in."""
    text = embedded()
    stand_in = np.zeros((1, model.horizon, model.action_dim))
    codec = FASTCodec.fit(stand_in, vocab_size=model.vocab_size - text.vocab_size)
    return FASTTokenizer(text, codec, max_token_len=model.max_token_len, max_prompt_len=model.max_prompt_len)


def start_locations(params: Params, text: TextTokenizer) -> Params:
    """Location tokens start along a smooth curve, so that neighboring places are alike from the beginning.

    Measured (docs/log.md): after 500 updates locations are 18.8 bins off, 22 with random ones.
    """
    embedding = params.backbone.embedding
    first, last = text.encode("<loc0000>")[0], text.encode("<loc0127>")[0]
    x = np.arange(last - first + 1) / (last - first + 1)

    # From a quarter turn over the whole range, which tells near from far, to eight turns, which tell neighbors apart.
    # Divided so that each row has the length of a random one, about.
    angle = np.pi * x[:, None] * np.geomspace(0.5, 16, embedding.shape[1] // 2)
    curve = np.concatenate([np.sin(angle), np.cos(angle)], axis=1) / np.sqrt(embedding.shape[1])
    embedding = embedding.at[first : last + 1].set(curve)
    return dataclasses.replace(params, backbone=dataclasses.replace(params.backbone, embedding=embedding))


def ground(params: Params, config: PretrainConfig, text: TextTokenizer, scenes: Scenes, log: MetricsLog) -> Params:
    """`grounding_steps` updates of vision and word embeddings on `grounding_loss`. Raises NonFiniteError."""
    words = name_tokens(text)

    # Measured (docs/log.md): 5e-3 is ahead of 2e-3 at equal updates. At least 200 steps, as the warm-up takes 100.
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.grounding_lr, 100, max(config.grounding_steps, 200), 0.1 * config.grounding_lr
    )
    optimizer = optax.adamw(schedule, weight_decay=1e-4)
    # The layers between are not trained: they have seen no sentence, and the words' embeddings are all that is needed.
    trained = (params.vision, params.backbone.embedding, Head.start(config.model.backbone.width))

    @jax.jit
    def update(trained: tuple, state: optax.OptState, images: dict, places: dict) -> tuple:
        def loss(trained: tuple) -> tuple[Float[Array, ""], dict[str, Array]]:
            vision, embedding, head = trained
            backbone = dataclasses.replace(params.backbone, embedding=embedding)
            return grounding_loss(vision, backbone, head, config.model, jnp.asarray(words), images, places)

        gradients, metrics = jax.grad(loss, has_aux=True)(trained)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, metrics

    rng = np.random.default_rng(config.seed)
    state = optimizer.init(trained)
    for step in range(1, config.grounding_steps + 1):
        index = rng.integers(len(scenes.questions), size=config.batch_size)
        pick = [{name: part[name][index] for name in config.model.cameras} for part in (scenes.images, scenes.places)]
        trained, state, metrics = update(trained, state, *pick)
        if step % 100 == 0:
            log.write(step, {f"grounding/{name}": float(value) for name, value in metrics.items()})

    vision, embedding, _ = trained  # the head has done its work
    return Params(vision, dataclasses.replace(params.backbone, embedding=embedding), params.expert)


def _batches(scenes: Scenes, tokenizer: FASTTokenizer, config: PretrainConfig, start: int) -> Iterator[Batch]:
    """Pointing first, then everything; each batch depends on its number alone."""
    tokens = tokenize(scenes, tokenizer)
    kinds = np.array([[kind for kind, _, _ in asked] for asked in scenes.questions])
    pointing = np.argwhere(np.isin(kinds, POINTING))
    everything = np.argwhere(kinds != "")
    assert set(POINTING) <= KIND_WEIGHTS.keys() and len(pointing)

    for step in range(start, config.steps):
        pool = pointing if step < config.pointing_steps else everything
        rng = np.random.default_rng((config.seed, step))  # no generator to carry over when a pretraining goes on
        index, which = pool[rng.integers(len(pool), size=config.batch_size)].T
        yield question_batch(scenes, tokens, index, which, config.model)


def save_backbone(config: PretrainConfig, params: Params, known: Knowledge, seconds: float) -> None:
    """bfloat16 weights of vision and backbone, and a record of what made them."""
    record = {
        "command": f"insula pretrain --steps {config.steps} --scenes {config.scenes} --seed {config.seed}",
        "config": dataclasses.asdict(dataclasses.replace(config, out=Path(config.out.name))),  # not where it was made
        "seeds": [PRETRAINING.start, PRETRAINING.start + config.held_out_scenes + config.scenes],
        "seconds": round(seconds),
        "held_out": {"questions": known.answered, "accuracy": known.accuracy, "location_error": known.location_error},
    }
    # Half the size, since this file travels in the package; training goes on from it in float32.
    write_safetensors(config.out / "backbone.safetensors", BACKBONE, config.model, from_params(params), "bfloat16")
    (config.out / "backbone.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
