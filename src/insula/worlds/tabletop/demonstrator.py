"""A scripted expert and its demonstrations. It reads the truth, and its action depends on the present state alone:
whatever noise did before, the label is right for the state at hand, so a policy can clone it from one observation.

        hover ──► above the block, down the funnel ──► close ──► lift ──► above the bowl ──► lower, open ──► retreat

DART (Laskey et al. 2017, arXiv:1703.09327): execute the noisy action, record the clean one. Noise leads into states
that a clean expert never visits, and the clean label there says how to get back. A noisy label would teach the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.worlds.tabletop.environment import MAX_STEP
from insula.worlds.tabletop.facts import Block, Bowl, Table
from insula.worlds.tabletop.scene import BLOCK_HALF, BOWL_RADIUS

GRASP, HOVER, CARRY, DROP = 0.021, 0.095, 0.105, 0.055  # heights of the fingertips, meters
OPEN, CLOSE = -1.0, 1.0  # the action's last value; the environment asks only for its sign


def act(table: Table, task: tuple[str, str]) -> np.ndarray:
    """The clean action float32 [7] in [-1, 1] for this state and this task (block color, bowl color)."""
    block, bowl = table.block(task[0]), table.bowl(task[1])
    if table.held == block.color:
        return _carry(table, bowl.position)

    # Done, or about to be: rise with open fingers. Without `_falling` it would chase the block it has let go of.
    if table.held is None and (table.container(block.color) == bowl.color or _falling(table, block, bowl)):
        return _action(table, np.array([*table.gripper[:2], HOVER]), OPEN)
    return _fetch(table, block.position)


def _falling(table: Table, block: Block, bowl: Bowl) -> bool:
    """Just let go of, above the bowl."""
    let_go = np.hypot(*(table.gripper - block.position)[:2]) < 0.03 and block.position[2] > 1.5 * BLOCK_HALF
    return bool(let_go and np.hypot(*(block.position - bowl.position)[:2]) < 0.5 * BOWL_RADIUS)


def _ramp(value: float, start: float, stop: float) -> float:
    """0 before `start`, 1 after `stop`, linear between."""
    return float(np.clip((value - start) / (stop - start), 0.0, 1.0))


def _fetch(table: Table, block: np.ndarray) -> np.ndarray:
    """Come down a funnel over the block and close. Low and beside it: rise first, so as not to push it away.

    The wrist never turns: the open fingers are wide enough for any yaw, and closing them squares the block up. Turning
    it to the block succeeded as often, but added two noisy dimensions to state and action (docs/log.md).
    """
    offset = block - table.gripper
    distance, height = float(np.hypot(*offset[:2])), table.gripper[2]
    grasp = max(GRASP, block[2])  # a block in a bowl, or on another, is higher

    # Open fingers (90 mm) leave 16 mm beside a block at 45° (57 mm): nearer than that, it is between them.
    if distance < 0.016 and abs(height - grasp) < 0.014 and table.held is None:
        return _action(table, np.array([*block[:2], grasp]), CLOSE)

    # Linear ramps instead of stages: there is no stage to remember, and noise at an edge does not flip the action.
    ready = table.opening > 0.75 and table.held is None
    funnel = _ramp(distance, 0.01, 0.035) if ready else 1.0
    goal = np.array([*block[:2], grasp + funnel * (HOVER - grasp)])
    freedom = max(_ramp(height, 0.05, 0.075), 1.0 - _ramp(distance, 0.02, 0.03))  # high enough, or over it already
    goal[:2] = table.gripper[:2] + freedom * offset[:2]
    return _action(table, goal, OPEN)


def _carry(table: Table, bowl: np.ndarray) -> np.ndarray:
    """Lift, cross, lower and let go. Sideways only as high as the block's bottom clears the other blocks."""
    offset = bowl - table.gripper
    distance, height = float(np.hypot(*offset[:2])), table.gripper[2]
    if distance < 0.02 and height < DROP + 0.012:
        return _action(table, np.array([*bowl[:2], DROP]), OPEN)

    over = 1.0 - _ramp(distance, 0.012, 0.045)
    goal = np.array([*bowl[:2], CARRY + over * (DROP - CARRY)])
    freedom = max(_ramp(height, 0.045, 0.08), over)
    goal[:2] = table.gripper[:2] + freedom * offset[:2]
    return _action(table, goal, CLOSE)


def _action(table: Table, goal: np.ndarray, grip: float) -> np.ndarray:
    """Proportional, clipped as a vector in the plane so that the path stays straight; the wrist does not turn."""
    move = (goal - table.gripper) / MAX_STEP
    move[:2] /= max(1.0, float(np.abs(move[:2]).max()))
    return np.clip(np.array([*move, 0.0, 0.0, 0.0, grip]), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Demonstration:
    """`observations` [T], clean `labels` float32 [T, 7], `executed` float32 [T, 7], and how it ended."""

    observations: list[dict[str, Any]]
    labels: np.ndarray
    executed: np.ndarray
    success: bool
    wrong_object: bool
    task: str


def disturb(action: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """DART: Gaussian noise of deviation `noise` on the moves, in action units; turn and gripper are left alone."""
    noisy = action.copy()
    noisy[:3] += rng.normal(0.0, noise, 3).astype(np.float32)  # a gripper opened by chance would drop the block
    return np.clip(noisy, -1, 1)


def rollout(
    env: Any, rng: np.random.Generator, noise: float = 0.3, seed: int | None = None, options: dict | None = None
) -> Demonstration:
    """One episode of the expert in a (wrapped) tabletop, `noise` as in `disturb`. Observation t precedes label t;
    failures are returned too."""
    observation, info = env.reset(seed=seed, options=options)
    truth = env.unwrapped  # the expert sees poses, not images; wrappers hide them
    observations, labels, executed = [], [], []

    done = False
    while not done:
        label = act(truth.table(), truth.task)
        command = disturb(label, rng, noise) if noise else label
        observations.append(observation)
        labels.append(label)
        executed.append(command)
        observation, _, terminated, truncated, info = env.step(command)
        done = terminated or truncated

    task = observations[0]["task"]
    return Demonstration(
        observations, np.stack(labels), np.stack(executed), info["success"], info["wrong_object"], task
    )
