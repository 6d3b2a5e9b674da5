"""The insulation proof: how much of each loss's gradient reaches each part of a model, with and without insulation.

    part              flow loss          flow loss, control    token loss
    vision            0 exactly          > 0                   > 0
    embedding         0 exactly          > 0                   > 0
    backbone layer i  0 exactly          > 0                   > 0
    final norm        0 exactly          0: nothing leads there > 0
    expert            > 0                > 0                   0 exactly

A zero alone proves nothing: adaRMS gates start at zero, so an untrained model shows zeros under any scheme. Hence the
control, the very same loss without insulation, which must not be zero where insulation is claimed.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from insula.batch import Batch
from insula.losses import compute_loss
from insula.model import Params
from insula.model.config import Config
from insula.shapes import Array, PRNGKeyArray

LOSSES = ("flow", "fast")
EXPERT, FINAL_NORM = "expert", "final norm"
Outcome = Literal["holds", "leaks", "vacuous", "not finite"]
GradientTable = dict[str, dict[str, float]]


class InsulationError(AssertionError):
    """Insulation is not what this model has, or this batch cannot show it."""


@dataclasses.dataclass(frozen=True)
class Proof:
    """`table[part][column]`: gradient norms, see `gradient_table`. `findings` says what spoils the proof, if anything.

    holds: every zero is exact, every control is not. leaks: a gradient is there that must not be. vacuous: a control
    is zero, so the zeros beside it show nothing. not finite: there is NaN or infinity.
    """

    table: GradientTable
    outcome: Outcome
    findings: tuple[str, ...]

    def check(self) -> "Proof":
        """Itself. Raises InsulationError unless it holds."""
        if self.outcome != "holds":
            raise InsulationError(f"knowledge insulation: {self.outcome}; " + "; ".join(self.findings))
        return self

    def to_json(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "findings": list(self.findings), "table": self.table}


def prove(params: Params, config: Config, batch: Batch, rng: PRNGKeyArray) -> Proof:
    """Measure and judge. Use trained or randomised parameters; fresh ones come out as "vacuous"."""
    table = gradient_table(params, config, batch, rng)
    return Proof(table, *judge(table))


def judge(table: GradientTable) -> tuple[Outcome, tuple[str, ...]]:
    """What a table shows, and the entries that show it."""
    entries = [(part, column, norm) for part, row in table.items() for column, norm in row.items()]
    broken = [f"{c} on {p} is {n}" for p, c, n in entries if not math.isfinite(n)]
    leaks = [f"{c} reaches {p}, norm {n:.3g}" for p, c, n in entries if _must_be_zero(p, c) and n != 0]
    vacuous = [f"{c} on {p} is zero, too" for p, c, n in entries if _must_reach(p, c) and n == 0]
    outcomes: list[tuple[Outcome, list[str]]] = [("not finite", broken), ("leaks", leaks), ("vacuous", vacuous)]
    return next(((outcome, tuple(found)) for outcome, found in outcomes if found), ("holds", ()))


def _must_be_zero(part: str, column: str) -> bool:
    return (column == "flow" and part != EXPERT) or (column.startswith("fast") and part == EXPERT)


def _must_reach(part: str, column: str) -> bool:
    """The final norm comes after the last keys and values: no scheme leads the flow loss there."""
    if part == EXPERT:
        return column.startswith("flow")
    return column.startswith("fast") or (column == "flow_control" and part != FINAL_NORM)


def gradient_table(params: Params, config: Config, batch: Batch, rng: PRNGKeyArray) -> GradientTable:
    """Norms of d loss / d part. Rows: vision, embedding, each backbone layer, final norm, expert.

    Columns: "flow" and "fast" with insulation, "flow_control" and "fast_control" without, all else the same; losses
    are unweighted. A norm is 0.0 exactly where every gradient entry is. `freeze_backbone` and the freezing of what LoRA
    leaves alone are lifted in all of them: zeros are to come from insulation.
    """
    free = dataclasses.replace(
        config,
        freeze_backbone=False,
        lora=None,
        ki_fast_loss_weight=config.ki_fast_loss_weight or 1.0,
        knowledge_insulation=True,
    )
    schemes = {"": free, "_control": dataclasses.replace(free, knowledge_insulation=False)}
    columns = {}
    for suffix, scheme in schemes.items():
        for name, norms in jax.device_get(_norms(params, scheme, batch, rng)).items():
            columns[name + suffix] = norms
    order = ("flow", "flow_control", "fast", "fast_control")
    return {part: {name: float(columns[name][part]) for name in order} for part in part_names(config)}


def part_names(config: Config) -> tuple[str, ...]:
    """Rows of the table, from pixels to actions."""
    layers = (f"backbone layer {i}" for i in range(config.backbone.depth))
    return ("vision", "embedding", *layers, FINAL_NORM, EXPERT)


def _norms(params: Params, config: Config, batch: Batch, rng: PRNGKeyArray) -> dict[str, dict[str, Array]]:
    """`[loss][part]`, from one forward pass and one backward pass for each loss."""

    # Run once, so compiled in half the time rather than well.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    @partial(jax.jit, compiler_options=options)
    def measure(params: Params, batch: Batch) -> dict[str, dict[str, Array]]:
        def losses(params: Params) -> dict[str, Array]:
            _, metrics = compute_loss(params, config, batch, rng)
            return {name: metrics[name] for name in LOSSES}

        values, pull = jax.vjp(losses, params)
        found = {}
        for name in LOSSES:
            seed = {other: jnp.where(other == name, 1.0, 0.0).astype(value.dtype) for other, value in values.items()}
            (gradient,) = pull(seed)
            found[name] = {part: _norm(tree) for part, tree in _parts(gradient, config).items()}
        return found

    return measure(params, batch)


def _parts(gradient: Params, config: Config) -> dict[str, Any]:
    backbone = gradient.backbone
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], backbone.layers) for i in range(config.backbone.depth)]
    trees = (gradient.vision, backbone.embedding, *layers, backbone.norm, gradient.expert)
    return dict(zip(part_names(config), trees, strict=True))


def _norm(tree: Any) -> Array:
    """√Σx², taken relative to the largest entry: squares of small gradients would vanish and look like zeros."""
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in leaves]))
    unit = jnp.where(largest > 0, largest, 1.0)
    return largest * jnp.sqrt(sum((jnp.sum(jnp.square(leaf / unit)) for leaf in leaves), jnp.zeros(())))
