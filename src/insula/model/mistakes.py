"""Mistakes that public implementations make, made here on purpose: a study can measure what they cost.

    stop_at_embeddings    the gradient stops below the first layer: each layer's own weights keep all of it
    visible_fast          the expert reads the FAST tokens of the very actions that it is to find

Only a config that asks for one by name comes here, and no model that does is certified as insulated.
"""

import jax.numpy as jnp

from insula.batch import Batch
from insula.errors import InputError
from insula.model.backbone import BackboneOutput, embed, run_layers
from insula.model.config import ModelConfig
from insula.model.insulation import Memory, freeze, insulate, scale_gradient
from insula.model.params import Params
from insula.shapes import Array, Float
from insula.tokens import masks


def mistaken_memory(
    params: Params, config: ModelConfig, batch: Batch, prefix: BackboneOutput, gamma: float | Float[Array, ""]
) -> Memory:
    """What `insulate` returns, with the mistake that the objective names. Raises InputError where it names none."""
    if config.objective.mistake == "stop_at_embeddings":
        # A second pass: in the first one, embeddings have the token loss's gradient, as they shall.
        x, token_mask, causal = embed(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
        return insulate(run_layers(params.backbone, config, freeze(x), token_mask, causal), config.num_memory, gamma)

    if config.objective.mistake == "visible_fast":
        keys, values = scale_gradient((prefix.keys, prefix.values), gamma)
        # Positions go on from the prompt all the same, as they do when there are no FAST tokens.
        visible = masks.visible_to_expert(prefix.token_mask, prefix.ar_mask)
        return Memory(keys, values, prefix.token_mask, jnp.sum(visible, axis=1, dtype=jnp.int32))

    raise InputError(f"objective: mistake is {config.objective.mistake!r}: there is none to make")
