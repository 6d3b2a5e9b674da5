"""What layers hand on in bfloat16, as on accelerators, whose programs are made here without one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from small import SMALL, VARIANTS, by_leaf, gradients, largest, loss, model, mostly_slow, prefix

from insula.decode.flow import sample_actions
from insula.losses import compute_loss
from insula.model import attention
from insula.model.config import ModelConfig
from insula.model.params import abstract_params
from insula.testing import fake_batch
from insula.train.optimizer import DEFAULT, make_optimizer
from insula.train.step import make_train_state, make_train_step

NARROW = SMALL.with_compute(dtype="bfloat16", stream="dtype")
WIDE = SMALL.with_compute(dtype="bfloat16", stream="float32")
ROUNDING = 2.0**-8
"""Of one number in bfloat16, relative."""
NARROWED = {
    name: dataclasses.replace(SMALL, **change).with_compute(dtype="bfloat16", stream="dtype")
    for name, change in VARIANTS.items()
}


def exact(seed: int, *shape: int) -> jax.Array:
    """Numbers that bfloat16 holds."""
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def test_attention_in_one_call_is_the_reference() -> None:
    """Of the same numbers, in bfloat16 and in float32, where nothing is rounded on the way."""
    q, k, v = exact(0, 2, 5, 4, 8), exact(1, 2, 7, 2, 8), exact(2, 2, 7, 2, 8)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, 5, 7)).at[:, :, 0].set(True)
    found = attention.attend(q, k, v, mask)
    wanted = attention.attend(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    assert found.dtype == jnp.bfloat16 and wanted.dtype == jnp.float32
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=4 * ROUNDING)

    other = attention.attend(q, k, v, ~mask)  # and it does tell masks apart
    assert np.abs(np.asarray(found - other, np.float32)).max() > 0.1


@pytest.mark.parametrize("samples", [1, 3])
def test_attention_with_memory_in_one_call_is_the_reference(samples: int) -> None:
    q, k, v = exact(0, 2, samples, 4, 4, 8), exact(1, 2, samples, 4, 2, 8), exact(2, 2, samples, 4, 2, 8)
    memory_k, memory_v = exact(3, 2, 6, 2, 8), exact(4, 2, 6, 2, 8)
    memory_mask = jnp.arange(6)[None] < jnp.array([[4], [6]])
    self_mask = jnp.tril(jnp.ones((4, 4), bool))
    arrays = (q, k, v, memory_k, memory_v)
    found = attention.attend_with_memory(*arrays, memory_mask, self_mask)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    wanted = attention.attend_with_memory(*wide, memory_mask, self_mask)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=4 * ROUNDING)

    # What is masked is hidden, to the last bit; what is not is read.
    hidden = attention.attend_with_memory(q, k, v, memory_k.at[0, 4:].set(9), memory_v, memory_mask, self_mask)
    assert np.array_equal(np.asarray(hidden), np.asarray(found))
    seen = attention.attend_with_memory(q, k, v, memory_k.at[0, 3:].set(9), memory_v, memory_mask, self_mask)
    assert not np.array_equal(np.asarray(seen), np.asarray(found))


def test_where_the_stream_is_narrow() -> None:
    """Keys, values and hidden states; losses never. On a CPU nothing is, unless it is asked for."""
    params, batch = model()
    assert prefix(params, NARROW, batch).keys.dtype == prefix(params, NARROW, batch).hidden.dtype == jnp.bfloat16
    auto = prefix(params, SMALL.with_compute(dtype="bfloat16"), batch)
    assert auto.keys.dtype == auto.values.dtype == jnp.float32

    # An accelerator's own choice, by its name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        found = jax.eval_shape(lambda p, b: loss_of(p, SMALL.with_compute(dtype="bfloat16"), b), params, batch)
        assert found[1].dtype == jnp.bfloat16 and found[0].dtype == jnp.float32
        found = jax.eval_shape(lambda p, b: loss_of(p, SMALL, b), params, batch)
        assert found[1].dtype == jnp.float32


def loss_of(params, config: ModelConfig, batch):
    """The loss, and the backbone's keys."""
    from insula.model.backbone import run_backbone

    keys = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask).keys
    return compute_loss(params, config, batch, jax.random.key(0))[0], keys


@pytest.mark.parametrize("variant", NARROWED)
def test_losses_are_those_of_a_wide_stream(variant: str) -> None:
    narrow = NARROWED[variant]
    params, batch = model(narrow)
    found, wanted = (loss(params, c, batch)[1] for c in (narrow, narrow.with_compute(stream="float32")))
    for name in ("flow", "fast"):
        assert found[name].dtype == jnp.float32
        assert 0 < abs(float(found[name]) / float(wanted[name]) - 1) < 0.05, name


@pytest.mark.parametrize("variant", mostly_slow(NARROWED, "one key head, scan"))
def test_no_gradient_crosses_in_a_narrow_stream(variant: str) -> None:
    """The zeros are exact in any precision; without insulation there are none."""
    config = NARROWED[variant]
    params, batch = model(config)
    found = gradients(params, config, batch)
    assert largest(found["flow"].vision) == largest(found["flow"].backbone) == largest(found["fast"].expert) == 0.0
    assert all(np.any(leaf != 0) for leaf in by_leaf(found["flow"].expert).values())
    leak = gradients(params, config.with_objective(knowledge_insulation=False), batch)["flow"]
    assert min(largest(leak.vision), largest(leak.backbone)) > 0


def test_gradients_point_the_same_way() -> None:
    params, batch = model()
    narrow, wide = (gradients(params, c, batch)["total"] for c in (NARROW, WIDE))
    for part in ("vision", "backbone", "expert"):
        a, b = (np.concatenate([leaf.ravel() for leaf in by_leaf(getattr(g, part)).values()]) for g in (narrow, wide))
        assert a.dtype == np.float32
        assert 0.99 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1 - 1e-9, part


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_accelerators(platform: str) -> None:
    """The train step and what acts are lowered for a platform that is not here, with a narrow stream."""
    config = NARROW.with_compute(scan_layers=True, remat="all")
    params = abstract_params(config)
    batch = jax.eval_shape(lambda: fake_batch(config, 2, jax.random.key(0)))
    optimizer = make_optimizer(DEFAULT, config, 10)
    step = make_train_step(config, optimizer, 0.99, jax.random.key(0))
    state = jax.eval_shape(lambda p: make_train_state(p, optimizer), params)
    trained = export.export(step, platforms=[platform])(state, batch)
    assert trained.platforms == (platform,)
    assert "bf16" in trained.mlir_module()

    noise = jax.ShapeDtypeStruct((2, config.horizon, config.action_dim), jnp.float32)
    act = jax.jit(lambda p, o, n: sample_actions(p, config, o, n))
    acting = export.export(act, platforms=[platform])(params, batch.observation, noise)
    assert [x.dtype for x in acting.out_avals] == [jnp.float32]
    assert acting.platforms == (platform,)
