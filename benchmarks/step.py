"""Time and memory of the knowledge-insulated train step, against the same step written the literal way.

    python benchmarks/step.py                 # all tables
    python benchmarks/step.py --rounds 11 --only tiny

Ours is `value_and_grad(compute_loss)`: one backbone pass, logits at scored positions only, integer labels. The literal
form makes two passes: the backbone over [images | prompt | FAST] with one-hot cross-entropy over the logits of every
position, then images and prompt again, jointly with the actions (XLA spares it the second image encoding). Same
parameters, same batch, same process, rounds alternating; times are medians of the wall clock, ratios medians over
rounds. Each round also times a large matrix product, so that a busy machine slows both sides of "of peak".
Run it with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as `make bench` does.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from insula import flow
from insula.batch import Batch, Observation
from insula.losses import compute_loss, flow_matching_loss, masked_mean
from insula.model import layers
from insula.model.attention import attend
from insula.model.backbone import embed, run_backbone
from insula.model.config import ModelConfig, TransformerConfig, VisionConfig, preset
from insula.model.layers import linear
from insula.model.params import Params, abstract_params, count_params
from insula.testing import fake_batch, randomize
from insula.tokens import masks


def two_passes(
    params: Params, config: ModelConfig, batch: Batch, rng: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The literal form: the same loss, noise and times as `compute_loss` with one flow sample."""
    seen = batch.observation
    prefix = run_backbone(params.vision, params.backbone, config, seen, batch.ar_mask)
    logits = jnp.dot(
        prefix.hidden.astype(config.compute.dtype),
        params.backbone.embedding.astype(config.compute.dtype).T,
        preferred_element_type=jnp.float32,
    )
    images = config.num_image_tokens
    labels = jnp.pad(seen.tokens, ((0, 0), (images - 1, 1)))  # the token after each position
    scored = jnp.pad(batch.loss_mask, ((0, 0), (images - 1, 1)))
    own = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, config.vocab_size), axis=-1)
    fast = -jnp.sum(own * scored) / jnp.sum(scored)

    columns = config.max_prompt_len
    prompt = dataclasses.replace(
        seen,
        tokens=seen.tokens[:, :columns],
        token_mask=seen.token_mask[:, :columns] & ~batch.ar_mask[:, :columns],
    )
    time_rng, noise_rng = jax.random.split(rng)
    draws = (batch.actions.shape[0], 1)
    t = flow.sample_time(time_rng, draws)
    noise = jax.random.normal(noise_rng, (*draws, *batch.actions.shape[1:]))
    actions, mask = batch.actions[:, None], batch.action_mask[:, None]
    velocity = joint_pass(params, config, prompt, flow.add_noise(actions, noise, t), t)
    error = masked_mean(flow_matching_loss(velocity, flow.target_velocity(actions, noise), mask), mask)
    return config.objective.ki_fast_loss_weight * fast + error, {"fast": fast, "flow": error}


