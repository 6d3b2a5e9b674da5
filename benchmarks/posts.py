"""A world in which chunks disagree: a disk drives to one of two goals, round posts that stand in its way.

    ┌──────────────────────────────┐
    │          ╭───╮         red ○ │      each post is passed on either side; which one is free, but
    │ ●  →     ( o )     ( o )     │      half of one and half of the other ends at the post
    │          ╰───╯        blue ○ │
    └──────────────────────────────┘

Whoever is before the middle of a post may go round it either way, and the demonstrator does: its side is drawn for
every post of every episode. So two chunks predicted from nearly the same place may take different sides, which is
where following the old one during a delay, and the new one afterwards, goes wrong (Black, Galliker & Levine 2025, §1).

Lengths are in widths of the field. Action [2] in [-1, 1]: the velocity, x `MAX_STEP` a control step. Observation:
images.front uint8 [64, 64, 3]; state float32 [6], the places of the disk and both posts, because this world is about
time and not about sight; task, the goal to drive to.
"""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from insula.data.images import encode_pngs
from insula.data.lerobot.info import Feature, image_feature
from insula.data.lerobot.writer import LeRobotWriter

SIZE = 64  # pixels of the picture, which shows x from 0 to 1 and y from -0.5 to 0.5
FPS = 50
MAX_STEP = 0.015
MAX_STEPS = 140
POST, DISK = 0.04, 0.02  # radii
CLEAR = 0.12  # how far from a post's middle the demonstrator passes
BEFORE, BEHIND = 0.25, 0.06  # where it begins to go round a post, and where it is past it
UNDECIDED = 0.05  # nearer to a post's middle line than this, either side will do
GOALS = {"red": (0.95, 0.25), "blue": (0.95, -0.25)}
REACHED = 0.06
PAINT = {"red": (220, 50, 40), "blue": (40, 80, 220)}
HOLD = np.zeros(2, np.float32)


class PostsEnv(gymnasium.Env):
    """See the module's docstring. `info` tells `success`, and `wrong_object`: the other goal was reached."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(self) -> None:
        picture = spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict({"front": picture}),
                "state": spaces.Box(-1, 2, (6,), np.float32),
                "task": spaces.Text(40, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new field, the same for the same seed."""
        super().reset(seed=seed)
        rng = self.np_random
        self.place = np.array([0.05, rng.uniform(-0.05, 0.05)])
        # The first before the disk, the second anywhere near where it comes out.
        first = np.array([rng.uniform(0.38, 0.42), self.place[1] + rng.uniform(-0.03, 0.03)])
        second = np.array([rng.uniform(0.68, 0.72), first[1] + rng.uniform(-0.15, 0.15)])
        self.posts = np.stack([first, second])
        self.goal = str(rng.choice(list(GOALS)))
        self.steps = 0
        self._background = self._paint_field()
        return self._observe(), self._info(over=False)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step; it ends at a goal or at a post."""
        self.place = self.place + MAX_STEP * np.clip(action, -1, 1)
        self.steps += 1
        hit = bool((np.linalg.norm(self.posts - self.place, axis=1) < POST + DISK).any())
        info = self._info(hit)
        over = hit or info["success"] or info["wrong_object"]
        return self._observe(), float(info["success"]), over, self.steps >= MAX_STEPS, info

    def _info(self, over: bool) -> dict[str, Any]:
        near = {name: bool(np.hypot(*(self.place - goal)) < REACHED) for name, goal in GOALS.items()}
        other = any(reached for name, reached in near.items() if name != self.goal)
        return {"success": near[self.goal] and not over, "wrong_object": other}

    def _observe(self) -> dict[str, Any]:
        picture = self._background.copy()
        picture[_disk(self.place, DISK)] = (30, 160, 60)
        return {
            "images": {"front": picture},
            "state": np.concatenate([self.place, *self.posts]).astype(np.float32),
            "task": f"drive to the {self.goal} goal",
        }

    def _paint_field(self) -> np.ndarray:
        picture = np.full((SIZE, SIZE, 3), 235, np.uint8)
        for name, goal in GOALS.items():
            picture[_disk(np.array(goal), REACHED)] = PAINT[name]
        for post in self.posts:
            picture[_disk(post, POST)] = (60, 60, 60)
        return picture


_AXIS = (np.arange(SIZE) + 0.5) / SIZE


def _disk(middle: np.ndarray, radius: float) -> np.ndarray:
    """Pixels [SIZE, SIZE]; y points up."""
    return (_AXIS[None] - middle[0]) ** 2 + (0.5 - _AXIS[:, None] - middle[1]) ** 2 < radius**2


def demonstrate(env: PostsEnv, seed: int, noise: float) -> tuple[list[dict[str, Any]], np.ndarray, bool]:
    """One episode of the demonstrator: observations [T], clean labels [T, 2], success. The noisy action is executed
    (DART), so that the labels show the way back."""
    rng = np.random.default_rng([seed, 1])
    sides = rng.choice([-1.0, 1.0], len(GOALS))
    observation, info = env.reset(seed=seed)
    observations, labels, over = [], [], False
    while not over:
        action = _drive(env, sides)
        observations.append(observation)
        labels.append(action)
        observation, _, terminated, truncated, info = env.step(action + rng.normal(0, noise, 2))
        over = terminated or truncated
    return observations, np.stack(labels).astype(np.float32), info["success"]


def _drive(env: PostsEnv, sides: np.ndarray) -> np.ndarray:
    x, y = env.place
    toward = env.place[1]
    for post, side in zip(env.posts, sides, strict=True):
        if post[0] - BEFORE < x < post[0] + BEHIND:
            beside = y - post[1]
            toward = post[1] + CLEAR * (np.sign(beside) if abs(beside) > UNDECIDED else side)

    forward = 1.0
    if x > env.posts[-1][0] + BEHIND:
        goal = np.array(GOALS[env.goal])
        toward = goal[1]
        forward = np.clip((goal[0] - x) / MAX_STEP, -1, 1)
    return np.array([forward, np.clip((toward - y) / (3 * MAX_STEP), -1, 1)])


def write_demonstrations(root: Path, episodes: int, noise: float = 0.15) -> int:
    """A LeRobot data set of the first `episodes` seeds that succeed. Returns how many seeds were tried."""
    env = PostsEnv()
    features = {
        "observation.images.front": image_feature(SIZE, SIZE),
        "observation.state": Feature("float32", (6,), ("x", "y", "x1", "y1", "x2", "y2")),
        "action": Feature("float32", (2,), ("vx", "vy")),
    }
    written = seed = 0
    with LeRobotWriter(root, FPS, features, "posts") as writer:
        while written < episodes:
            observations, labels, success = demonstrate(env, seed, noise)
            seed += 1
            if not success:
                continue

            writer.add_episode(
                {
                    "observation.images.front": encode_pngs([o["images"]["front"] for o in observations]),
                    "observation.state": np.stack([o["state"] for o in observations]),
                    "action": labels,
                },
                observations[0]["task"],
            )
            written += 1
    return seed
