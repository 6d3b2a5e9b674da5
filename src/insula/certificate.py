"""The insulation certificate: how much of each loss's gradient reaches each part of a model, insulated and not.

    part              flow loss          flow loss, not insulated   token loss
    vision            0 exactly          > 0                        > 0
    embedding         0 exactly          > 0                        > 0
    backbone layer i  0 exactly          > 0                        > 0
    final norm        0 exactly          0: nothing leads there     > 0
    expert            > 0                > 0                        0 exactly
    action head       > 0                > 0                        0 exactly

The token head has no row of its own: it is the embedding again.

A zero alone proves nothing: adaRMS gates start at zero, so an untrained model shows zeros under any scheme. Hence the
control, the same loss without insulation, which must not be zero where insulation is claimed.

A checkpoint of a run holds one (`certificate.json`), measured on the very weights beside it. The weights are saved
first and certified afterwards, so a checkpoint may be without one: `stored_certificate` then says so.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from insula.batch import Batch, LossName
from insula.compile import compiled_quickly
from insula.errors import InputError, InsulaError, InsulationError, MissingFileError
from insula.files import read_json, write_json
from insula.losses import compute_loss, expert_loss
from insula.model.backbone import embed, run_layers
from insula.model.config import ModelConfig
from insula.model.insulation import freeze, insulate
from insula.model.params import Params
from insula.shapes import Array, PRNGKeyArray

FORMAT = 2
"""Layout of certificate.json. 2: `table[part][loss][scheme]`. 1 (it had no number): `table[part][loss_scheme]`."""


class Scheme(enum.StrEnum):
    """Where the gradient of the flow loss is stopped on its way into the backbone."""

    INSULATED = "insulated"
    """At the keys and values that the expert reads: knowledge insulation."""
    JOINT = "joint"
    """Nowhere: the control."""
    EMBEDDINGS = "embeddings"
    """At the embeddings of the prefix only: a common mistake, since every layer makes keys and values with its own
    weights."""
    FROZEN = "frozen"
    """Everywhere, and the gradient of the token loss too: the backbone learns nothing."""


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

PROOF_SCHEMES = (Scheme.INSULATED, Scheme.JOINT)
"""The least that proves anything: the zeros and their control."""

FINAL_NORM = "final norm"
EXPERT_PARTS = ("expert", "action head")

Norms = dict[LossName, dict[str, Any]]
"""`[loss][part]`: a gradient norm, on the device or as a float."""
GradientTable = dict[str, dict[LossName, dict[Scheme, float]]]
"""`[part][loss][scheme]`: gradient norms, parts from pixels to actions. A scheme lists the losses it changes."""


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
    """Raises InsulationError unless insulation holds."""
    if outcome != Outcome.HOLDS:
        raise InsulationError(f"knowledge insulation: {outcome}; " + "; ".join(findings))


# --- measuring -------------------------------------------------------------------------------------------------------

Prover = Callable[[Params, Batch, PRNGKeyArray], Proof]


def make_prover(config: ModelConfig, schemes: Sequence[Scheme] = PROOF_SCHEMES) -> Prover:
    """A function that measures and judges, compiled once. Give it trained or randomized parameters: fresh ones come out
    as "vacuous". It measures in float32, whatever the config computes in.

    `freeze_backbone`, and the freezing of what LoRA leaves alone, are lifted in all schemes but FROZEN: the zeros are
    to come from insulation. `knowledge_insulation=False` is lifted too, but then a proof that holds is OFF.
    """
    free = (
        dataclasses.replace(config, lora=None)
        .with_objective(
            freeze_backbone=False,
            ki_fast_loss_weight=config.objective.ki_fast_loss_weight or 1.0,
            knowledge_insulation=True,
        )
        .with_compute(dtype="float32", scan_layers=True)
    )
    programs = {scheme: _make_measure(free, scheme) for scheme in schemes}

    def measure(params: Params, batch: Batch, rng: PRNGKeyArray) -> Proof:
        norms: dict[Scheme, Norms] = {}
        cosine: dict[str, float | None] = {}

        for scheme, run in programs.items():
            norms[scheme], angles = jax.device_get(run(params, batch, rng))
            cosine |= {part: None if math.isnan(angle) else float(angle) for part, angle in angles.items()}

        table = {part: _table_row(part, norms) for part in part_names(config)}
        outcome, findings = judge(table)

        # The measurement insulated a model that does not train so: what it shows is not what happens in training.
        if outcome is Outcome.HOLDS and config.objective.flow_reaches_backbone:
            control = table["vision"][LossName.FLOW][Scheme.JOINT]
            reached = f"vision, norm {control:.3g}, and all of the backbone"
            outcome, findings = Outcome.OFF, (f"knowledge_insulation is off: the flow loss reaches {reached}",)

        return Proof(table, outcome, findings, cosine)

    return measure


def prove(
    params: Params, config: ModelConfig, batch: Batch, rng: PRNGKeyArray, schemes: Sequence[Scheme] = PROOF_SCHEMES
) -> Proof:
    """`make_prover` for once."""
    return make_prover(config, schemes)(params, batch, rng)


def part_names(config: ModelConfig) -> tuple[str, ...]:
    """Rows of the table, from pixels to actions."""
    layers = (f"backbone layer {i}" for i in range(config.backbone.depth))
    return ("vision", "embedding", *layers, FINAL_NORM, *EXPERT_PARTS)


def _table_row(part: str, norms: dict[Scheme, Norms]) -> dict[LossName, dict[Scheme, float]]:
    return {
        loss: {scheme: float(found[loss][part]) for scheme, found in norms.items() if loss in found}
        for loss in LossName
    }


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(table: GradientTable) -> tuple[Outcome, tuple[str, ...]]:
    """What a table shows, and the entries that show it. The first of these that has any: not finite, leaks, vacuous."""
    broken, leaks, vacuous = [], [], []

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
    by_gravity = ((Outcome.NOT_FINITE, broken), (Outcome.LEAKS, leaks), (Outcome.VACUOUS, vacuous))
    return next(((outcome, tuple(found)) for outcome, found in by_gravity if found), (Outcome.HOLDS, ()))


def _must_be_zero(part: str, loss: LossName, scheme: Scheme) -> bool:
    if loss is LossName.FAST:
        return part in EXPERT_PARTS or scheme is Scheme.FROZEN

    return part not in EXPERT_PARTS and scheme in (Scheme.INSULATED, Scheme.FROZEN)


def _must_not_be_zero(part: str, loss: LossName, scheme: Scheme) -> bool:
    if loss is LossName.FAST:
        return part not in EXPERT_PARTS and scheme is not Scheme.FROZEN
    if part in EXPERT_PARTS:
        return True

    # The final norm comes after the last keys and values: no scheme leads the flow loss there.
    return scheme is Scheme.JOINT and part != FINAL_NORM


# --- telling ---------------------------------------------------------------------------------------------------------

LOSS_TITLES = {LossName.FLOW: "flow loss", LossName.FAST: "token loss"}
SCHEME_TITLES = {
    Scheme.INSULATED: "",
    Scheme.JOINT: ", not insulated",
    Scheme.EMBEDDINGS: ", stopped at the embeddings only",
    Scheme.FROZEN: ", backbone frozen",
}


def column_title(loss: LossName, scheme: Scheme) -> str:
    """What a column of the table holds, for a person."""
    return LOSS_TITLES[loss] + SCHEME_TITLES[scheme]


def table_columns(table: Mapping[str, Any]) -> list[tuple[LossName, Scheme]]:
    """The columns of a `GradientTable`, measured or read from a file: each loss with its schemes beside each other.
    Every row has the same ones."""
    row: Mapping[str, Any] = next(iter(table.values()), {})
    return [(LossName(loss), Scheme(scheme)) for loss, columns in row.items() for scheme in columns]


def exact_text(value: float | None) -> str:
    """A norm for a person: a zero is called exact, nothing is written for what was not measured."""
    if value is None:
        return ""
    return "0 exactly" if value == 0 else f"{value:.3g}"


# --- the file --------------------------------------------------------------------------------------------------------


def write_certificate(path: Path, proof: Proof, config: ModelConfig, about: dict[str, Any]) -> None:
    """The proof, what the run was trained with, and `about`: step, samples, seed. Written whole or not at all."""
    names = ("knowledge_insulation", "ki_fast_loss_weight", "freeze_backbone")
    trained_with = {name: getattr(config.objective, name) for name in names}
    head = {"format": FORMAT, "insula": version("insula"), "model": config.name}

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, head | about | {"trained_with": trained_with} | proof.to_json())


def read_certificate(path: Path) -> dict[str, Any]:
    """What `write_certificate` wrote.

    Raises MissingFileError where there is none, and InputError where it is damaged or another version wrote it.
    """
    again = "measure it again: insula inspect --run RUN --certificate FILE.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: not certified, there is no such file; {again}")

    written = read_json(path, "outcome", "findings", "table")
    if (found := written.get("format", 1)) != FORMAT:
        age = "an older" if isinstance(found, int) and found < FORMAT else "another"
        raise InputError(f"{path}: written by {age} version of insula (format {found}, expected {FORMAT}); {again}")

    _refuse_damaged(path, written)
    return written


def _refuse_damaged(path: Path, written: dict[str, Any]) -> None:
    """Raises InputError where a reader would stumble: over the outcome, the findings, or an entry of the table."""
    if written["outcome"] not in list(Outcome):
        raise InputError(f"{path}: outcome is {written['outcome']!r:.80}, expected one of {', '.join(Outcome)}")

    if not isinstance(written["findings"], list):
        raise InputError(f"{path}: findings is {written['findings']!r:.80}, expected a list of lines")

    table = written["table"]
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: the table is {table!r:.80}, expected a row for each part of the model")

    for part, row in table.items():
        if not isinstance(row, dict) or not all(_is_norms(row.get(loss)) for loss in LossName):
            raise InputError(f"{path}: the table's {part!r} is {row!r:.80}, expected norms by loss and scheme")


def _is_norms(columns: Any) -> bool:
    return isinstance(columns, dict) and all(
        scheme in list(Scheme) and isinstance(norm, int | float) for scheme, norm in columns.items()
    )


def stored_certificate(path: Path) -> dict[str, Any]:
    """`read_certificate`, or, where there is none to be read, one of outcome MISSING that says why: for whoever shows
    a checkpoint whether it is certified or not. A checkpoint may be without one for a moment, or forever where its run
    was killed between saving and certifying."""
    try:
        return read_certificate(path)
    except InsulaError as error:
        return {"outcome": Outcome.MISSING, "findings": [str(error)], "table": {}, "cosine": {}}


# --- gradients by part -----------------------------------------------------------------------------------------------


def _make_measure(
    config: ModelConfig, scheme: Scheme
) -> Callable[[Params, Batch, PRNGKeyArray], tuple[Norms, dict[str, Array]]]:
    """A program for the norms of one scheme, and, without insulation, the cosine of the two losses' gradients on each
    part (NaN where one is zero). It takes one forward pass, and one backward pass for each loss."""
    if scheme is Scheme.JOINT:
        config = config.with_objective(knowledge_insulation=False)
    if scheme is Scheme.FROZEN:
        config = config.with_objective(knowledge_insulation=False, freeze_backbone=True)

    def losses(params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[LossName, Array]:
        if scheme is Scheme.EMBEDDINGS:
            return {LossName.FLOW: _flow_stopped_at_embeddings(params, config, batch, rng)}
        _, metrics = compute_loss(params, config, batch, rng)
        return {loss: metrics[loss] for loss in LossName}

    def measure(params: Params, batch: Batch, rng: PRNGKeyArray) -> tuple[Norms, dict[str, Array]]:
        values, pull = jax.vjp(lambda p: losses(p, batch, rng), params)

        gradients: dict[LossName, dict[str, Any]] = {}
        for loss in values:
            seed = {other: jnp.where(other == loss, 1.0, 0.0).astype(value.dtype) for other, value in values.items()}
            gradients[loss] = _by_part(pull(seed)[0], config)

        norms = {loss: {part: _l2_norm(tree) for part, tree in parts.items()} for loss, parts in gradients.items()}
        if scheme is not Scheme.JOINT:
            return norms, {}

        flow, fast = gradients[LossName.FLOW], gradients[LossName.FAST]
        return norms, {part: _cosine(flow[part], fast[part]) for part in flow}

    return compiled_quickly(measure)


def _flow_stopped_at_embeddings(params: Params, config: ModelConfig, batch: Batch, rng: PRNGKeyArray) -> Array:
    """The mistake: no gradient into vision and embedding, all of it into every layer of the backbone."""
    x, token_mask, block = embed(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
    prefix = run_layers(params.backbone, config, freeze(x), token_mask, block)
    memory = insulate(prefix, config.num_memory, stop=False)
    return expert_loss(params.expert, config, memory, batch, rng)


def _by_part(gradient: Params, config: ModelConfig) -> dict[str, Any]:
    """The gradient's trees under their parts' names: layers one by one, the action head apart from its expert."""
    backbone = gradient.backbone
    # Layers are stacked on a leading axis.
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], backbone.layers) for i in range(config.backbone.depth)]

    expert = {field.name: getattr(gradient.expert, field.name) for field in dataclasses.fields(gradient.expert)}
    head = expert.pop("action_out")

    trees = (gradient.vision, backbone.embedding, *layers, backbone.norm, expert, head)
    return dict(zip(part_names(config), trees, strict=True))


def _l2_norm(tree: Any) -> Array:
    """√Σx², a scalar."""
    # Relative to the largest entry: squares of small gradients vanish in float32 and would look like exact zeros.
    unit = _unit(tree)
    return unit * jnp.sqrt(sum((jnp.sum(jnp.square(leaf / unit)) for leaf in _leaves(tree)), jnp.zeros(())))


def _cosine(one: Any, other: Any) -> Array:
    """Of the angle between two gradients, a scalar. NaN where either is zero."""
    units = _unit(one), _unit(other)

    # Each in its own unit, as in `_l2_norm`: one loss's gradients may be far smaller than the other's.
    product = sum(
        (jnp.sum(a / units[0] * (b / units[1])) for a, b in zip(_leaves(one), _leaves(other), strict=True)),
        jnp.zeros(()),
    )

    lengths = _l2_norm(one) / units[0] * (_l2_norm(other) / units[1])
    # `where` twice: a division by zero would be NaN in the branch that is not taken, too.
    return jnp.where(lengths > 0, product / jnp.where(lengths > 0, lengths, 1.0), jnp.nan)


def _unit(tree: Any) -> Array:
    """The largest magnitude, or 1 where all are zero."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in _leaves(tree)]))
    return jnp.where(largest > 0, largest, 1.0)


def _leaves(tree: Any) -> list[Array]:
    return [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
