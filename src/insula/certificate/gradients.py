"""Measuring: the norm of each loss's gradient on each part of a model, under each scheme."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from insula.batch import Batch, LossName
from insula.certificate.proof import Outcome, Proof, judge
from insula.certificate.table import PROOF_SCHEMES, GradientTable, Scheme, part_names
from insula.compile import compiled_quickly
from insula.losses import compute_loss
from insula.model.config import ModelConfig
from insula.model.objective import INSULATED, ObjectiveConfig
from insula.model.params import Params
from insula.shapes import Array, PRNGKeyArray

Norms = dict[LossName, dict[str, Any]]
"""`[loss][part]`: a gradient norm, on the device or as a float."""
LIFTED = ("flow_gradient_scale", "flow_gradient_end", "mistake")
"""Settings of an objective that only make sense where it is not insulated."""
Prover = Callable[[Params, Batch, PRNGKeyArray], Proof]


def make_prover(config: ModelConfig, schemes: Sequence[Scheme] = PROOF_SCHEMES) -> Prover:
    """A function that measures and judges, compiled once. Give it trained or randomized parameters: fresh ones come out
    as "vacuous". It measures in float32, whatever the config computes in.

    `freeze_backbone`, and the freezing of what LoRA leaves alone, are lifted in all schemes but FROZEN: the zeros are
    to come from insulation. `knowledge_insulation=False`, and a mistake that was asked for, are lifted too, but then a
    proof that holds is OFF.
    """
    # float32, so that nothing shown hangs on how products round. Scanned layers compile faster, 20 s in place of 35 s
    # for all schemes of the demo's model, and these programs run only a few times.
    free = (
        dataclasses.replace(config, lora=None)
        .with_objective(
            freeze_backbone=False,
            ki_fast_loss_weight=config.objective.ki_fast_loss_weight or 1.0,
            **{name: getattr(INSULATED, name) for name in ("knowledge_insulation", *LIFTED)},
        )
        .with_compute(dtype="float32", scan_layers=True, remat="all")
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
        if outcome is Outcome.HOLDS and (lifted := _lifted(config.objective, table)):
            outcome, findings = Outcome.OFF, lifted

        return Proof(table, outcome, findings, cosine)

    return measure


def _lifted(objective: ObjectiveConfig, table: GradientTable) -> tuple[str, ...]:
    """What of a training is not as it was measured."""
    lifted = []
    if objective.flow_reaches_backbone:
        control = table["vision"][LossName.FLOW][Scheme.JOINT]
        end = objective.flow_gradient_end
        gamma = f"{objective.gamma:g}" + ("" if end is None else f" to {end:g}")
        lifted.append(
            f"knowledge_insulation is off, γ is {gamma}: the flow loss reaches vision, norm {control:.3g} with γ = 1, "
            "and all of the backbone"
        )
    if objective.mistake != "none":
        lifted.append(f"the mistake {objective.mistake!r} is made, as was asked for")

    return tuple(lifted)


def prove(
    params: Params, config: ModelConfig, batch: Batch, rng: PRNGKeyArray, schemes: Sequence[Scheme] = PROOF_SCHEMES
) -> Proof:
    """`make_prover`, and what it makes used once."""
    return make_prover(config, schemes)(params, batch, rng)


def _table_row(part: str, norms: dict[Scheme, Norms]) -> dict[LossName, dict[Scheme, float]]:
    # EMBEDDINGS changes nothing for the token loss, so it was measured for the flow loss alone.
    return {
        loss: {scheme: float(found[loss][part]) for scheme, found in norms.items() if loss in found}
        for loss in LossName
    }


def _make_measure(
    config: ModelConfig, scheme: Scheme
) -> Callable[[Params, Batch, PRNGKeyArray], tuple[Norms, dict[str, Array]]]:
    """A program for the norms of one scheme, and, without insulation, the cosine of the two losses' gradients on each
    part (NaN where one is zero). It takes one forward pass, and one backward pass for each loss."""
    # INSULATED is the config as it comes: `compute_loss` itself is measured, not a copy of it.
    if scheme is Scheme.JOINT:
        config = config.with_objective(knowledge_insulation=False)

    if scheme is Scheme.EMBEDDINGS:
        config = config.with_objective(knowledge_insulation=False, mistake="stop_at_embeddings")

    # Frozen must be enough by itself, so insulation is not there to help.
    if scheme is Scheme.FROZEN:
        config = config.with_objective(knowledge_insulation=False, freeze_backbone=True)

    def losses(params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[LossName, Array]:
        _, metrics = compute_loss(params, config, batch, rng)
        measured = (LossName.FLOW,) if scheme is Scheme.EMBEDDINGS else LossName
        return {loss: metrics[loss] for loss in measured}

    def measure(params: Params, batch: Batch, rng: PRNGKeyArray) -> tuple[Norms, dict[str, Array]]:
        values, pull = jax.vjp(lambda p: losses(p, batch, rng), params)

        # One backward pass a loss over the same forward pass. Both in one, by `vmap` over the seeds, saved nothing.
        gradients: dict[LossName, dict[str, Any]] = {}
        for loss in values:
            seed = {other: jnp.where(other == loss, 1.0, 0.0).astype(value.dtype) for other, value in values.items()}
            gradients[loss] = _by_part(pull(seed)[0], config)

        norms = {loss: {part: _l2_norm(tree) for part, tree in parts.items()} for loss, parts in gradients.items()}
        # Insulated, one of the two is zero on every part, and an angle to nothing does not exist.
        if scheme is not Scheme.JOINT:
            return norms, {}

        flow, fast = gradients[LossName.FLOW], gradients[LossName.FAST]
        return norms, {part: _cosine(flow[part], fast[part]) for part in flow}

    return compiled_quickly(measure)


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
    # `where` twice: a division by zero would be NaN even in the branch that is not taken.
    return jnp.where(lengths > 0, product / jnp.where(lengths > 0, lengths, 1.0), jnp.nan)


def _unit(tree: Any) -> Array:
    """The largest magnitude, or 1 where all are zero."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in _leaves(tree)]))
    return jnp.where(largest > 0, largest, 1.0)


def _leaves(tree: Any) -> list[Array]:
    # float32 whatever the parameters are: sums of squares over millions of entries need it.
    return [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
