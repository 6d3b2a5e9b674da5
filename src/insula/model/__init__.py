"""The model: vision encoder, backbone, insulation, action expert, and the parameters that tie them together."""

import dataclasses
from typing import Any

import jax

from insula.model import backbone, expert, vision
from insula.model.config import Config
from insula.model.weights import initialise, is_weight
from insula.shapes import PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """All parameters, by part. Parts are what is clipped, optimised and frozen separately."""

    vision: vision.Vision
    backbone: backbone.Backbone
    expert: expert.Expert


def weight_table(config: Config) -> Params:
    """The same tree with a `Weight` (shape, axes, start) at each leaf."""
    return Params(vision.weights(config), backbone.weights(config), expert.weights(config))


def init_params(config: Config, rng: PRNGKeyArray) -> Params:
    """Fresh float32 parameters. adaRMS starts at zero, so the expert starts as the identity on its residual stream."""
    return jax.jit(lambda key: initialise(weight_table(config), key))(rng)  # one program, not one per weight


def abstract_params(config: Config) -> Params:
    """Shapes and dtypes only: a 3 B model costs nothing to look at."""
    table = weight_table(config)
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, "float32"), table, is_leaf=is_weight)


def count_params(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
