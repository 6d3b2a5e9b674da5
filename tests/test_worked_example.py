"""Which mask does which loss use? 2 × 256 image tokens, 4 prompt tokens, 48 scored FAST tokens: 564 positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import jit

from insula.losses import compute_loss, flow_matching_loss, masked_mean, scored_tokens
from insula.model.backbone import run_backbone
from insula.model.config import TINY, TransformerConfig, VisionConfig
from insula.model.params import init_params
from insula.testing import fake_batch, randomize
from insula.tokens.masks import make_attn_mask, visible_to_expert

PROMPT, FAST, IMAGES = 4, 48, 512
CONFIG = dataclasses.replace(
    TINY,
    name="example",
    vision=VisionConfig(image_size=32, patch_sizes=(2,), stem_widths=(), width=8, depth=1, mlp_dim=8, num_heads=2),
    backbone=TransformerConfig(8, 1, 8, 2, 1, 4),
    expert=TransformerConfig(8, 1, 8, 2, 1, 4),
    vocab_size=64,
    max_prompt_len=PROMPT,
    max_fast_len=FAST,
    horizon=16,
    action_dim=8,
).with_objective(ki_fast_loss_weight=0.3, flow_samples=1)


@pytest.fixture(scope="module")
def example():
    params = randomize(init_params(CONFIG, jax.random.key(0)), jax.random.key(1))
    batch = fake_batch(CONFIG, 2, jax.random.key(2))
    suffix = jnp.broadcast_to(jnp.arange(PROMPT + FAST) >= PROMPT, (2, PROMPT + FAST))
    observation = dataclasses.replace(batch.observation, token_mask=jnp.ones_like(suffix))
    return params, dataclasses.replace(batch, observation=observation, ar_mask=suffix, loss_mask=suffix)


def test_token_loss_scores_exactly_the_last_48_of_564(example) -> None:
    params, batch = example
    targets = scored_tokens(batch, CONFIG)
    assert targets.valid.all() and targets.labels.shape == (2, 48)
    np.testing.assert_array_equal(targets.labels, batch.observation.tokens[:, -48:])
    np.testing.assert_array_equal(
        targets.positions[0], np.arange(515, 563)
    )  # each is predicted by the position before it

    def hidden(read: np.ndarray | None) -> np.ndarray:
        run = jit(lambda p: run_backbone(p.vision, p.backbone, CONFIG, batch.observation, batch.ar_mask, read).hidden)
        return run(params)

    assert hidden(None).shape[1] == 564
    np.testing.assert_allclose(hidden(targets.positions), hidden(None)[:, 515:563], atol=1e-5)


def test_losses_and_their_sum(example) -> None:
    params, batch = example
    total, metrics = jit(lambda p: compute_loss(p, CONFIG, batch, jax.random.key(3)))(params)
    assert float(metrics["scored_tokens"]) == 96
    np.testing.assert_allclose(total, metrics["flow"] + 0.3 * metrics["fast"], rtol=1e-6)

    error = jax.random.normal(jax.random.key(4), (2, 16, 8))
    real = jnp.ones((2, 16, 8), bool)
    per_step = flow_matching_loss(error, jnp.zeros_like(error), real)
    assert per_step.shape == (2, 16)
    np.testing.assert_allclose(masked_mean(per_step, real), np.square(error).mean(), rtol=1e-5)


@pytest.mark.parametrize("nothing", ["no tokenized prompt", "no scored token"])
def test_nothing_to_score_is_zero_and_finite(example, nothing: str) -> None:
    params, batch = example
    if nothing == "no scored token":
        batch = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    else:
        bare = dataclasses.replace(batch.observation, tokens=None, token_mask=None)
        batch = dataclasses.replace(batch, observation=bare, ar_mask=None, loss_mask=None)
    run = jit(jax.value_and_grad(lambda p: compute_loss(p, CONFIG, batch, jax.random.key(3)), has_aux=True))
    (total, metrics), gradients = run(params)
    assert float(metrics["fast"]) == 0 and float(metrics["scored_tokens"]) == 0
    assert float(total) == float(metrics["flow"]) > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))


def test_masks_look_as_drawn() -> None:
    """Image, image, prompt, two FAST tokens, padding."""
    real = jnp.array([[1, 1, 1, 1, 1, 0]], bool)
    ar = jnp.array([[0, 0, 0, 1, 1, 1]], bool)
    drawn = """
        # # # . . .
        # # # . . .
        # # # . . .
        # # # # . .
        # # # # # .
        . . . . . .
    """
    expected = np.array([[cell == "#" for cell in row.split()] for row in drawn.split("\n") if row.strip()])
    np.testing.assert_array_equal(make_attn_mask(real, ar)[0], expected)
    np.testing.assert_array_equal(visible_to_expert(real, ar)[0], [True, True, True, False, False, False])
    bidirectional = make_attn_mask(real, jnp.zeros_like(ar))[0]
    assert not np.array_equal(bidirectional, expected)
