"""Ways to join tokens and flow, by name: each one frozen value, which decides nine settings of a training.

    insula train --recipe joint --data data.toml --run runs/joint
    insula recipes                                                 what there is, and how they differ

A recipe says who learns from what. All else (sizes, rates, steps, λ, K) is the training's own. Settings that a recipe
decides cannot be changed beside it: a run that carries its name is what the name says.
"""

import dataclasses
from typing import Any

from rich.table import Table

from insula.batch import LossName
from insula.errors import InputError, did_you_mean
from insula.model.config import LoraConfig
from insula.model.objective import Mistake
from insula.terminal import as_text

BOTH = tuple(LossName)
_DRIESS = "Driess et al. 2025, arXiv 2505.23705"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`about` in a line, and where it comes from. What it leaves unsaid is as in knowledge insulation."""

    name: str
    about: str
    source: str
    knowledge_insulation: bool = True
    flow_gradient_scale: float = 1.0
    flow_gradient_end: float | None = None
    freeze_backbone: bool = False
    mistake: Mistake = "none"
    losses: tuple[LossName, ...] = BOTH
    """That the demonstrations teach."""
    questions: bool = True
    """Whether the questions of the mapping are learned as well."""
    lora: LoraConfig | None = None
    from_scratch: bool = False
    starts_from: str | None = None
    """The recipe of the run whose weights `init` must be: this one is a second stage."""

    @property
    def objective(self) -> dict[str, Any]:
        """What it says of `ObjectiveConfig`, by field."""
        names = ("knowledge_insulation", "flow_gradient_scale", "flow_gradient_end", "freeze_backbone", "mistake")
        return {name: getattr(self, name) for name in names}

    @property
    def acts_by(self) -> str:
        """How a policy of it acts: "flow", or "tokens" where the expert has learned nothing."""
        return "flow" if LossName.FLOW in self.losses else "tokens"


def _passing(name: str, about: str, scale: float, end: float | None = None) -> Recipe:
    return Recipe(name, about, "insula", knowledge_insulation=False, flow_gradient_scale=scale, flow_gradient_end=end)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("insulated", "tokens teach the backbone, flow the expert, and nothing passes between", _DRIESS),
        Recipe(
            "joint",
            "as insulated, but the flow loss teaches the backbone as well",
            f"the baseline “joint training” of {_DRIESS}",
            knowledge_insulation=False,
        ),
        _passing("gamma-0.1", "between the two: a tenth of the flow loss's gradient passes", 0.1),
        _passing("gamma-0.3", "between the two: three tenths of it pass", 0.3),
        _passing("gamma-annealed", "joint at first, insulated in the end", 1.0, 0.0),
        Recipe(
            "flow-only",
            "no token loss and no questions: the flow loss teaches everything",
            "π0, arXiv 2410.24164",
            knowledge_insulation=False,
            losses=(LossName.FLOW,),
            questions=False,
        ),
        Recipe(
            "flow-only-frozen",
            "the expert alone learns, on a backbone that stays as it is",
            f"the baseline “frozen backbone” of {_DRIESS}",
            freeze_backbone=True,
            losses=(LossName.FLOW,),
            questions=False,
        ),
        Recipe(
            "tokens-only",
            "no flow loss: actions are decoded from FAST tokens",
            "π0-FAST, arXiv 2501.09747",
            losses=(LossName.FAST,),
        ),
        Recipe(
            "two-stage",
            "tokens first; then the expert alone, on what they made of the backbone",
            "after π0.5, arXiv 2504.16054, whose second stage is not frozen",
            freeze_backbone=True,
            losses=(LossName.FLOW,),
            questions=False,
            starts_from="tokens-only",
        ),
        Recipe(
            "embedding-stop",
            "a mistake: the flow loss's gradient stops at the embeddings, and every layer keeps it",
            "seen in public implementations",
            knowledge_insulation=False,
            mistake="stop_at_embeddings",
        ),
        Recipe(
            "hybrid-leaky",
            "a mistake: the expert reads the FAST tokens of the actions it is to find",
            "seen in public implementations",
            mistake="visible_fast",
        ),
        Recipe("no-vlm-data", "insulated, from demonstrations alone: no questions", _DRIESS, questions=False),
        Recipe("from-scratch", "insulated, from random weights", "insula", from_scratch=True),
        Recipe(
            "lora",
            "insulated, and of the backbone only low-rank updates learn",
            "Hu et al. 2021, arXiv 2106.09685",
            lora=LoraConfig(),
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """Raises InputError, with the nearest name, for one that is not there."""
    if name not in RECIPES:
        raise InputError(f"no recipe {name!r}{did_you_mean(name, RECIPES)}; known: {', '.join(RECIPES)}")

    return RECIPES[name]


@dataclasses.dataclass(frozen=True)
class RecipesConfig:
    """Print the recipes of insula train --recipe NAME."""


def run_recipes(config: RecipesConfig) -> None:
    """Print what each of them decides, then what it is."""
    table = Table("recipe", "losses", "γ", "questions", "besides", box=None, pad_edge=False)
    for recipe in RECIPES.values():
        losses, questions = ", ".join(recipe.losses), "yes" if recipe.questions else "no"
        table.add_row(recipe.name, losses, _gamma(recipe), questions, _besides(recipe))

    about = (f"{recipe.name}: {recipe.about} ({recipe.source})" for recipe in RECIPES.values())
    print(as_text(table, "", *about))


def _gamma(recipe: Recipe) -> str:
    """How much of the flow loss's gradient reaches the backbone."""
    if recipe.knowledge_insulation or recipe.freeze_backbone:
        return "0"

    end = recipe.flow_gradient_end
    return f"{recipe.flow_gradient_scale:g}" + ("" if end is None else f" → {end:g}")


def _besides(recipe: Recipe) -> str:
    parts = {
        "backbone frozen": recipe.freeze_backbone,
        "LoRA": recipe.lora is not None,
        "random weights": recipe.from_scratch,
        recipe.mistake.replace("_", " "): recipe.mistake != "none",
        f"after {recipe.starts_from}": recipe.starts_from is not None,
    }
    return ", ".join(part for part, said in parts.items() if said)
