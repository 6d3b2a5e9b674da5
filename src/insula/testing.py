"""Helpers for anyone's tests: a batch that fits a config, and parameters without a single comfortable zero.

Beside every zero or equality that a test asserts belongs a control that is not, with these parameters.
"""

import itertools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp

from insula.batch import Batch, Observation
from insula.model.config import ModelConfig
from insula.shapes import Array, Leaf, PRNGKeyArray

_Tree = TypeVar("_Tree")


def randomize(params: _Tree, rng: PRNGKeyArray) -> _Tree:
    """Every leaf drawn again, about as large as a trained one. Fresh parameters hide leaks: adaRMS gates start at
    zero, so *every* scheme would show a zero gradient."""
    leaves, tree = jax.tree.flatten(params)
    ends = list(itertools.accumulate(math.prod(leaf.shape) for leaf in leaves))
    values = jnp.split(jax.random.normal(rng, ends[-1:]), ends[:-1])  # one program for all leaves, not one each

    def draw(leaf: Leaf, value: Array) -> Array:
        # The last axis but one is the inputs' of a matrix, or of layers of it: outputs have the variance of inputs.
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) >= 2 else 0.2
        return (scale * value).reshape(leaf.shape).astype(leaf.dtype)

    return jax.tree.unflatten(tree, [draw(leaf, value) for leaf, value in zip(leaves, values, strict=True)])


def fake_batch(config: ModelConfig, batch_size: int, rng: PRNGKeyArray) -> Batch:
    """Random images, prompts and FAST tokens of differing lengths (EOS unscored, then padding), random chunks, the
    last of which ends one step past its episode."""
    image, prompt, fast, token, action, state = jax.random.split(rng, 6)
    size, length = config.vision.image_size, config.max_token_len
    shape = (batch_size, size, size, 3)
    images = {
        name: jax.random.randint(key, shape, 0, 256, jnp.int32).astype(jnp.uint8)
        for name, key in zip(config.cameras, jax.random.split(image, len(config.cameras)), strict=True)
    }
    prompt_len = jax.random.randint(prompt, (batch_size, 1), -(-config.max_prompt_len // 2), config.max_prompt_len + 1)
    fast_len = jax.random.randint(fast, (batch_size, 1), -(-config.max_fast_len // 2), config.max_fast_len)

    # Text is prompt, FAST tokens, EOS, then padding: one after the other, with no gap (insula.batch).
    column = jnp.arange(length)[None]
    end = prompt_len + fast_len
    observation = Observation(
        images=images,
        image_mask={name: jnp.ones(batch_size, bool) for name in config.cameras},
        state=jax.random.uniform(state, (batch_size, config.state_dim), minval=-1, maxval=1),
        tokens=jnp.where(column <= end, jax.random.randint(token, (batch_size, length), 0, config.vocab_size), 0),
        token_mask=column <= end,
    )

    return Batch(
        observation=observation,
        actions=jax.random.normal(action, (batch_size, config.horizon, config.action_dim)),
        # One padded step, so that its mask has something to hide; not where it would be the chunk's only one.
        action_is_pad=jnp.zeros((batch_size, config.horizon), bool).at[-1, -1].set(config.horizon > 1),
        action_dim_mask=jnp.ones((batch_size, config.action_dim), bool),
        ar_mask=(column >= prompt_len) & (column <= end),
        loss_mask=(column >= prompt_len) & (column < end),
    )
