"""Judging: what a table of gradient norms shows, in a word, a sentence, and the entries that show it."""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

from insula.batch import LossName
from insula.certificate.table import EXPERT_PARTS, FINAL_NORM, GradientTable, Scheme, column_title
from insula.errors import InsulationError


class Outcome(enum.StrEnum):
    """What a measurement shows."""

    HOLDS = "holds"
    """Every zero is exact, every control is not."""
    OFF = "off"
    """It would hold, but this model trains without insulation, so its flow loss goes where the control goes."""
    LEAKS = "leaks"
    """A gradient, or an influence, is where none may be."""
    VACUOUS = "vacuous"
    """A control is zero, so the zeros beside it show nothing."""
    NOT_FINITE = "not finite"
    """There is NaN or infinity."""
    NOT_ASKED = "not asked"
    """The sample lacks one of the losses, or the model was not run."""
    MISSING = "not certified"
    """There is no certificate that can be read."""


VERDICTS = {
    Outcome.HOLDS: "Insulation holds: what must be zero is exactly zero, and every control is not.",
    Outcome.OFF: "Insulation is off: this model learns from the flow loss as the columns “not insulated” show.",
    Outcome.LEAKS: "Insulation leaks: something arrives where nothing must.",
    Outcome.VACUOUS: "Nothing is shown: a control is zero, so the zeros beside it mean nothing (an untrained model?).",
    Outcome.NOT_FINITE: "Nothing is shown: some numbers are not finite.",
    Outcome.NOT_ASKED: "This sample lacks a loss, so it cannot show insulation.",
    Outcome.MISSING: "Not certified: this checkpoint has no certificate that can be read.",
}
"""One sentence for a person."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """A table, what it shows, and `findings`: what spoils the proof, if anything.

    `cosine[part]`: between the two losses' gradients without insulation, None where one of them is zero.
    """

    table: GradientTable
    outcome: Outcome
    findings: tuple[str, ...]
    cosine: dict[str, float | None] = dataclasses.field(default_factory=dict)

    def check(self) -> "Proof":
        """Itself. Raises InsulationError unless it holds."""
        require(self.outcome, self.findings)
        return self

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `certificate.json` has them."""
        return {
            "outcome": self.outcome,
            "findings": list(self.findings),
            "table": self.table,
            "cosine": self.cosine,
        }


def require(outcome: str, findings: Sequence[str]) -> None:
    """Raises InsulationError unless insulation holds: of a proof, or of what a certificate's file says."""
    if outcome != Outcome.HOLDS:
        raise InsulationError(f"knowledge insulation: {outcome}; " + "; ".join(findings))


def judge(table: GradientTable) -> tuple[Outcome, tuple[str, ...]]:
    """What a table shows, and the entries that show it. The first of these that has any: not finite, leaks, vacuous."""
    broken, leaks, vacuous = [], [], []

    # No tolerance: a stopped gradient is zero in every bit, and one that is merely small has come through.
    for part, row in table.items():
        for loss, columns in row.items():
            for scheme, norm in columns.items():
                title = column_title(loss, scheme)
                if not math.isfinite(norm):
                    broken.append(f"{title}: the norm on {part} is {norm}")
                elif norm != 0 and _must_be_zero(part, loss, scheme):
                    leaks.append(f"{title} reaches {part}, norm {norm:.3g}")
                elif norm == 0 and _must_not_be_zero(part, loss, scheme):
                    vacuous.append(f"{title} does not reach {part} either")

    return worst(broken, leaks, vacuous)


def worst(broken: Sequence[str], leaks: Sequence[str], vacuous: Sequence[str]) -> tuple[Outcome, tuple[str, ...]]:
    """The gravest outcome that has findings, with them; HOLDS where there are none. A leak is believed before a control
    that is zero, and neither where some number is not finite."""
    # The same order for gradients and for influence: a page that shows both must not call one thing by two names.
    by_gravity = ((Outcome.NOT_FINITE, broken), (Outcome.LEAKS, leaks), (Outcome.VACUOUS, vacuous))
    return next(((outcome, tuple(found)) for outcome, found in by_gravity if found), (Outcome.HOLDS, ()))


def _must_be_zero(part: str, loss: LossName, scheme: Scheme) -> bool:
    """A claim. EMBEDDINGS claims nothing: it is there to show what that mistake lets through."""
    if loss is LossName.FAST:
        return part in EXPERT_PARTS or scheme is Scheme.FROZEN

    return part not in EXPERT_PARTS and scheme in (Scheme.INSULATED, Scheme.FROZEN)


def _must_not_be_zero(part: str, loss: LossName, scheme: Scheme) -> bool:
    """A control, without which the zeros of the same part would show nothing."""
    if loss is LossName.FAST:
        return part not in EXPERT_PARTS and scheme is not Scheme.FROZEN

    if part in EXPERT_PARTS:
        return True

    # The final norm comes after the last keys and values: no scheme leads the flow loss there.
    return scheme is Scheme.JOINT and part != FINAL_NORM
