"""What a study asks for and cannot have, found before anything is trained rather than after hours of it."""

from pathlib import Path

from insula.batch import LossName
from insula.data.mapping import RobotData, narrowed, read_mapping
from insula.errors import InputError, did_you_mean
from insula.evaluate.closed_loop import check_seeds
from insula.recipes import Recipe, find_recipe
from insula.study.design import Study
from insula.tokens.dialects import Form
from insula.worlds.seeds import EVALUATION


def check_study(study: Study) -> None:
    """Raises DatasetError for data that cannot be read, or of which a recipe would learn nothing; InputError for a
    robot that cannot act in the tasks."""
    cameras = study.settings(Path()).model.cameras
    mapping = read_mapping(study.data, cameras)
    recipes = [find_recipe(name) for name in dict.fromkeys(cell.recipe for cell in study.cells)]
    for recipe in recipes:
        narrowed(mapping, recipe.losses, recipe.questions)

    if not study.tasks:
        return

    check_seeds(study.scenes, EVALUATION.start, allow_any_seed=False, used=())
    name = study.robot or next(iter(mapping.robots))
    if name not in mapping.robots:
        known = ", ".join(mapping.robots)
        raise InputError(f"robot: no {name!r} in {study.data}{did_you_mean(name, mapping.robots)}; known: {known}")
    if study.robot is None and len(mapping.robots) > 1:
        raise InputError(f"robot: {study.data} has {', '.join(mapping.robots)}; say which of them acts in the tasks")
    for recipe in recipes:
        _check_acting(name, mapping.robots[name], recipe)


def _check_acting(name: str, robot: RobotData, recipe: Recipe) -> None:
    taught_by = LossName.FLOW if recipe.acts_by == "flow" else LossName.FAST
    if taught_by not in robot.losses:
        raise InputError(
            f"recipe {recipe.name!r} acts by {recipe.acts_by}, which nothing teaches {name}: its losses are "
            f"{', '.join(robot.losses)}"
        )
    if Form.FLAT not in robot.shares:
        raise InputError(
            f"the tasks give an instruction and no subtask, and {name} is trained on {', '.join(robot.shares)}; add "
            "flat to its forms"
        )