def joint_pass(params: Params, config: ModelConfig, seen: Observation, noisy: jax.Array, t: jax.Array) -> jax.Array:
    """Prefix and actions through both towers in lockstep, one masked softmax per layer; the prefix gets no gradient."""
    dtype, expert = config.compute.dtype, params.expert
    vision, backbone = jax.lax.stop_gradient((params.vision, params.backbone))
    x, real, _ = embed(vision, backbone, config, seen, None)
    a = linear(noisy, expert.action_in, dtype)
    c = jax.nn.silu(linear(layers.time_embedding(t, config.expert.width), expert.time_in, dtype))
    c = jax.nn.silu(linear(c, expert.time_out, dtype))
    real = jnp.pad(real, ((0, 0), (0, config.horizon)), constant_values=True)
    mask = masks.make_attn_mask(real, jnp.broadcast_to(jnp.arange(real.shape[1]) == x.shape[1], real.shape))
    positions = masks.positions(real)

    def layer(carry: tuple, weights: tuple) -> tuple:
        (x, a), (p, s) = carry, weights
        y = layers.rms_norm(x, p.attention_norm)
        z, gate = layers.ada_rms_norm(a, linear(c, s.attention_norm, dtype))
        q, k, v = (
            jnp.concatenate([layers.matmul(y, w, dtype), layers.matmul(z[:, 0], u, dtype)], axis=1)
            for w, u in ((p.query, s.query), (p.key, s.key), (p.value, s.value))
        )
        out = attend(layers.rope(q, positions) * q.shape[-1] ** -0.5, layers.rope(k, positions), v, mask)
        x = x + layers.merge_heads(out[:, : x.shape[1]], p.out, dtype)
        a = a + gate * layers.merge_heads(out[:, None, x.shape[1] :], s.out, dtype)
        x = x + layers.geglu(layers.rms_norm(x, p.mlp_norm), p.gate, p.up, p.down, dtype)
        z, gate = layers.ada_rms_norm(a, linear(c, s.mlp_norm, dtype))
        return (x, a + gate * layers.geglu(z, s.gate, s.up, s.down, dtype)), None

    (_, a), _ = layers.walk(layer, (x, a), (backbone.layers, expert.layers), config.compute)
    a, _ = layers.ada_rms_norm(a, linear(c, expert.norm, dtype))
    return linear(a, expert.action_out, dtype)


def model_flops(config: ModelConfig, batch_size: int) -> float:
    """Of one step: 2 per multiply-add, the backward pass twice the forward. Element-wise work is not counted.

    tokens x matrix entries, for vision, backbone, expert and the scored rows of the vocabulary product, and for
    attention 2 products of queries x keys x heads x head_dim each. Insulation saves the expert's gradient of K/V.
    """
    v, b, e = config.vision, config.backbone, config.expert

    def gemma(c: TransformerConfig) -> int:
        attention = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        return c.depth * (attention + 3 * c.width * c.mlp_dim)

    stem, cells, width = 0, 0, 3
    side = v.image_size
    for patch, out in zip(v.patch_sizes, (*v.stem_widths, v.width), strict=True):
        side //= patch
        stem, cells, width = stem + side * side * patch * patch * width * out, side * side, out
    heads = b.num_heads * b.head_dim
    vision = stem + cells * (v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_dim) + v.width * b.width)
    vision += v.depth * 2 * cells**2 * v.width
    tokens = config.num_image_tokens + config.max_token_len
    backbone = tokens * gemma(b) + b.depth * 2 * tokens**2 * heads + config.max_fast_len * b.width * config.vocab_size
    actions = config.horizon + (config.state_input == "token")
    chunk = actions * gemma(e) + (2 * e.depth + 1) * e.width * 3 * e.width + 2 * e.width**2
    chunk += 2 * config.horizon * config.action_dim * e.width
    reading = e.depth * 2 * actions * config.num_memory * heads
    chunk += e.depth * 2 * actions**2 * heads
    per_sample = 3 * (len(config.cameras) * vision + backbone + config.objective.flow_samples * chunk)
    return 2.0 * batch_size * (per_sample + config.objective.flow_samples * 2 * reading)


PRODUCT = 2048


