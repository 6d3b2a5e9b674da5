"""What a study compares, as a TOML file: recipes × seeds × amounts of data, each combination a cell.

data = "data.toml"                  as for insula train --data
preset = "tabletop"                 what every cell's training starts from
steps = 5000
tasks = ["sort", "stack"]           of the tabletop, to act in; without, what is measured needs no simulator
scenes = 100                        of each task
looks = 4                           evenly over the training, the last at its end; those before with fewer scenes

[[grid]]
recipes = ["insulated", "joint"]
seeds = [0, 1, 2]

[[grid]]                            less data: only where it is of interest
recipes = ["insulated", "joint"]
episodes = [50, 200]

[model]                             what the preset has otherwise; also [reading] and [optimizer]
state_dim = 14
"""

import dataclasses
import itertools
import os
import tomllib
from pathlib import Path
from typing import Any

from insula.checkpoints.hub import is_address
from insula.checks import check_integer, check_seed
from insula.collect.demonstrations import HELD_OUT_SCENES
from insula.errors import InputError, did_you_mean
from insula.files import as_path
from insula.model.config import build
from insula.recipes import RECIPES, find_recipe
from insula.train.config import READING_PATHS, TRAINING, TrainConfig, changed, training_preset
from insula.worlds.tabletop.tasks import find_task


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every recipe with every seed and every amount of data. `episodes`: of each robot; all of them where it is
    empty. Raises InputError for unknown recipes and values that cannot be."""

    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in self.recipes:
            find_recipe(name)
        for seed in self.seeds:
            check_seed("seeds has one that", seed)
        for count in self.episodes:
            check_integer("episodes has one that", count, 1)
        if not self.recipes or not self.seeds:
            raise InputError("a grid needs at least one recipe and one seed")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training and all that is measured of it. `episodes`: of each robot; None for all there are."""

    recipe: str
    seed: int
    episodes: int | None = None

    @property
    def name(self) -> str:
        """Of its folder: "joint-n200-s0", "joint-all-s0"."""
        return f"{self.recipe}-{self.amount}-s{self.seed}"

    @property
    def amount(self) -> str:
        """Of data, in a word."""
        return "all" if self.episodes is None else f"n{self.episodes}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, whole. Raises InputError for values that cannot be."""

    data: Path
    grid: tuple[Grid, ...]
    preset: str = "tabletop"
    steps: int | None = None
    """Updates of each cell; the preset's unless given. A recipe of two stages has half of them for each."""
    batch_size: int | None = None
    init: Path | None = None
    """The weights that cells start from, as for insula train --init; a recipe from scratch takes none."""
    fresh: tuple[str, ...] = ()
    """As for insula train --fresh."""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of every cell that differ from the preset's, as train.json has them, but what a recipe decides."""
    reading: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Likewise: {"fast_last_id": 257023}."""
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    robot: str | None = None
    """Which of the mapping's acts in the tasks, where it has several."""
    scenes: int = 100
    held_out: bool = True
    """Also ask in words, and for pairs, that no demonstration has."""
    looks: int = 1
    look_scenes: int = 25
    knowledge_scenes: int = 200
    """Of the tabletop, whose questions tell what the backbone still knows; where there are tasks."""

    def __post_init__(self) -> None:
        if self.preset not in TRAINING:
            raise InputError(f"no preset {self.preset!r}{did_you_mean(self.preset, TRAINING)}")
        for name in ("scenes", "looks", "look_scenes"):
            check_integer(name, getattr(self, name), 1)
        # Those kept for it: questions of a mixture, and pretraining, are about the scenes behind them.
        check_integer("knowledge_scenes", self.knowledge_scenes, 1, HELD_OUT_SCENES)
        for name in ("steps", "batch_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        for task in self.tasks:
            find_task(task)
        if len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"tasks names one twice: {', '.join(self.tasks)}")
        if not self.grid:
            raise InputError("no [[grid]]: there is nothing to compare")

        decided = {name for recipe in RECIPES.values() for name in recipe.objective}
        objective = self.model.get("objective", {})
        taken = [name for name in objective if name in decided] if isinstance(objective, dict) else []
        if taken or "lora" in self.model:
            name = f"objective.{taken[0]}" if taken else "lora"
            raise InputError(f"model: {name} is what recipes decide; leave it out (insula recipes shows them)")
        self.settings(Path())  # for what it raises

    def settings(self, run: Path) -> TrainConfig:
        """Of every cell's training, before what its recipe decides."""
        tables = {"model": self.model, "reading": self.reading, "optimizer": self.optimizer}
        return changed(training_preset(self.preset, run), tables, "study")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every combination once, seed by seed: a study that is ended early has whole comparisons of some seeds."""
        found = [
            Cell(recipe, seed, count)
            for grid in self.grid
            for count, recipe, seed in itertools.product(grid.episodes or (None,), grid.recipes, grid.seeds)
        ]
        return tuple(sorted(dict.fromkeys(found), key=lambda cell: cell.seed))

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Plain values; paths as seen from `folder`, so that what is written there holds where both are moved to."""
        paths = {
            name: os.path.relpath(path.resolve(), folder.resolve())
            for name, path in (("data", self.data), ("init", self.init))
            if path is not None and not is_address(path)
        }
        reading = self.reading | {
            name: os.path.relpath(Path(self.reading[name]).resolve(), folder.resolve())
            for name in READING_PATHS
            if self.reading.get(name)
        }
        return dataclasses.asdict(self) | {"init": self.init and str(self.init), "reading": reading} | paths


def read_study(path: Path) -> Study:
    """Raises InputError naming the file and what is wrong in it, with the nearest known name."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not readable as TOML ({error})") from None

    grids = raw.get("grid", [])
    if not isinstance(grids, list):
        raise InputError(f"{path}: grid is {grids!r:.80}, expected tables, each as [[grid]]")

    parts: dict[str, Any] = {
        "grid": tuple(build(Grid, grid, f"{path}: grid {i}") for i, grid in enumerate(grids, start=1))
    }
    for name in ("data", "init"):
        if isinstance(raw.get(name), str):
            given = as_path(raw[name], f"{path}: {name}").expanduser()
            parts[name] = given if is_address(given) else path.parent / given
    if isinstance(reading := raw.get("reading"), dict):
        places = {name: reading[name] for name in READING_PATHS if isinstance(reading.get(name), str)}
        parts["reading"] = reading | {name: str(path.parent / Path(text).expanduser()) for name, text in places.items()}
    return build(Study, raw | parts, str(path))
