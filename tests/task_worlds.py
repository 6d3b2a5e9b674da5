"""What tests of the tabletop's tasks share: an environment of each, draws of their scenes, and tables made by hand."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.facts import Block, Bowl, Table
from insula.worlds.tabletop.goals import Goal, Placement
from insula.worlds.tabletop.scene import BLOCK_HALF, BOWL_FLOOR
from insula.worlds.tabletop.tasks import TASKS

NEW = [name for name in TASKS if name != "put"]


@contextlib.contextmanager
def undrawn_worlds() -> Iterator[dict[str, Any]]:
    """One environment of each task, which draws nothing: physics and judge need no pictures."""
    made = {name: make_tabletop(name, image_size=16) for name in TASKS}
    for env in made.values():
        env.unwrapped._draw = lambda cameras: {name: np.zeros((16, 16, 3), np.uint8) for name in cameras}
    yield made
    for env in made.values():
        env.close()


def draws(name: str, split: str, count: int) -> list[Any]:
    return [TASKS[name].draw(np.random.default_rng([seed, 5]), split) for seed in range(count)]


def both_goals(name: str, split: str, count: int = 500) -> list[Goal]:
    scenes = draws(name, split, count)
    return [goal for one in scenes for goal in (one.goal, one.other)]


def block(color: str, x: float, y: float = 0.0, z: float = BLOCK_HALF, speed: float = 0.0, half: float = 0.02) -> Block:
    return Block(color, np.array([x, y, z]), 0.0, speed, half)


def table(*blocks: Block, held: str | None = None, opening: float = 1.0) -> Table:
    """A red bowl to the left and a blue one to the right."""
    bowls = (Bowl("red", np.array([-0.1, 0.0, 0.0])), Bowl("blue", np.array([0.1, 0.0, 0.0])))
    return Table(blocks, bowls, np.array([0.0, 0.1, 0.1]), 0.0, opening, held)


INSIDE = BOWL_FLOOR + BLOCK_HALF
SORT = Goal("sort", (Placement("red", "red", "in"), Placement("blue", "blue", "in")))
TOWER = Goal("stack", (Placement("blue", "green", "on"), Placement("red", "blue", "on")))
OUT = (block("red", 0.0, -0.1), block("blue", 0.0, 0.0), block("green", 0.0, 0.1))


def tower(x: float = 0.0, **top: Any) -> tuple[Block, ...]:
    """Red on blue on green."""
    return block("green", x), block("blue", x, z=0.06), block("red", x, z=0.10, **top)