def large_product(dtype: str) -> Callable[[], jax.Array]:
    """A square product that reads `dtype` and writes float32: what this machine can do."""
    x = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT)).astype(dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x, x))
    return lambda: product(x, x)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def compare(title: str, forms: dict[str, tuple[Callable, ModelConfig]], batch_size: int, rounds: int) -> None:
    """Compile each form, run them in turn, print one line each; ratios are against the first, paired by round."""
    config = next(iter(forms.values()))[1]
    key = jax.random.key(0)
    params = jax.jit(lambda k: randomize(abstract_params(config), k))(key)
    batch = jax.jit(lambda k: fake_batch(config, batch_size, k))(key)
    runs, memory, losses = {}, {}, {}
    for name, (loss, form) in forms.items():

        def step(params: Params, batch: Batch, loss: Callable = loss, form: ModelConfig = form) -> Any:
            return jax.value_and_grad(loss, has_aux=True)(params, form, batch, key)

        compiled = jax.jit(step).lower(params, batch).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        runs[name] = lambda compiled=compiled: compiled(params, batch)
        (_, losses[name]), _ = runs[name]()
    times: dict[str, list[float]] = {name: [] for name in forms}
    product, products = large_product(config.compute.dtype), []
    for _ in range(rounds):
        products.append(seconds(product))
        for name, run in runs.items():
            times[name].append(seconds(run))

    tokens = config.num_image_tokens + config.max_token_len
    peak = 2 * PRODUCT**3 / statistics.median(products)
    print(
        f"\n{title}: {count_params(params) / 1e6:.1f} M parameters, vocabulary {config.vocab_size:,}, "
        f"{tokens} positions, batch {batch_size}, {config.compute.dtype}, {rounds} rounds, "
        f"{peak / 1e9:,.0f} GFLOP/s in large products"
    )
    print(f"{'form':34} {'ms':>8} {'ratio':>6} {'temp MiB':>9} {'of peak':>8}   fast    flow")
    first = times[next(iter(forms))]
    for name, (_, form) in forms.items():
        median = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(first, times[name], strict=True))
        share = model_flops(form, batch_size) / median / peak
        values = " ".join(f"{float(losses[name][loss]):7.4f}" for loss in ("fast", "flow"))
        print(f"{name:34} {median * 1e3:8.1f} {ratio:6.2f} {memory[name]:9,.0f} {share:8.1%} {values}", flush=True)


def large_vocabulary(config: ModelConfig) -> ModelConfig:
    """564 positions as in two cameras of 256 patches with 52 text tokens, PaliGemma's vocabulary, small width."""
    transformer = TransformerConfig(width=256, depth=4, mlp_dim=1024, num_heads=4, num_kv_heads=1, head_dim=64)
    return dataclasses.replace(
        config,
        name="large vocabulary",
        vision=VisionConfig(
            image_size=224, patch_sizes=(14,), stem_widths=(), width=128, depth=2, mlp_dim=256, num_heads=4
        ),
        backbone=transformer,
        expert=dataclasses.replace(transformer, width=128, mlp_dim=512),
        vocab_size=257_152,
        max_prompt_len=4,
        max_fast_len=48,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=11, help="rounds at the tiny preset; a third with 257,152 entries"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="at the tiny preset")
    parser.add_argument("--large-batch-size", type=int, default=4, help="with 257,152 entries")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the preset's")
    parser.add_argument("--only", choices=("tiny", "samples", "vocabulary"))
    options = parser.parse_args()

    tiny = preset("tiny")
    tiny = tiny.with_objective(flow_samples=1).with_compute(dtype=options.dtype or tiny.compute.dtype)

    if options.only in (None, "tiny"):
        forms = {"two passes, one-hot, all logits": (two_passes, tiny), "insula": (compute_loss, tiny)}
        compare("KI step, tiny", forms, options.batch_size, options.rounds)
    if options.only in (None, "samples"):
        forms = {
            f"{k} flow sample{'s' * (k > 1)}": (compute_loss, tiny.with_objective(flow_samples=k)) for k in (1, 2, 4)
        }
        compare("flow samples per pass, tiny", forms, options.batch_size, options.rounds)
    if options.only in (None, "vocabulary"):
        large = large_vocabulary(tiny)
        forms = {
            "two passes, one-hot, all logits": (two_passes, large),
            "insula": (compute_loss, large),
            "insula, vocab_chunk 16,072": (compute_loss, large.with_compute(vocab_chunk=16_072)),
            "insula, 4 flow samples": (compute_loss, large.with_objective(flow_samples=4)),
        }
        compare("KI step, large vocabulary", forms, options.large_batch_size, max(3, options.rounds // 3))


if __name__ == "__main__":
    main()
