"""A scripted expert and its demonstrations. It reads the truth, and its action depends on the present state alone:
whatever noise did before, the label is right for the state at hand, so a policy can clone it from one observation.

        hover ──► above the block, down the funnel ──► close ──► lift ──► above its place ──► lower, open ──► rise
          ▲                                                                                                     │
          └──────────────────────────────── the next block, where the goal has one ─────────────────────────────┘

DART (Laskey et al. 2017, arXiv:1703.09327): execute the noisy action, record the clean one. Noise leads into states
that a clean expert never visits, and the clean label there says how to get back. A noisy label would teach the noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.worlds.tabletop.environment import MAX_STEP
from insula.worlds.tabletop.facts import Block, Table
from insula.worlds.tabletop.goals import Goal, Placement, fulfilled, next_placement, subtask
from insula.worlds.tabletop.scene import BLOCK_HALF, BOWL_RADIUS, FINGER_BELOW

GRASP, HOVER, CARRY, DROP = 0.021, 0.095, 0.105, 0.055  # heights of the fingertips, meters
ABOVE = 0.004  # meters between a block and the one it is put down on, when it is let go of
CLEARANCE = 0.025  # meters between what is carried, or the fingers' ends, and a tower below
OPEN, CLOSE = -1.0, 1.0  # the action's last value; the environment asks only for its sign


def act(table: Table, goal: Goal) -> np.ndarray:
    """The clean action float32 [7] in [-1, 1] for this state and this goal: that of its next placement."""
    placement, hover = next_placement(table, goal), _hover(table, goal)
    if placement is not None and table.held == placement.block:
        return _carry(table, placement) if placement.relation == "in" else _put_down(table, placement)

    # Done, or about to be: rise with open fingers. Without `_falling` it would chase the block it has let go of.
    wanted = table.block((placement or goal.placements[-1]).block)
    done = placement is None or _falling(table, placement) or _at_a_placed_block(table, goal, wanted)
    if table.held is None and done:
        return _action(table, np.array([*table.gripper[:2], hover]), OPEN)
    return _fetch(table, wanted, hover)


def _hover(table: Table, goal: Goal) -> float:
    """Height at which open fingers pass over everything: over the towers of this goal, too."""
    tops = [table.block(one.block).top for one in goal.placements if one.relation == "on" and fulfilled(table, one)]
    return max([HOVER, *(top + FINGER_BELOW + CLEARANCE for top in tops)])


def _at_a_placed_block(table: Table, goal: Goal, wanted: Block) -> bool:
    """Whether the fingers are low about a block that lies where it shall: moving aside, they would take it along. Not
    where the `wanted` one is nearer."""

    def beside(block: Block) -> float:
        return float(np.hypot(*(table.gripper - block.position)[:2]))

    placed = [table.block(one.block) for one in goal.placements if fulfilled(table, one)]
    low = [block for block in placed if table.gripper[2] - FINGER_BELOW < block.top + 0.005]
    return any(beside(block) < min(0.05, beside(wanted)) for block in low)


def _falling(table: Table, placement: Placement) -> bool:
    """Just let go of, above its place."""
    block = table.block(placement.block)
    if np.hypot(*(table.gripper - block.position)[:2]) >= 0.03:
        return False

    if placement.relation == "in":
        bowl = table.bowl(placement.target)
        near = np.hypot(*(block.position - bowl.position)[:2]) < 0.5 * BOWL_RADIUS
        return bool(near and block.position[2] > 1.5 * BLOCK_HALF)

    # In transit a finger may lose touch for a moment, and the block is still between them.
    below = table.block(placement.target)
    if table.opening < 0.7:
        return False
    return bool(np.hypot(*(block.position - below.position)[:2]) < below.half and block.position[2] > below.top)


def _ramp(value: float, start: float, stop: float) -> float:
    """0 before `start`, 1 after `stop`, linear between."""
    return float(np.clip((value - start) / (stop - start), 0.0, 1.0))


def _fetch(table: Table, block: Block, hover: float) -> np.ndarray:
    """Come down a funnel over the block and close. Low and beside it: rise first, so as not to push it away.

    The wrist never turns: the open fingers are wide enough for any yaw, and closing them squares the block up. Turning
    it to the block succeeded as often, but added two noisy dimensions to state and action (docs/log.md).
    """
    offset = block.position - table.gripper
    distance, height = float(np.hypot(*offset[:2])), table.gripper[2]
    grasp = max(GRASP, block.position[2])  # a block in a bowl, or on another, is higher

    # Open fingers (90 mm) leave 16 mm beside a block at 45° (57 mm): nearer than that, it is between them.
    if distance < 0.016 and abs(height - grasp) < 0.014 and table.held is None:
        return _action(table, np.array([*block.position[:2], grasp]), CLOSE)

    # Linear ramps instead of stages: there is no stage to remember, and noise at an edge does not flip the action.
    ready = table.opening > 0.75 and table.held is None
    funnel = _ramp(distance, 0.01, 0.035) if ready else 1.0
    goal = np.array([*block.position[:2], grasp + funnel * (hover - grasp)])
    freedom = max(_ramp(height, 0.05, 0.075), 1.0 - _ramp(distance, 0.02, 0.03))  # high enough, or over it already
    goal[:2] = table.gripper[:2] + freedom * offset[:2]
    return _action(table, goal, OPEN)


def _carry(table: Table, placement: Placement) -> np.ndarray:
    """Lift, cross, lower and let go. Sideways only as high as the block's bottom clears the other blocks."""
    bowl = table.bowl(placement.target).position
    offset = bowl - table.gripper
    distance, height = float(np.hypot(*offset[:2])), table.gripper[2]
    if distance < 0.02 and height < DROP + 0.012:
        return _action(table, np.array([*bowl[:2], DROP]), OPEN)

    over = 1.0 - _ramp(distance, 0.012, 0.045)
    goal = np.array([*bowl[:2], CARRY + over * (DROP - CARRY)])
    freedom = max(_ramp(height, 0.045, 0.08), over)
    goal[:2] = table.gripper[:2] + freedom * offset[:2]
    return _action(table, goal, CLOSE)


