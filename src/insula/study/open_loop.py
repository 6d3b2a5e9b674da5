"""What needs no simulator: actions beside those that were recorded, and answers beside the true ones, all held out.

An action's error is |predicted − recorded| in the robot's own units, for each dimension and each step of the chunk.
Frames of an episode are alike, so intervals come from drawing whole episodes again.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from insula.data.mixture import SampleSource
from insula.data.questions import QuestionSamples
from insula.data.samples import Samples
from insula.errors import InsulaError
from insula.evaluate.episodes import Acts
from insula.losses import predict_tokens
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.policy import Policy
from insula.runs.assets import Assets
from insula.shapes import Bool, Float
from insula.study.statistics import ALPHA, DRAWS
from insula.tokens.dialects import Form

MOST = 512
"""Frames, or questions, of a source that are looked at, evenly over all that are held out."""
BATCH = 32
FEWEST = 5
"""Episodes that an interval is drawn from."""


def measure_actions(
    params: Params, assets: Assets, unseen: Mapping[str, SampleSource], make: Callable[[Policy], Acts], seed: int = 0
) -> dict[str, Any]:
    """By robot: the error by dimension and by step, with intervals, and how many chunks could not be decoded. `make`:
    what acts, of a policy."""
    found = {}
    for samples in unseen.values():
        if not isinstance(samples, Samples) or samples.form is Form.SUBTASK:
            continue
        name = next(name for name, robot in assets.robots.items() if robot is samples.robot)
        policy = Policy(params, assets, seed, robot=name)
        if name not in found:  # of two forms the first: the plain one, where it was trained
            found[name] = _errors_of(samples, policy, make(policy))

    return found


def _errors_of(samples: Samples, policy: Policy, actor: Acts) -> dict[str, Any]:
    rows = _evenly(len(samples))
    parts = []
    for start in range(0, len(rows), BATCH):
        # Whole batches: each size would be compiled. The last one wraps, and its own rows are kept.
        batch = np.resize(rows[start:], BATCH)
        parts.append(_errors(samples, policy, actor, batch, min(BATCH, len(rows) - start)))

    errors, real, failed = (np.concatenate(part) for part in zip(*parts, strict=True))
    episode = np.array([samples.dataset.episodes.locate(int(samples.frames.index[row]))[0] for row in rows])
    scored = real & ~failed[:, None]
    if not scored.any():
        return {"frames": len(rows), "failed": int(failed.sum())}

    return {
        "frames": len(rows),
        "recordings": len(np.unique(episode)),
        "failed": int(failed.sum()),
        "by_dimension": clustered(errors, scored, episode, axis=1),
        "by_step": clustered(errors, scored, episode, axis=2),
    }


def _errors(
    samples: Samples, policy: Policy, actor: Acts, rows: np.ndarray, own: int
) -> tuple[Float[np.ndarray, "n H D"], Bool[np.ndarray, "n H"], Bool[np.ndarray, "n"]]:
    """|predicted − recorded| of the first `own` of `rows`, which steps were recorded, and which chunks failed."""
    index = samples.frames.index[rows]
    images = {camera: samples.dataset.images(column, index) for camera, column in samples.data.cameras.items()}
    state = samples.frames.state[index]
    observations = [
        {
            "images": {camera: pictures[i] for camera, pictures in images.items()},
            "state": state[i],
            "task": samples.instructions[row],
            **({"subtask": samples.subtasks[row]} if samples.form is Form.ACTIONS else {}),
        }
        for i, row in enumerate(rows.tolist())
    ]
    chunks = actor.act_batch(observations, [(int(row),) for row in rows])
    normalized, is_pad = samples.chunks(rows)
    recorded = policy.robot.unnormalize_actions(normalized, state)

    failed = np.array([isinstance(chunk, InsulaError) for chunk in chunks])
    predicted = np.stack([true if bad else chunk for chunk, true, bad in zip(chunks, recorded, failed, strict=True)])
    return np.abs(predicted - recorded)[:own], ~is_pad[:own], failed[:own]


def clustered(errors: np.ndarray, scored: np.ndarray, episode: np.ndarray, axis: int, seed: int = 0) -> dict[str, Any]:
    """Means of `errors` [n, H, D] over what is `scored` [n, H] and over `axis` (1: steps, 2: dimensions), with
    intervals from drawing episodes again: lists "mean", "low", "high". None where nothing is scored; intervals also
    where fewer than `FEWEST` episodes are: drawn again they would be the same few."""
    names, which = np.unique(episode, return_inverse=True)
    weight = np.broadcast_to(scored[..., None], errors.shape).astype(float)

    def by_episode(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(names), values.shape[1]))
        np.add.at(sums, which, values)
        return sums

    total, count = by_episode((errors * weight).sum(axis)), by_episode(weight.sum(axis))
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
    found: dict[str, list[float | None]] = {"mean": [], "low": [], "high": []}
    for column in range(total.shape[1]):
        scored_of = count[:, column]
        some = scored_of.sum() > 0
        found["mean"].append(float(total[:, column].sum() / scored_of.sum()) if some else None)

        low = high = None
        if np.count_nonzero(scored_of) >= FEWEST:
            drawn_of = drawn @ scored_of
            kept = drawn_of > 0  # a draw may hold no episode that is long enough for the last steps
            low, high = np.quantile((drawn @ total[:, column])[kept] / drawn_of[kept], [ALPHA / 2, 1 - ALPHA / 2])
        found["low"].append(None if low is None else float(low))
        found["high"].append(None if high is None else float(high))
    return found


def measure_answers(params: Params, config: ModelConfig, questions: Mapping[str, QuestionSamples]) -> dict[str, Any]:
    """By source of questions: how many are answered right, each token given the true ones before it, and of how
    many."""
    predict = jax.jit(lambda p, batch: predict_tokens(p, config, batch))
    found = {}
    for name, samples in questions.items():
        rows, right = _evenly(len(samples)), 0
        for start in range(0, len(rows), BATCH):
            own = min(BATCH, len(rows) - start)
            got, targets = jax.device_get(predict(params, samples.batch(np.resize(rows[start:], BATCH))))
            right += int(((got == targets.labels) | ~targets.valid).all(axis=1)[:own].sum())
        found[name] = {"right": right, "of": len(rows)}
    return found


def _evenly(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, MOST)).astype(int))
