"""Presets, sizes, settings, and arithmetic that must not depend on how depth is walked or products are read."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import CLOSE, SMALL, VARIANTS, by_leaf, difference, draws, gradients, jit, largest, loss, model, velocity

import insula
from insula.losses import compute_loss
from insula.model.attention import attend_with_memory, memory_weights
from insula.model.config import PI0, PI05, PRESETS, config_from_dict, preset
from insula.model.params import abstract_params, count_params, init_params, weight_table
from insula.model.vision import encode_images
from insula.model.weights import is_weight
from insula.testing import fake_batch

# π0.5's tensors as openpi's checkpoints hold them, and what each is here.
TEXT = {
    "llm/embedder/input_embedding": (257152, 2048),
    "llm/layers/attn/q_einsum/w": (18, 8, 2048, 256),
    "llm/layers/attn/kv_einsum/w": (18, 2, 1, 2048, 256),
    "llm/layers/attn/attn_vec_einsum/w": (18, 8, 256, 2048),
    "llm/layers/mlp/gating_einsum": (18, 2, 2048, 16384),
    "llm/layers/mlp/linear": (18, 16384, 2048),
    "llm/layers/pre_attention_norm/scale": (18, 2048),
    "llm/layers/pre_ffw_norm/scale": (18, 2048),
    "llm/final_norm/scale": (2048,),
}
EXPERT = {
    "llm/layers/attn/q_einsum_1/w": (18, 8, 1024, 256),
    "llm/layers/attn/kv_einsum_1/w": (18, 2, 1, 1024, 256),
    "llm/layers/attn/attn_vec_einsum_1/w": (18, 8, 256, 1024),
    "llm/layers/mlp_1/gating_einsum": (18, 2, 1024, 4096),
    "llm/layers/mlp_1/linear": (18, 4096, 1024),
    "llm/layers/pre_attention_norm_1/Dense_0/kernel": (18, 1024, 3072),
    "llm/layers/pre_attention_norm_1/Dense_0/bias": (18, 3072),
    "llm/layers/pre_ffw_norm_1/Dense_0/kernel": (18, 1024, 3072),
    "llm/layers/pre_ffw_norm_1/Dense_0/bias": (18, 3072),
    "llm/final_norm_1/Dense_0/kernel": (1024, 3072),
    "llm/final_norm_1/Dense_0/bias": (3072,),
    "action_in_proj/kernel": (32, 1024),
    "action_in_proj/bias": (1024,),
    "action_out_proj/kernel": (1024, 32),
    "action_out_proj/bias": (32,),
    "time_mlp_in/kernel": (1024, 1024),
    "time_mlp_in/bias": (1024,),
    "time_mlp_out/kernel": (1024, 1024),
    "time_mlp_out/bias": (1024,),
}
VISION = {
    "img/embedding/kernel": (14, 14, 3, 1152),
    "img/embedding/bias": (1152,),
    "img/pos_embedding": (1, 256, 1152),
    "img/Transformer/encoderblock/LayerNorm_0": (2, 27, 1152),
    "img/Transformer/encoderblock/LayerNorm_1": (2, 27, 1152),
    "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
    "img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias": (27, 4304),
    "img/Transformer/encoderblock/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
    "img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias": (27, 1152),
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{query,key,value}/kernel": (3, 27, 1152, 16, 72),
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{query,key,value}/bias": (3, 27, 16, 72),
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel": (27, 16, 72, 1152),
    "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/bias": (27, 1152),
    "img/Transformer/encoder_norm": (2, 1152),
    "img/head/kernel": (1152, 2048),
    "img/head/bias": (2048,),
}


def test_pi05_has_the_published_sizes() -> None:
    params = abstract_params(PI05)
    for part, table in ((params.backbone, TEXT), (params.expert, EXPERT), (params.vision, VISION)):
        assert count_params(part) == sum(math.prod(shape) for shape in table.values())
    assert count_params(params) == 3_353_433_872  # 2.92 B of PaliGemma, 0.43 B of action expert


def test_pi0_is_pi05_with_plain_norms_a_wider_time_mlp_and_a_state_token() -> None:
    modulations, width = 2 * 18 + 1, 1024
    difference = modulations * (width - (width + 1) * 3 * width) + width * width + (32 + 1) * width
    assert count_params(abstract_params(PI0)) == 3_353_433_872 + difference == 3_238_048_528


def test_every_pi05_leaf_is_an_openpi_tensor() -> None:
    """Each leaf has as many entries as its counterpart, or as one of the tensors stacked in it."""
    params = abstract_params(PI05)
    stacked = {2: ("kv_einsum", "gating", "LayerNorm", "encoder_norm"), 3: ("{query,key,value}",)}
    for part, table in ((params.backbone, TEXT), (params.expert, EXPERT), (params.vision, VISION)):
        theirs = []
        for name, shape in table.items():
            parts = next((n for n, marks in stacked.items() if any(mark in name for mark in marks)), 1)
            theirs += [math.prod(shape) // parts] * parts
        assert sorted(math.prod(leaf.shape) for leaf in jax.tree.leaves(part)) == sorted(theirs)
    heads = params.backbone.layers
    assert (heads.query.shape, heads.key.shape) == ((18, 2048, 8, 256), (18, 2048, 1, 256))
    assert (heads.out.shape, heads.gate.shape) == ((18, 8, 256, 2048), (18, 2048, 16384))
    assert params.vision.layers.query.kernel.shape == (27, 1152, 16, 72)


def test_pi05_builds_abstractly() -> None:
    """Parameters, batch and loss as shapes: 968 positions, no memory."""
    key = jax.random.key(0)
    batch = jax.eval_shape(lambda: fake_batch(PI05, 2, key))
    total, metrics = jax.eval_shape(lambda p, b: compute_loss(p, PI05, b, key), abstract_params(PI05), batch)
    assert total.shape == metrics["flow"].shape == metrics["fast"].shape == ()
    assert PI05.num_image_tokens == 768 and PI05.num_memory == 968
    assert PI05.vocab_size % PI05.compute.vocab_chunk == 0


@pytest.mark.parametrize("name", PRESETS)
def test_the_weight_table_is_the_parameters(name: str) -> None:
    """Every weight names each of its axes, and one letter has one size within a leaf's part."""
    table = weight_table(preset(name))
    weights = jax.tree.leaves(table, is_leaf=is_weight)
    assert all(is_weight(w) and len(w.axes) == len(w.shape) and min(w.shape) > 0 for w in weights)
    assert jax.tree.structure(abstract_params(preset(name))) == jax.tree.structure(table, is_leaf=is_weight)


