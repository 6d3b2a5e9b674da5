"""Knowledge-insulated vision-language-action models: train, inspect, evaluate, serve.

config = insula.preset("tiny")
params = insula.init_params(config, jax.random.key(0))
total, metrics = insula.compute_loss(params, config, batch, jax.random.key(1))
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insula import testing as testing
    from insula.losses import compute_loss as compute_loss
    from insula.model.config import ModelConfig as ModelConfig
    from insula.model.config import preset as preset
    from insula.model.params import Params as Params
    from insula.model.params import init_params as init_params
    from insula.policy import Policy as Policy
    from insula.tokens.fast import FASTCodec as FASTCodec
    from insula.tokens.masks import make_attn_mask as make_attn_mask
    from insula.tokens.sequence import FASTTokenizer as FASTTokenizer

__version__ = version("insula")

_HOME = {
    "ModelConfig": "insula.model.config",
    "FASTCodec": "insula.tokens.fast",
    "FASTTokenizer": "insula.tokens.sequence",
    "Params": "insula.model.params",
    "Policy": "insula.policy",
    "compute_loss": "insula.losses",
    "init_params": "insula.model.params",
    "make_attn_mask": "insula.tokens.masks",
    "preset": "insula.model.config",
}
__all__ = [*_HOME, "testing"]


def __getattr__(name: str) -> Any:
    """Names load where they are used, so that `insula collect` need not wait for JAX."""
    if name == "testing":
        return importlib.import_module("insula.testing")
    if name not in _HOME:
        raise AttributeError(f"module 'insula' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
