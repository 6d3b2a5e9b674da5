"""One cell of a study: trained, then measured. Everything is in its folder, and what is there is not done again.

CELL/before/        the run that a second stage starts from
CELL/run/           the training (insula.runs)
CELL/loops/         a file for each look and task: an evaluation that was interrupted goes on after the last one
CELL/result.json    the last: a cell that has it is finished
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from insula.certificate.stored import stored_certificate
from insula.checkpoints.store import CheckpointStore
from insula.collect.scenes import render_scenes
from insula.convert import convert_checkpoint
from insula.data.questions import QuestionSamples
from insula.evaluate.closed_loop import REPLAN_STEPS, evaluate
from insula.evaluate.command import HOLD, MOVES
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.evaluate.episodes import Acts
from insula.evaluate.knowledge import measure_knowledge
from insula.files import read_json, write_json
from insula.policy import Policy
from insula.policy.modes import TokenPolicy
from insula.recipes import BOTH, find_recipe
from insula.report import machine, read_metrics
from insula.runs.assets import Assets
from insula.runs.folder import CERTIFICATE_FILE, CHECKPOINTS_FOLDER, METRICS_FILE
from insula.runs.loading import load_model
from insula.study.design import Cell, Study
from insula.study.episodes import in_rows
from insula.study.open_loop import measure_actions, measure_answers
from insula.train.config import TrainConfig, apply_recipe, to_dict
from insula.train.data import held_out_sources, open_data, sizes
from insula.train.resume import newest_step, stored_settings
from insula.train.run import start_params, train
from insula.worlds.seeds import PRETRAINING

RESULT_FILE = "result.json"
RUN_FOLDER, FIRST_FOLDER, WEIGHTS_FOLDER, LOOPS_FOLDER = "run", "before", "weights", "loops"
Tell = Callable[[str], None]


def cell_config(study: Study, cell: Cell, folder: Path) -> TrainConfig:
    """How a cell is trained. Of two stages: how the second one is, with half of the updates."""
    recipe = find_recipe(cell.recipe)
    start = study.settings(folder / RUN_FOLDER)
    if recipe.starts_from is not None:
        start = dataclasses.replace(start, init=folder / WEIGHTS_FOLDER, from_scratch=False)
    elif study.init is not None and not recipe.from_scratch:
        start = dataclasses.replace(start, init=study.init, fresh=study.fresh, from_scratch=False)

    steps = study.steps or start.steps
    updates = steps if recipe.starts_from is None else steps - steps // 2
    every = -(-updates // study.looks)
    return dataclasses.replace(
        apply_recipe(start, cell.recipe),
        data=study.data,
        episodes=cell.episodes,
        seed=cell.seed,
        steps=updates,
        batch_size=study.batch_size or start.batch_size,
        evaluate_every=every,
        checkpoint_every=every,
        keep_every=every,  # each is looked at, however many an interruption writes between
    )


def first_stage(study: Study, cell: Cell, folder: Path) -> TrainConfig | None:
    """How the run is trained that a cell starts from; None where there is none."""
    recipe = find_recipe(cell.recipe)
    if recipe.starts_from is None:
        return None

    before = dataclasses.replace(cell, recipe=recipe.starts_from)
    config = cell_config(study, before, folder)
    steps = config.steps // 2
    return dataclasses.replace(config, run=folder / FIRST_FOLDER, steps=steps, checkpoint_every=steps, keep=1)


def run_cell(study: Study, cell: Cell, folder: Path, tell: Tell = print) -> dict[str, Any]:
    """Train and measure a cell, or go on where it was left; the result is written last. Raises KeyboardInterrupt where
    training was interrupted, else as `train` and `evaluate`."""
    if (finished := stored_result(folder)) is not None:
        return finished

    folder.mkdir(parents=True, exist_ok=True)
    config, first = cell_config(study, cell, folder), first_stage(study, cell, folder)
    if first is not None:
        _train(first, cell, tell)
        if not (folder / WEIGHTS_FOLDER).is_dir():
            # Beside it first: half of a conversion must not be taken for all of it.
            unfinished = folder / f"{WEIGHTS_FOLDER}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            convert_checkpoint(first.run, unfinished, "insula")
            unfinished.rename(folder / WEIGHTS_FOLDER)
    _train(config, cell, tell)

    result = {
        "cell": dataclasses.asdict(cell) | {"name": cell.name},
        "insula": version("insula"),
        "machine": machine(),
        "settings": to_dict(config),
        "data": _digests(config),
        "training": _training(config, first),
        "held_out": _held_out(config),
        "gradients": _gradients(config, looks(config)),
    }
    result |= _measure(study, cell, config, first)
    result["closed_loop"] = _closed_loops(study, cell, config, folder / LOOPS_FOLDER, tell)

    write_json(folder / RESULT_FILE, result)
    return result


def _train(config: TrainConfig, cell: Cell, tell: Tell) -> None:
    tell(f"{cell.name}: training {config.recipe}, {config.steps} updates")
    if newest_step(config.run) is not None:
        # What it started from is in its checkpoint by now, wherever that lay then.
        config = dataclasses.replace(config, resume=True, init=stored_settings(config.run).init)
    if not train(config, quiet=True):
        raise KeyboardInterrupt("training was interrupted; the same command goes on where it stopped")


def acting(policy: Policy, recipe: str) -> Acts:
    """The policy as its recipe has it act."""
    return policy if find_recipe(recipe).acts_by == "flow" else TokenPolicy(policy)


def _closed_loops(study: Study, cell: Cell, config: TrainConfig, folder: Path, tell: Tell) -> dict[str, Any]:
    """By step, then by task: the episodes, as `in_rows` has them. Before the end fewer scenes, and only their own
    words."""
    folder.mkdir(exist_ok=True)
    found: dict[str, Any] = {}
    for step in looks(config):
        last, policy = step == config.steps, None
        for task in study.tasks:
            path = folder / f"{step}-{task}.json"
            if not path.is_file():
                policy = policy or Policy.load(config.run, step, cell.seed, study.robot)
                robot = DelayedPolicy(acting(policy, cell.recipe), Delay(), REPLAN_STEPS, HOLD, MOVES)
                scenes = study.scenes if last else min(study.scenes, study.look_scenes)
                done = evaluate(
                    robot, scenes, task=task, swap=last, held_out=last and study.held_out, record=0, used_seeds=()
                )
                failed = {"failed_decodes": sum(robot.failures.values())}
                write_json(path, done.to_json() | failed)
                tell(f"{cell.name}: {task} after {step} updates: {done.success}")
            stored = read_json(path, "episodes", "failed_decodes", "latency_ms")
            kept = {key: stored[key] for key in ("failed_decodes", "latency_ms", "seconds")}
            found.setdefault(str(step), {})[task] = kept | in_rows(stored["episodes"])

    return found


def looks(config: TrainConfig) -> list[int]:
    """The steps after which a policy is looked at: evenly over its training, the last one always."""
    return [*range(config.checkpoint_every, config.steps, config.checkpoint_every), config.steps]


def _measure(study: Study, cell: Cell, config: TrainConfig, first: TrainConfig | None) -> dict[str, Any]:
    """What needs no robot to act: recorded actions, and what the backbone knew before any training and knows now."""
    params, assets = load_model(config.run)
    model = assets.config
    # As the run was: its data, its split.
    unseen = held_out_sources(config, assets, open_data(dataclasses.replace(config, resume=True)))
    found: dict[str, Any] = {
        "open_loop": measure_actions(params, assets, unseen, lambda one: acting(one, cell.recipe), cell.seed)
    }

    start, rng = first or config, jax.random.split(jax.random.key(cell.seed), 3)[0]  # as the run had it
    stages = {"before": start_params(start, rng), "after": params}
    questions = _questions(config, assets)
    found["answers"] = {stage: measure_answers(params, model, questions) for stage, params in stages.items()}
    if study.tasks:
        # The first seeds of the range: neither pretraining nor the questions of a mixture have them.
        scenes = render_scenes(PRETRAINING.take(study.knowledge_scenes), 8, model.vision.image_size)
        known = {stage: measure_knowledge(params, model, assets.tokenizer, scenes) for stage, params in stages.items()}
        found["knowledge"] = {stage: dataclasses.asdict(one) for stage, one in known.items()}

    return found


def _questions(config: TrainConfig, assets: Assets) -> dict[str, QuestionSamples]:
    """The held-out questions of the mapping, also where the recipe learns from none."""
    data = open_data(dataclasses.replace(config, recipe=None, questions=True, losses=BOTH))
    return {
        name: QuestionSamples(questions, assets.tokenizer, sizes(config.model, data), data.parts[name].held_out)
        for name, questions in data.mapping.questions.items()
        if len(data.parts[name].held_out)
    }


def _training(config: TrainConfig, first: TrainConfig | None) -> dict[str, Any]:
    """How long the updates took, and what became of the losses."""
    seconds = {name: _seconds(stage) for name, stage in (("first", first), ("run", config)) if stage is not None}
    return {"updates": config.steps + (first.steps if first else 0), "seconds": sum(seconds.values())}


def _digests(config: TrainConfig) -> dict[str, str]:
    """By source, a SHA-256 of what is in it: cells of one study are to be of the same data."""
    units = open_data(dataclasses.replace(config, resume=True)).units
    return {name: hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest() for name, rows in units.items()}


def _seconds(config: TrainConfig) -> float:
    # A resumed run may have written some steps twice: the last line of each counts.
    rows = {row["step"]: row for row in read_metrics(config.run / METRICS_FILE) if "step_seconds" in row}
    steps = sorted(rows)
    spans = np.diff([0, *steps])
    return float(sum(rows[step]["step_seconds"] * span for step, span in zip(steps, spans, strict=True)))


def _held_out(config: TrainConfig) -> list[dict[str, Any]]:
    """Losses on what was never trained on, look by look."""
    rows = {
        row["step"]: row for row in read_metrics(config.run / METRICS_FILE) if any("held_out" in key for key in row)
    }
    return [rows[step] for step in sorted(rows)]


def _gradients(config: TrainConfig, steps: list[int]) -> list[dict[str, Any]]:
    """Norms of both losses' gradients on each part, not insulated, and the cosine between them, at each look."""
    found = []
    with CheckpointStore(config.run / CHECKPOINTS_FOLDER) as store:
        for step in steps:
            written = stored_certificate(store.assets(step) / CERTIFICATE_FILE)
            found.append({"step": step, **{key: written[key] for key in ("outcome", "table", "cosine")}})
    return found


def stored_result(folder: Path) -> dict[str, Any] | None:
    """What a finished cell found; None where it is not finished."""
    path = folder / RESULT_FILE
    return read_json(path, "cell", "closed_loop") if path.is_file() else None
