"""The insulation certificate: how much of each loss's gradient reaches each part of a model, insulated and not.

    part              flow loss          flow loss, control    token loss
    vision            0 exactly          > 0                   > 0
    embedding         0 exactly          > 0                   > 0
    backbone layer i  0 exactly          > 0                   > 0
    final norm        0 exactly          0: nothing leads there > 0
    expert            > 0                > 0                   0 exactly
    action head       > 0                > 0                   0 exactly

The token head has no row: it is the embedding, once more.

A zero alone proves nothing: adaRMS gates start at zero, so an untrained model shows zeros under any scheme. Hence the
control, the very same loss without insulation, which must not be zero where insulation is claimed.

Every checkpoint of a run holds one (`certificate.json`), measured on these very weights.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from insula.batch import Batch
from insula.errors import InsulationError
from insula.files import read_json, write_json
from insula.losses import compute_loss, expert_loss
from insula.model.backbone import embed, run_layers
from insula.model.config import ModelConfig
from insula.model.insulation import freeze, insulate
from insula.model.params import Params
from insula.shapes import Array, PRNGKeyArray

LOSSES = ("flow", "fast")
Scheme = Literal["insulated", "joint", "embeddings", "frozen"]
"""insulated: the gradient stops at the keys and values the expert reads. joint: nowhere. embeddings: at the prefix'
embeddings only, a common mistake, since every layer makes keys and values with its own weights. frozen: the backbone
learns from neither loss."""
SUFFIX: dict[Scheme, str] = {
    "insulated": "",
    "joint": "_control",
    "embeddings": "_embeddings",
    "frozen": "_frozen",
}
PROOF: tuple[Scheme, ...] = ("insulated", "joint")
FINAL_NORM = "final norm"
EXPERT = ("expert", "action head")
Outcome = Literal["holds", "off", "leaks", "vacuous", "not finite"]
GradientTable = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Proof:
    """`table[part][loss + SUFFIX[scheme]]`: gradient norms, rows from pixels to actions. `cosine[part]`: of the two
    losses' gradients without insulation, None where one is zero. `findings` says what spoils the proof, if anything.

    holds: every zero is exact, every control is not. off: it would, but this model trains without insulation, so that
    its flow loss goes where the control goes. leaks: a gradient is there that must not be. vacuous: a control
    is zero, so the zeros beside it show nothing. not finite: there is NaN or infinity.
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
        return {
            "outcome": self.outcome,
            "findings": list(self.findings),
            "table": self.table,
            "cosine": self.cosine,
        }


def require(outcome: str, findings: Sequence[str]) -> None:
    """Raises InsulationError unless insulation holds."""
    if outcome != "holds":
        raise InsulationError(f"knowledge insulation: {outcome}; " + "; ".join(findings))


Prover = Callable[[Params, Batch, PRNGKeyArray], Proof]


def make_prover(config: ModelConfig, schemes: tuple[Scheme, ...] = PROOF) -> Prover:
    """A function that measures and judges, compiled once. Give it trained or randomized parameters; fresh ones come out
    as "vacuous". It measures in float32, whatever the config computes in. `freeze_backbone` and the freezing of what
    LoRA leaves alone are lifted in all schemes but "frozen": zeros are to come from insulation. So is
    `knowledge_insulation=False`, but then a proof that holds is "off"."""
    free = (
        dataclasses.replace(config, lora=None)
        .with_objective(
            freeze_backbone=False,
            ki_fast_loss_weight=config.objective.ki_fast_loss_weight or 1.0,
            knowledge_insulation=True,
        )
        .with_compute(dtype="float32", scan_layers=True)
    )
    measures = {scheme: _measure(free, scheme) for scheme in schemes}

    def measure(params: Params, batch: Batch, rng: PRNGKeyArray) -> Proof:
        columns: dict[str, dict[str, float]] = {}
        for scheme, norms_of in measures.items():
            for name, norms in jax.device_get(norms_of(params, batch, rng)).items():
                columns[name + SUFFIX[scheme]] = {part: float(norm) for part, norm in norms.items()}
        cosine = {
            part: None if math.isnan(value) else value for part, value in columns.pop("cosine_control", {}).items()
        }
        columns = {name: norms for name, norms in columns.items() if not name.startswith("cosine")}
        order = sorted(columns, key=lambda name: not name.startswith("flow"))
        table = {part: {name: columns[name][part] for name in order} for part in part_names(config)}
        outcome, findings = judge(table)
        if outcome == "holds" and config.objective.flow_reaches_backbone:
            reached = f"vision, norm {table['vision']['flow_control']:.3g}, and all of the backbone"
            outcome, findings = "off", (f"knowledge_insulation is off: the flow loss reaches {reached}",)
        return Proof(table, outcome, findings, cosine)

    return measure


def prove(
    params: Params, config: ModelConfig, batch: Batch, rng: PRNGKeyArray, schemes: tuple[Scheme, ...] = PROOF
) -> Proof:
    """`make_prover` for once."""
    return make_prover(config, schemes)(params, batch, rng)


def judge(table: GradientTable) -> tuple[Outcome, tuple[str, ...]]:
    """What a table shows, and the entries that show it."""
    entries = [(part, column, norm) for part, row in table.items() for column, norm in row.items()]
    broken = [f"{c} on {p} is {n}" for p, c, n in entries if not math.isfinite(n)]
    leaks = [f"{c} reaches {p}, norm {n:.3g}" for p, c, n in entries if _must_be_zero(p, c) and n != 0]
    vacuous = [f"{c} on {p} is zero, too" for p, c, n in entries if _must_reach(p, c) and n == 0]
    outcomes: list[tuple[Outcome, list[str]]] = [("not finite", broken), ("leaks", leaks), ("vacuous", vacuous)]
    return next(((outcome, tuple(found)) for outcome, found in outcomes if found), ("holds", ()))


