"""What is known of recorded episodes beside their pictures: which subtask was acted on, where the robot held, where the
expert looked. Worked out when an evaluation is over, from the plans it kept: it takes no longer for that, and comes to
the same numbers.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from insula import flow
from insula.batch import Observation
from insula.decode.flow import read_prefix
from insula.decode.look import expert_look
from insula.evaluate.closed_loop import NUM_ENVS
from insula.evaluate.episodes import Acts, Look, Planned, Recording
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.policy import Policy, Seed, draw_noise, noise_key
from insula.policy.modes import SubtaskPolicy
from insula.shapes import AnyArray, Array, Float, Shaped

LOOK_TIME = 0.5
"""The flow time at which the expert is watched: half of its chunk is still noise."""


def explain(policy: Acts, recordings: Iterable[Recording]) -> tuple[Recording, ...]:
    """With the subtask and the look of every plan, where `policy`, which made them, is one that has them: FAST tokens
    are said without the expert, and the weights behind a server are not at hand."""
    match policy:
        case SubtaskPolicy():
            return _with_looks(policy.policy, [_with_subtasks(policy, one) for one in recordings])
        case Policy():
            return _with_looks(policy, list(recordings))

    return tuple(recordings)


def _with_subtasks(policy: SubtaskPolicy, recording: Recording) -> Recording:
    """What was said of each plan; nothing of those that were told."""
    name = recording.episode.job.name
    plans = (
        plan if "subtask" in plan.observation else dataclasses.replace(plan, said=policy.current(name, plan.step))
        for plan in recording.plans
    )
    return dataclasses.replace(recording, plans=tuple(plans))


def _with_looks(policy: Policy, recordings: Sequence[Recording]) -> tuple[Recording, ...]:
    # All plans of all episodes in one list: batches are full, and the last one alone is filled up.
    acted = {
        (*recording.episode.job.name, plan.step): _acted_on(plan)
        for recording in recordings
        for plan in recording.plans
        if plan.said is None or plan.said.ended  # else there was no chunk, and nothing to look for
    }
    looks = dict(zip(acted, look_at(policy, list(acted.values()), list(acted)), strict=True))

    def seeing(recording: Recording) -> Recording:
        name = recording.episode.job.name
        plans = (dataclasses.replace(plan, look=looks.get((*name, plan.step))) for plan in recording.plans)
        return dataclasses.replace(recording, plans=tuple(plans))

    return tuple(seeing(recording) for recording in recordings)


def _acted_on(plan: Planned) -> dict[str, Any]:
    return plan.observation if plan.said is None else plan.observation | {"subtask": plan.said.text}


def look_at(policy: Policy, observations: Sequence[dict[str, Any]], seeds: Sequence[Seed]) -> list[Look]:
    """Where the expert looks while it makes the chunk of each observation with the noise of its seed: its attention at
    LOOK_TIME, the mean over layers, heads and action tokens. What was left of a last chunk (real-time chunking) is left
    out. Raises InputError as `Policy.act_batch`."""
    config, robot = policy.config, policy.robot
    looks: list[Look] = []

    for start in range(0, len(observations), NUM_ENVS):
        # The batch size of the evaluation, whose program is compiled; the last observation fills it up.
        rows = np.minimum(np.arange(start, start + NUM_ENVS), len(observations) - 1)
        inputs = policy.read([observations[row] for row in rows])
        named = [seeds[row] for row in rows]

        # Steps and dimensions that this robot lacks end at 0, as `sample_actions` has them.
        chunk = robot.normalize_actions(policy.sample(inputs, named), inputs.state).astype(np.float32)
        lacking = ((0, 0), (0, config.horizon - robot.horizon), (0, config.action_dim - robot.action_dim))
        keys = np.stack([noise_key(policy.seed, *seed) for seed in named])
        found = np.asarray(_watch(policy.params, config, inputs.observation, keys, np.pad(chunk, lacking)))

        by_camera = dict(zip(config.cameras, np.moveaxis(found, 1, 0), strict=True))
        looks += [{camera: by_camera[camera][row] for camera in robot.cameras} for row in range(NUM_ENVS)]

    return looks[: len(observations)]


@partial(jax.jit, static_argnames="config")  # here, so that the tasks of an evaluation share a compiled program
def _watch(
    params: Params,
    config: ModelConfig,
    observation: Observation,
    keys: Shaped[AnyArray, "B 2"],
    chunk: Float[AnyArray, "B H D"],
) -> Float[Array, "B C rows columns"]:
    """The patches' share of the expert's attention on its way to these chunks."""
    time = jnp.full((len(keys), 1), LOOK_TIME)
    noisy = flow.add_noise(chunk[:, None], draw_noise(keys, config)[:, None], time)
    memory = read_prefix(params, config, observation)
    weights = expert_look(params.expert, config, memory, observation.state, noisy, time)

    patches = jnp.mean(weights, axis=(1, 2, 3))[:, : config.num_image_tokens]
    return patches.reshape(len(keys), len(config.cameras), config.vision.grid, config.vision.grid)
