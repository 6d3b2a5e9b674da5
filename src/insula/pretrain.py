"""Give the small backbone some knowledge to insulate: questions about rendered scenes, no robot actions.

Scenes come from seeds that no demonstration and no evaluation uses.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from insula.batch import Batch
from insula.checkpoints import weights
from insula.evaluate.knowledge import Knowledge, measure_knowledge
from insula.losses import language_loss
from insula.model import Params, init_params
from insula.model.config import TINY, Config
from insula.scenes import Scenes, question_batch, render_scenes, tokenise
from insula.sim.seeds import PRETRAINING
from insula.tokens.sequence import FASTTokenizer
from insula.train.loop import Every, MetricsLog, fit
from insula.train.optimiser import OptimiserConfig, make_optimiser
from insula.train.step import TrainState, make_train_step, start_state


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """`insula pretrain`. Writes `backbone.safetensors` and `backbone.json` to `out`."""

    out: Path
    model: Config = TINY
    scenes: int = 60_000
    held_out_scenes: int = 1_000
    questions_each: int = 8
    steps: int = 12_000
    batch_size: int = 64
    seed: int = 0
    optimiser: OptimiserConfig = OptimiserConfig(vision_rate=1e-3, backbone_rate=1e-3)


def pretrain(config: PretrainConfig, tokenizer: FASTTokenizer) -> Knowledge:
    """Train vision and backbone on questions, measure on held-out scenes, write the weights."""
    model, started = config.model, time.time()
    size = model.vision.image_size
    seeds = PRETRAINING.take(config.held_out_scenes + config.scenes)
    held_out = render_scenes(seeds[: config.held_out_scenes], config.questions_each, size)
    scenes = render_scenes(seeds[config.held_out_scenes :], config.questions_each, size)

    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    optimiser = make_optimiser(config.optimiser, config.steps, freeze_backbone=False)
    state = start_state(init_params(model, init_key), optimiser)
    step = make_train_step(model, optimiser, config.optimiser.ema_decay, step_key, loss=language_loss)

    def look(state: TrainState) -> dict[str, float]:
        known = measure_knowledge(state.average, model, tokenizer, held_out)
        return {f"held_out/{k}": v for k, v in known.accuracy.items()} | {"held_out/location_error": known.location_error}

    log = MetricsLog(config.out / "metrics.jsonl")
    batches = _batches(scenes, tokenizer, config)
    state, complete = fit(state, step, batches, config.steps, log, hooks=(Every(1000, look),))
    log.close()
    if not complete:
        raise KeyboardInterrupt("pretraining was interrupted; it writes weights only when complete")
    known = measure_knowledge(state.average, model, tokenizer, held_out)
    save(config, state.average, known, time.time() - started)
    return known


def _batches(scenes: Scenes, tokenizer: FASTTokenizer, config: PretrainConfig) -> Iterator[Batch]:
    tokens = tokenise(scenes, tokenizer)
    rng = np.random.default_rng(config.seed)
    while True:
        index = rng.integers(len(scenes.questions), size=config.batch_size)
        which = rng.integers(config.questions_each, size=config.batch_size)
        yield question_batch(scenes, tokens, index, which, config.model)


def save(config: PretrainConfig, params: Params, known: Knowledge, seconds: float) -> None:
    """bfloat16 weights of vision and backbone, and a record of what made them."""
    record = {
        "command": f"insula pretrain --steps {config.steps} --scenes {config.scenes} --seed {config.seed}",
        "config": dataclasses.asdict(config.model),
        "seeds": [PRETRAINING.start, PRETRAINING.start + config.held_out_scenes + config.scenes],
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seconds": round(seconds),
        "held_out": {"questions": known.answered, "accuracy": known.accuracy, "location_error": known.location_error},
    }
    weights.save(config.out / "backbone.safetensors", {"vision": params.vision, "backbone": params.backbone})
    (config.out / "backbone.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