def _put_down(table: Table, placement: Placement) -> np.ndarray:
    """As `_carry`, onto a block: straight above it, and lower until the two nearly touch."""
    block, below = table.block(placement.block), table.block(placement.target)
    offset = below.position - block.position  # the block's center counts, wherever the fingers hold it
    distance, gap = float(np.hypot(*offset[:2])), block.position[2] - block.half - below.top
    if distance < 0.009 and gap < ABOVE + 0.006:
        return _action(table, np.array([*(table.gripper + offset)[:2], table.gripper[2] + ABOVE - gap]), OPEN)

    # As high as a bowl would have it, or over what the target stands on.
    over = 1.0 - _ramp(distance, 0.009, 0.03)
    high = max(CARRY, table.gripper[2] + CLEARANCE - gap)
    goal = table.gripper + offset
    goal[2] = high + over * (table.gripper[2] + ABOVE - gap - high)
    freedom = max(_ramp(gap, 0.0, CLEARANCE / 2) * _ramp(table.gripper[2], 0.045, 0.08), over)
    goal[:2] = table.gripper[:2] + freedom * offset[:2]
    return _action(table, goal, CLOSE)


def _action(table: Table, goal: np.ndarray, grip: float) -> np.ndarray:
    """Proportional, clipped as a vector in the plane so that the path stays straight; the wrist does not turn."""
    move = (goal - table.gripper) / MAX_STEP
    move[:2] /= max(1.0, float(np.abs(move[:2]).max()))
    return np.clip(np.array([*move, 0.0, 0.0, 0.0, grip]), -1, 1).astype(np.float32)


@dataclass(frozen=True)
class Demonstration:
    """`observations` [T], clean `labels` float32 [T, 7], `executed` float32 [T, 7], the `subtasks` [T] in words, how it
    ended, and the instruction."""

    observations: list[dict[str, Any]]
    labels: np.ndarray
    executed: np.ndarray
    subtasks: list[str]
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
    observations, labels, executed, subtasks = [], [], [], []

    done = False
    while not done:
        table = truth.table()
        label = act(table, truth.goal)
        command = disturb(label, rng, noise) if noise else label
        observations.append(observation)
        labels.append(label)
        executed.append(command)
        subtasks.append(subtask(table, truth.goal))
        observation, _, terminated, truncated, info = env.step(command)
        done = terminated or truncated

    task = observations[0]["task"]
    return Demonstration(
        observations, np.stack(labels), np.stack(executed), subtasks, info["success"], info["wrong_object"], task
    )