def _must_be_zero(part: str, column: str) -> bool:
    if column.endswith("_frozen") and part not in EXPERT:
        return True
    return (column == "flow" and part not in EXPERT) or (column.startswith("fast") and part in EXPERT)


def _must_reach(part: str, column: str) -> bool:
    """The final norm comes after the last keys and values: no scheme leads the flow loss there."""
    if part in EXPERT:
        return column.startswith("flow")
    return column in ("fast", "fast_control") or (column == "flow_control" and part != FINAL_NORM)


def part_names(config: ModelConfig) -> tuple[str, ...]:
    """Rows of the table, from pixels to actions."""
    layers = (f"backbone layer {i}" for i in range(config.backbone.depth))
    return ("vision", "embedding", *layers, FINAL_NORM, *EXPERT)


def write_certificate(path: Path, proof: Proof, config: ModelConfig, about: dict[str, Any]) -> None:
    """The proof, what the run was trained with, and `about`: step, samples, seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ("knowledge_insulation", "ki_fast_loss_weight", "freeze_backbone")
    trained_with = {name: getattr(config.objective, name) for name in names}
    written = {"insula": version("insula"), "model": config.name, **about, "trained_with": trained_with}
    write_json(path, written | proof.to_json())


def read_certificate(path: Path) -> dict[str, Any]:
    """What `write_certificate` wrote. Raises FileNotFoundError where there is none, ValueError where it is none."""
    return read_json(path, "outcome", "findings", "table")


def _measure(
    config: ModelConfig, scheme: Scheme
) -> Callable[[Params, Batch, PRNGKeyArray], dict[str, dict[str, Array]]]:
    """`[loss][part]` norms and `["cosine"][part]`, from one forward pass and one backward pass for each loss."""
    changes: dict[Scheme, dict[str, bool]] = {
        "joint": {"knowledge_insulation": False},
        "frozen": {"knowledge_insulation": False, "freeze_backbone": True},
    }
    config = config.with_objective(**changes.get(scheme, {}))

    def losses(params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[str, Array]:
        if scheme == "embeddings":
            return {"flow": _flow_stopped_at_embeddings(params, config, batch, rng)}
        _, metrics = compute_loss(params, config, batch, rng)
        return {name: metrics[name] for name in LOSSES}

    def measure(params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[str, dict[str, Array]]:
        values, pull = jax.vjp(lambda p: losses(p, batch, rng), params)
        gradients = {}
        for name in values:
            seed = {other: jnp.where(other == name, 1.0, 0.0).astype(value.dtype) for other, value in values.items()}
            gradients[name] = _parts(pull(seed)[0], config)
        found = {name: {part: _norm(tree) for part, tree in parts.items()} for name, parts in gradients.items()}
        if len(gradients) == len(LOSSES):
            pairs = zip(*(gradients[name].items() for name in LOSSES), strict=True)
            found["cosine"] = {part: _cosine(one, other) for (part, one), (_, other) in pairs}
        return found

    return compiled_quickly(measure)


def compiled_quickly(function: Callable) -> Callable:
    """For what runs a few times: on a CPU compiled in half the time rather than well."""
    options = (
        {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        if jax.default_backend() == "cpu"
        else None
    )
    return jax.jit(function, compiler_options=options)


def _flow_stopped_at_embeddings(params: Params, config: ModelConfig, batch: Batch, rng: PRNGKeyArray) -> Array:
    """The mistake: no gradient into vision and embedding, all of it into every layer of the backbone."""
    x, token_mask, block = embed(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
    prefix = run_layers(params.backbone, config, freeze(x), token_mask, block)
    memory = insulate(prefix, config.num_memory, stop=False)
    return expert_loss(params.expert, config, memory, batch, rng)


def _parts(gradient: Params, config: ModelConfig) -> dict[str, Any]:
    backbone = gradient.backbone
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], backbone.layers) for i in range(config.backbone.depth)]
    expert = {field.name: getattr(gradient.expert, field.name) for field in dataclasses.fields(gradient.expert)}
    head = expert.pop("action_out")
    trees = (gradient.vision, backbone.embedding, *layers, backbone.norm, expert, head)
    return dict(zip(part_names(config), trees, strict=True))


def _norm(tree: Any) -> Array:
    """√Σx², taken relative to the largest entry: squares of small gradients would vanish and look like zeros."""
    unit = _unit(tree)
    return unit * jnp.sqrt(sum((jnp.sum(jnp.square(leaf / unit)) for leaf in _leaves(tree)), jnp.zeros(())))


def _cosine(one: Any, other: Any) -> Array:
    """NaN where either is zero."""
    units = _unit(one), _unit(other)
    product = sum(
        (jnp.sum(a / units[0] * (b / units[1])) for a, b in zip(_leaves(one), _leaves(other), strict=True)),
        jnp.zeros(()),
    )
    lengths = _norm(one) / units[0] * (_norm(other) / units[1])
    return jnp.where(lengths > 0, product / jnp.where(lengths > 0, lengths, 1.0), jnp.nan)


def _unit(tree: Any) -> Array:
    """The largest magnitude, or 1 where all are zero."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in _leaves(tree)]))
    return jnp.where(largest > 0, largest, 1.0)


def _leaves(tree: Any) -> list[Array]:
    return [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