def test_fresh_parameters_match_the_table() -> None:
    config = dataclasses.replace(SMALL, state_input="token")
    make = jit(lambda seed: init_params(config, jax.random.key(seed)))
    params = make(0)
    for (name, leaf), weight in zip(
        by_leaf(params).items(), jax.tree.leaves(weight_table(config), is_leaf=is_weight), strict=True
    ):
        assert leaf.shape == weight.shape and leaf.dtype == np.float32, name
        assert np.any(leaf) == (weight.init != "zeros"), name
    assert difference(params, make(0)) == 0.0 < difference(params, make(1))
    assert insula.init_params is init_params


def test_scan_is_the_unrolled_stack() -> None:
    """Losses and gradients. Control: other parameters."""
    params, batch = model()
    scan = SMALL.with_compute(scan_layers=True)
    (_, a), (_, b) = (loss(params, config, batch) for config in (SMALL, scan))
    assert difference((a["flow"], a["fast"]), (b["flow"], b["fast"])) < CLOSE
    wanted, found = (gradients(params, config, batch)["total"] for config in (SMALL, scan))
    assert difference(wanted, found) < CLOSE * largest(wanted)
    _, other = loss(model(seed=1)[0], SMALL, batch)
    assert difference(a["flow"], other["flow"]) > CLOSE


@pytest.mark.parametrize(
    "scan", [pytest.param(False, marks=pytest.mark.slow, id="unrolled"), pytest.param(True, id="scan")]
)
def test_what_is_computed_again_takes_less_memory(scan: bool) -> None:
    """For the same losses and gradients. Control: keeping everything takes the most."""
    deep = {part: dataclasses.replace(getattr(SMALL, part), depth=6) for part in ("backbone", "expert")}
    seen = dataclasses.replace(SMALL.vision, image_size=48)  # scores of attention are the square of its tokens
    config = dataclasses.replace(SMALL, vision=seen, **deep).with_compute(scan_layers=scan)
    params, batch = model(config, batch_size=8)
    bytes_of, found = {}, {}
    for remat in ("none", "dots", "all"):
        of = config.with_compute(remat=remat)
        run = jit(jax.value_and_grad(lambda p, of=of: compute_loss(p, of, batch, jax.random.key(0))[0]))
        compiled = run.lower(params).compile()
        bytes_of[remat], found[remat] = compiled.memory_analysis().temp_size_in_bytes, compiled(params)
    assert bytes_of["all"] < bytes_of["none"]
    if scan:  # unrolled, products kept cost as much as the scores they spare
        assert bytes_of["all"] < bytes_of["dots"] < bytes_of["none"]
    for remat in ("dots", "all"):
        assert difference(found[remat], found["none"]) < CLOSE * largest(found["none"])


def test_scanned_layers_of_older_runs_were_computed_again() -> None:
    written = dataclasses.asdict(SMALL.with_compute(scan_layers=True))
    del written["compute"]["remat"]
    assert config_from_dict(written).compute.remat == "all"
    written["compute"]["scan_layers"] = False
    assert config_from_dict(written).compute.remat == "none"


