"""What a table of gradient norms holds: its rows, its columns, and what they are called."""

import enum
from collections.abc import Mapping
from typing import Any

from insula.batch import LossName
from insula.model.config import ModelConfig


class Scheme(enum.StrEnum):
    """Where the gradient of the flow loss is stopped on its way into the backbone. The values are written to files."""

    INSULATED = "insulated"
    """At the keys and values that the expert reads: knowledge insulation."""
    JOINT = "joint"
    """Nowhere: the control."""
    EMBEDDINGS = "embeddings"
    """At the embeddings of the prefix only: a common mistake, since every layer makes keys and values with its own
    weights."""
    FROZEN = "frozen"
    """Everywhere, and the gradient of the token loss too: the backbone learns nothing."""


PROOF_SCHEMES = (Scheme.INSULATED, Scheme.JOINT)
"""The least that proves anything: the zeros and their control."""

# Named once: judging has a rule for each of these.
FINAL_NORM = "final norm"
EXPERT_PARTS = ("expert", "action head")

GradientTable = dict[str, dict[LossName, dict[Scheme, float]]]
"""`[part][loss][scheme]`: gradient norms, parts from pixels to actions. A scheme lists the losses it changes."""

LOSS_TITLES = {LossName.FLOW: "flow loss", LossName.FAST: "token loss"}
SCHEME_TITLES = {
    Scheme.INSULATED: "",
    Scheme.JOINT: ", not insulated",
    Scheme.EMBEDDINGS: ", stopped at the embeddings only",
    Scheme.FROZEN: ", backbone frozen",
}


def part_names(config: ModelConfig) -> tuple[str, ...]:
    """Rows of the table, from pixels to actions."""
    # Layer by layer: a leak at one layer alone would be lost in the norm of all of them.
    layers = (f"backbone layer {i}" for i in range(config.backbone.depth))
    return ("vision", "embedding", *layers, FINAL_NORM, *EXPERT_PARTS)


def column_title(loss: LossName, scheme: Scheme) -> str:
    """What a column of the table holds, for a person."""
    return LOSS_TITLES[loss] + SCHEME_TITLES[scheme]


def table_columns(table: Mapping[str, Any]) -> list[tuple[LossName, Scheme]]:
    """The columns of a `GradientTable`, measured or read from a file: each loss with its schemes beside each other.
    Every row has the same ones."""
    # From the table and not from a list of schemes: a file may have been measured with fewer.
    row: Mapping[str, Any] = next(iter(table.values()), {})
    return [(LossName(loss), Scheme(scheme)) for loss, columns in row.items() for scheme in columns]


def exact_text(value: float | None) -> str:
    """A norm for a person: a zero is called exact, nothing is written for what was not measured."""
    if value is None:
        return ""

    # "0.00" could be a small number rounded. Only one that is zero to the last bit is worth anything here.
    return "0 exactly" if value == 0 else f"{value:.3g}"
