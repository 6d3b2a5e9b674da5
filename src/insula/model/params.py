"""The model: vision encoder, backbone, insulation, action expert, and the parameters that tie them together."""

import dataclasses
from typing import Any

import jax

from insula.errors import InputError
from insula.model import backbone, expert, lora, vision
from insula.model.config import ModelConfig
from insula.model.weights import initialize, is_weight
from insula.shapes import PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """All parameters, by part. Parts are what is clipped, optimized and frozen separately."""

    vision: vision.Vision
    backbone: backbone.Backbone
    expert: expert.Expert


def weight_table(config: ModelConfig) -> Params:
    """The same tree with a `Weight` (shape, axes, start) at each leaf."""
    table = Params(vision.vision_weights(config), backbone.backbone_weights(config), expert.expert_weights(config))
    if config.lora is None:
        return table

    return dataclasses.replace(table, **{p: lora.adapt(getattr(table, p), config.lora) for p in config.lora.parts})


def trainable(config: ModelConfig) -> Params:
    """Which parameters learn, as a prefix of their tree: one bool for a part, or for each leaf of a part under LoRA."""
    # Vision belongs to the backbone here: the flow loss reaches both in the same way or not at all.
    whole = Params(not config.objective.freeze_backbone, not config.objective.freeze_backbone, True)  # type: ignore[arg-type]
    if config.lora is None:
        return whole

    table = weight_table(config)
    return dataclasses.replace(whole, **{part: lora.trained(getattr(table, part)) for part in config.lora.parts})


def init_params(config: ModelConfig, rng: PRNGKeyArray) -> Params:
    """Fresh float32 parameters. adaRMS starts at zero, so the expert starts as the identity on its residual stream."""
    # One program: without `jit` every weight's shape would compile one of its own.
    return jax.jit(lambda key: initialize(weight_table(config), key))(rng)


def add_lora(params: Params, config: ModelConfig, rng: PRNGKeyArray) -> Params:
    """Plain parameters, read from a file perhaps, as the bases of `config.lora`: the same model until a step is made.

    The inverse is `lora.merge`. Raises InputError where there is no LoRA to add, or some already.
    """
    if config.lora is None or any(map(lora.is_lora, jax.tree.leaves(params, is_leaf=lora.is_lora))):
        there = "config has lora=None" if config.lora is None else "parameters are under LoRA already; merge them first"
        raise InputError(f"add_lora, config {config.name!r}: {there}")

    def updates(weight: Any) -> Any:
        return dataclasses.replace(weight, base=None) if lora.is_lora(weight) else None

    # Only a and b are drawn: the bases are there already, and drawing them too would hold a second model for a moment.
    table = jax.tree.map(updates, weight_table(config), is_leaf=lambda x: lora.is_lora(x) or is_weight(x))
    fresh = jax.jit(lambda key: initialize(table, key))(rng)

    # `fresh` has None, a node without leaves, where a plain parameter goes.
    return jax.tree.map(
        lambda update, base: base if update is None else dataclasses.replace(update, base=base),
        fresh,
        params,
        is_leaf=lambda x: x is None or lora.is_lora(x),
    )


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes only: a 3 B model costs nothing to look at."""
    table = weight_table(config)
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, "float32"), table, is_leaf=is_weight)


def count_params(tree: Any) -> int:
    """How many numbers a tree holds: of arrays, or of the shapes of `abstract_params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