def test_bfloat16_products_are_close() -> None:
    """They read 8 bits of mantissa and accumulate in float32; parameters, gradients and losses stay float32."""
    params, batch = model()
    low = SMALL.with_compute(dtype="bfloat16")
    (total, a), (low_total, b) = (loss(params, config, batch) for config in (SMALL, low))
    assert total.dtype == low_total.dtype == jnp.float32
    for name in ("flow", "fast"):
        assert float(b[name]) == pytest.approx(float(a[name]), rel=0.05) and float(b[name]) != float(a[name])
    gradient = gradients(params, low, batch)["total"]
    assert all(leaf.dtype == np.float32 for leaf in by_leaf(gradient).values())


def test_the_state_reaches_the_expert_as_a_token_only_when_asked() -> None:
    for variant, reaches in (({}, False), ({"state_input": "token"}, True)):
        config = dataclasses.replace(SMALL, **variant)
        params, batch = model(config)
        noisy, time = draws(config, batch)
        other = dataclasses.replace(
            batch, observation=dataclasses.replace(batch.observation, state=batch.observation.state + 1)
        )
        changed = difference(velocity(params, config, batch, noisy, time), velocity(params, config, other, noisy, time))
        assert (changed > CLOSE) if reaches else (changed == 0.0)


def test_memory_weights_are_those_of_the_attention() -> None:
    """Grouped queries, two samples of noise, a hidden column of the memory and one of the expert's own."""
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (2, 2, 3, 4, 8))
    k, v = (jax.random.normal(key, (2, 2, 3, 2, 8)) for key in keys[1:3])
    memory_k, memory_v = (jax.random.normal(key, (2, 5, 2, 8)) for key in keys[3:])
    seen, own = jnp.ones((2, 5), bool).at[0, 1].set(False), jnp.tri(3, dtype=bool)
    weights = memory_weights(q, k, memory_k, seen, own)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[0, ..., 1] == 0).all() and (weights[1, ..., 1] > 0).all() and (weights[:, :, 0, :, 6:] == 0).all()
    heads = [jnp.repeat(x, 2, axis=-2) for x in (memory_v, v)]  # each key head serves two query heads
    wanted = jnp.einsum("bkanm,bmne->bkane", weights[..., :5], heads[0])
    wanted += jnp.einsum("bkanc,bkcne->bkane", weights[..., 5:], heads[1])
    np.testing.assert_allclose(attend_with_memory(q, k, v, memory_k, memory_v, seen, own), wanted, atol=1e-5)


def test_cameras_of_any_size_and_none_forgotten() -> None:
    params, _ = model()
    images = {name: jnp.full((2, 24, 40, 3), 77, jnp.uint8) for name in SMALL.cameras}
    run = jit(lambda vision, images: encode_images(vision, SMALL, images))
    even = {name: jnp.zeros((2, 16, 16, 3), jnp.uint8).at[:, 3:12].set(77) for name in SMALL.cameras}
    assert difference(run(params.vision, images), run(params.vision, even)) < CLOSE
    first, *others = SMALL.cameras
    with pytest.raises(ValueError, match=rf"also expects .*{others[-1]}"):
        encode_images(params.vision, SMALL, {first: even[first]})


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no preset 'tinny'.*did you mean 'tiny'"):
        insula.preset("tinny")
    raw = dataclasses.asdict(SMALL)
    assert config_from_dict(raw) == SMALL
    with pytest.raises(ValueError, match=r"horison.*did you mean 'horizon'"):
        config_from_dict({**raw, "horison": 3})
    with pytest.raises(ValueError, match="config: backbone: unknown field 'heads'"):
        config_from_dict({**raw, "backbone": {**raw["backbone"], "heads": 3}})
    raw.pop("horizon")
    with pytest.raises(ValueError, match="no horizon"):
        config_from_dict(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": VARIANTS["one key head, scan"]["expert"]}, "backbone.num_kv_heads is 2, expert.num_kv_heads is 1"),
        ({"state_input": "tokn"}, "did you mean 'token'"),
    ],
)
def test_contradictions_are_refused(changes: dict, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow_samples": 0}, "flow_samples is 0"),
        ({"ki_fast_loss_weight": float("nan")}, "ki_fast_loss_weight is nan"),
        ({"ki_fast_loss_weight": -1.0}, "ki_fast_loss_weight is -1.0"),
    ],
)
def test_impossible_objectives_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.with_objective(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "float16"}, "dtype is 'float16'"), ({"vocab_chunk": 0}, "vocab_chunk is 0")],
)
def test_impossible_compute_settings_are_refused(changes: dict, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL.with_compute(**changes)
