"""Knowledge insulation: what may reach the action expert, and what may come back. Beside each zero, its control."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
    CLOSE,
    FAR,
    SMALL,
    VARIANTS,
    by_leaf,
    difference,
    draws,
    gradients,
    jit,
    largest,
    loss,
    model,
    prefix,
    replace_observation,
    velocity,
)

from insula.model import backbone as backbone_module
from insula.model.backbone import run_backbone
from insula.model.expert import run_expert
from insula.model.insulation import insulate

LEAKY = {"knowledge_insulation": False}
# Nothing of the last layer but its keys and values is read by the expert; a key's bias shifts all scores alike.
UNREAD = {"vision.layers.key.bias", "backbone.norm"}
LAST_UNREAD = {"query", "out", "mlp_norm", "gate", "up", "down"}


@pytest.fixture(scope="module")
def small():
    return model()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_gradient_crosses(variant: str) -> None:
    """Flow to vision and backbone, tokens to the expert: exactly zero. Un-insulated, flow reaches every weight."""
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    params, batch = model(config, batch_size=2)
    flow, fast = (gradients(params, config, batch)[name] for name in ("flow", "fast"))
    assert largest(flow.vision) == largest(flow.backbone) == 0.0
    assert largest(fast.expert) == 0.0
    assert all(np.any(leaf != 0) for leaf in by_leaf(flow.expert).values())
    assert all(np.any(leaf != 0) for leaf in by_leaf((fast.vision, fast.backbone)).values())

    leak = gradients(params, config.with_objective(**LEAKY), batch)["flow"]
    for name, leaf in by_leaf(leak).items():
        last = name.split(".")[-1]
        if name in UNREAD:
            continue
        if name.startswith("backbone.layers") and last in LAST_UNREAD:
            assert np.all(leaf[-1] == 0), name
            leaf = leaf[:-1]
        assert np.any(leaf != 0), name
    assert difference(leak.expert, flow.expert) < (0.1 if config.compute.dtype == "bfloat16" else CLOSE) * largest(
        flow.expert
    )


def test_stopping_at_the_embeddings_is_not_enough(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer makes keys and values with its own weights, so all transformer weights keep their full gradient."""
    params, batch = small
    leaky = SMALL.with_objective(**LEAKY)
    leak = gradients(params, leaky, batch)["flow"]

    embed = backbone_module.embed
    monkeypatch.setattr(backbone_module, "embed", lambda *args: jax.lax.stop_gradient(embed(*args)))
    stopped = gradients(params, leaky, batch, afresh=True)["flow"]
    assert largest(stopped.vision) == largest(stopped.backbone.embedding) == 0.0
    assert largest(stopped.backbone.layers) > FAR
    assert difference(stopped.backbone.layers, leak.backbone.layers) < CLOSE * largest(leak.backbone.layers)


def test_freezing_stops_the_token_loss_too(small) -> None:
    params, batch = small
    frozen = SMALL.with_objective(freeze_backbone=True, ki_fast_loss_weight=0.0)
    total = gradients(params, frozen, batch)["total"]
    assert largest(total.vision) == largest(total.backbone) == 0.0 < largest(total.expert)
    control = gradients(params, SMALL, batch)["total"]
    assert min(largest(control.vision), largest(control.backbone)) > 0
    assert difference(control.expert, total.expert) < CLOSE * largest(control.expert)


def test_the_expert_does_not_see_fast_tokens(small) -> None:
    """Neither their values nor their number, nor the amount of padding."""
    params, batch = small
    noisy, time = draws(SMALL, batch, 2)
    wanted = velocity(params, SMALL, batch, noisy, time)
    seen = batch.observation
    other = jnp.where(batch.ar_mask, (seen.tokens + 17) % SMALL.vocab_size, seen.tokens)
    changed = replace_observation(batch, tokens=other)
    fewer = replace_observation(batch, token_mask=seen.token_mask & (jnp.cumsum(batch.ar_mask, axis=1) < 2))
    assert np.all(jnp.sum(fewer.observation.token_mask, axis=1) < jnp.sum(seen.token_mask, axis=1))
    for case in (changed, fewer):
        assert difference(velocity(params, SMALL, case, noisy, time), wanted) == 0.0

    longer = replace_observation(
        batch,
        tokens=jnp.pad(seen.tokens, ((0, 0), (0, 7))),
        token_mask=jnp.pad(seen.token_mask, ((0, 0), (0, 7))),
    )
    longer = dataclasses.replace(longer, ar_mask=jnp.pad(batch.ar_mask, ((0, 0), (0, 7))))
    assert difference(velocity(params, SMALL, longer, noisy, time), wanted) < CLOSE

    def leaky(case):  # all columns, FAST tokens among them
        read = prefix(params, SMALL, case)
        everything = dataclasses.replace(insulate(read, read.token_mask.shape[1]), mask=read.token_mask)
        return velocity(params, SMALL, case, noisy, time, everything)

    assert difference(leaky(changed), leaky(batch)) > FAR
    assert difference(leaky(fewer), leaky(batch)) > FAR
    prompt = replace_observation(batch, tokens=seen.tokens.at[:, 0].add(1))
    assert difference(velocity(params, SMALL, prompt, noisy, time), wanted) > FAR


@pytest.mark.parametrize("variant", ["grouped queries", "one key head, scan"])
def test_training_and_serving_share_the_prefix(variant: str) -> None:
    """Keys, values, positions and velocity with the FAST suffix are those without it, and without any padding."""
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    params, batch = model(config)
    noisy, time = draws(config, batch)
    trained = velocity(params, config, batch, noisy, time)
    training = insulate(prefix(params, config, batch), config.num_memory)
    for row in range(2):
        length = int(jnp.sum(batch.observation.token_mask[row] & ~batch.ar_mask[row]))
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        one = replace_observation(
            one, tokens=one.observation.tokens[:, :length], token_mask=jnp.ones((1, length), bool)
        )
        one = dataclasses.replace(one, ar_mask=None, loss_mask=None)
        serving = insulate(prefix(params, config, one), config.num_memory)
        real = config.num_image_tokens + length
        assert int(serving.length[0]) == int(training.length[row]) == real == int(jnp.sum(training.mask[row]))
        visible = (training.keys[:, row, :real], training.values[:, row, :real])
        assert difference(visible, (serving.keys[:, 0], serving.values[:, 0])) < CLOSE
        served = velocity(params, config, one, noisy[row : row + 1], time[row : row + 1])
        assert difference(served[0], trained[row]) < CLOSE

    bidirectional = dataclasses.replace(batch, ar_mask=jnp.zeros_like(batch.ar_mask))
    wrong = insulate(prefix(params, config, bidirectional), config.num_memory)
    images = (slice(1, None), slice(None), slice(config.num_image_tokens))
    assert difference(wrong.keys[images], training.keys[images]) > FAR
    padded = dataclasses.replace(training, length=jnp.full(2, config.num_memory, jnp.int32))
    assert np.any(padded.length != training.length)
    assert difference(velocity(params, config, batch, noisy, time, padded), trained) > FAR


def test_total_is_flow_and_weighted_fast(small) -> None:
    """The expert's gradient does not depend on the weight of the token loss; the backbone's does."""
    params, batch = small
    light, heavy = (SMALL.with_objective(ki_fast_loss_weight=weight) for weight in (0.1, 10.0))
    for config in (light, heavy):
        total, metrics = loss(params, config, batch)
        assert float(total) == pytest.approx(
            float(metrics["flow"] + config.objective.ki_fast_loss_weight * metrics["fast"]), rel=1e-6
        )
    a, b = (gradients(params, config, batch)["total"] for config in (light, heavy))
    assert difference(a.expert, b.expert) == 0.0 < largest(a.expert)
    assert largest(b.backbone) == pytest.approx(100 * largest(a.backbone), rel=1e-4)


def test_an_absent_camera_is_absent(small) -> None:
    params, batch = small
    config = SMALL.with_objective(**LEAKY)  # whatever could leak from its pixels
    name = config.cameras[-1]
    images = {**batch.observation.images, name: 255 - batch.observation.images[name]}
    for present in (False, True):
        mask = {**batch.observation.image_mask, name: jnp.full(2, present)}
        a, b = (replace_observation(batch, images=i, image_mask=mask) for i in (batch.observation.images, images))
        changed = difference(gradients(params, config, a), gradients(params, config, b))
        assert (changed > 1e-3) if present else (changed == 0.0)


def test_order_size_and_time_of_a_batch_do_not_matter() -> None:
    """Each sample, each flow sample, by itself: batches of 1, 2 and H, and a time of its own for every chunk."""
    params, batch = model(batch_size=SMALL.horizon)
    noisy, time = draws(SMALL, batch, samples=3)
    whole = velocity(params, SMALL, batch, noisy, time)

    def take(rows):
        return jax.tree.map(lambda leaf: leaf[rows], batch), noisy[rows], time[rows]

    for rows in (np.array([2]), np.array([3, 0]), np.array([3, 1, 0, 2])):
        assert difference(velocity(params, SMALL, *take(rows)), whole[rows]) < CLOSE
    fast, reordered = (loss(params, SMALL, b)[1]["fast"] for b in (batch, take(np.array([3, 1, 0, 2]))[0]))
    assert float(reordered) == pytest.approx(float(fast), rel=1e-5)
    for k in range(3):
        alone = velocity(params, SMALL, batch, noisy[:, k : k + 1], time[:, k : k + 1])
        assert difference(alone[:, 0], whole[:, k]) < CLOSE
    assert difference(velocity(params, SMALL, batch, noisy, time[::-1]), whole) > FAR
    assert difference(velocity(params, SMALL, batch, noisy, time[:, ::-1]), whole) > FAR


def test_a_backbone_without_any_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ki_fast_loss_weight = 0.*freeze_backbone"):
        SMALL.with_objective(ki_fast_loss_weight=0.0)
    for allowed in ({"freeze_backbone": True}, LEAKY):
        assert SMALL.with_objective(**allowed, ki_fast_loss_weight=0.0).objective.ki_fast_loss_weight == 0


# One softmax over prefix and suffix, layer by layer in lockstep: written from the papers, not from the package.


def columns(config, batch):
    """Of each backbone position [B, T]: is it real, is it a FAST token?"""
    cameras = np.stack([batch.observation.image_mask[name] for name in config.cameras], axis=1)
    patches = np.repeat(cameras, config.vision.num_patches, axis=1)
    real = np.concatenate([patches, batch.observation.token_mask], axis=1)
    return real, np.concatenate([np.zeros_like(patches), batch.ar_mask], axis=1)


def joint(params, config, batch, noisy, time, expert_sees, stop: bool = False):
    """Hidden states [B, T, W] and velocity [B, H, D] of the joint model. `expert_sees` [B, T]: prefix columns."""
    x, *_ = backbone_module.embed(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
    real, causal = columns(config, batch)
    e = params.expert
    frequency = 2 * np.pi / (4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, config.expert.width // 2))
    c = jnp.concatenate([jnp.sin(time[:, None] * frequency), jnp.cos(time[:, None] * frequency)], axis=1)
    for dense in (e.time_in, e.time_out):
        c = jax.nn.swish(c @ dense.kernel + dense.bias)
    a = noisy @ e.action_in.kernel + e.action_in.bias

    batch_size, split, horizon = x.shape[0], x.shape[1], config.horizon
    allowed = np.zeros((batch_size, split + horizon, split + horizon), bool)
    for i in range(batch_size):
        for q in range(split):
            for k in range(split):
                allowed[i, q, k] = real[i, q] and real[i, k] and (not causal[i, k] or k <= q)
        allowed[i, split:, :split] = expert_sees[i]
        allowed[i, split:, split:] = True
    prefix_position = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    suffix_position = np.sum(real & ~causal, axis=1)[:, None] + np.arange(horizon)
    position = np.concatenate([prefix_position, suffix_position], axis=1)

    def unit(x):
        return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def modulated(x, norm):
        scale, shift, gate = jnp.split((c @ norm.kernel + norm.bias)[:, None], 3, axis=-1)
        return unit(x) * (1 + scale) + shift, gate

    def rotate(x):
        half = config.backbone.head_dim // 2
        angle = position[..., None, None] / 10_000 ** (np.arange(half) / half)
        x = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return jnp.concatenate([x.real, x.imag], axis=-1)

    def feed_forward(x, p):
        return (jax.nn.gelu(x @ p.gate, approximate=True) * (x @ p.up)) @ p.down

    def project(name, p, y, s, z):
        return jnp.concatenate([jnp.einsum("btw,wne->btne", *pair) for pair in ((y, p[name]), (z, s[name]))], axis=1)

    def attention(q, k, v, mask):
        k, v = (jnp.repeat(m, config.backbone.num_heads // config.backbone.num_kv_heads, axis=2) for m in (k, v))
        scores = jnp.einsum("btne,bsne->bnts", q, k) / np.sqrt(config.backbone.head_dim)
        return jnp.einsum("bnts,bsne->btne", jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1), v)

    def seen_by_actions(m):
        return jnp.concatenate([jax.lax.stop_gradient(m[:, :split]) if stop else m[:, :split], m[:, split:]], axis=1)

    for i in range(config.backbone.depth):
        p, s = (jax.tree.map(lambda leaf, i=i: leaf[i], tree.layers) for tree in (params.backbone, e))
        y = unit(x) * (1 + p.attention_norm)
        z, gate = modulated(a, s.attention_norm)
        q, k, v = (project(name, vars(p), y, vars(s), z) for name in ("query", "key", "value"))
        q, k = rotate(q), rotate(k)
        read = attention(q[:, :split], k, v, allowed[:, :split])
        acted = attention(q[:, split:], seen_by_actions(k), seen_by_actions(v), allowed[:, split:])
        x = x + jnp.einsum("btne,new->btw", read, p.out)
        a = a + gate * jnp.einsum("btne,new->btw", acted, s.out)
        x = x + feed_forward(unit(x) * (1 + p.mlp_norm), p)
        z, gate = modulated(a, s.mlp_norm)
        a = a + gate * feed_forward(z, s)
    x = unit(x) * (1 + params.backbone.norm)
    a, _ = modulated(a, e.norm)
    return x, a @ e.action_out.kernel + e.action_out.bias


@pytest.mark.parametrize(("variant", "insulated"), [("grouped queries", False), ("one key head, scan", True)])
def test_one_pass_is_the_joint_attention(variant: str, insulated: bool) -> None:
    """Values and gradients of both outputs. Control: the joint attention whose actions see FAST tokens."""
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    params, batch = model(config)
    name = config.cameras[0]
    batch = replace_observation(batch, image_mask={**batch.observation.image_mask, name: jnp.array([True, False])})
    noisy, time = draws(config, batch)
    real, causal = columns(config, batch)
    pull_hidden = jax.random.normal(jax.random.key(1), (*real.shape, config.backbone.width))
    pull_velocity = jax.random.normal(jax.random.key(2), (2, config.horizon, config.action_dim))

    def one_pass(params):
        read = run_backbone(params.vision, params.backbone, config, batch.observation, batch.ar_mask)
        memory = insulate(read, config.num_memory, 0.0 if insulated else 1.0)
        return read.hidden, run_expert(params.expert, config, memory, batch.observation.state, noisy, time)[:, 0]

    def lockstep(sees):
        def run(params):
            with jax.numpy_rank_promotion("allow"):  # the literal form, as short as the papers write it
                return joint(params, config, batch, noisy[:, 0], time[:, 0], sees, stop=insulated)

        return run

    def values_and_gradients(function):
        def scalar(params):
            hidden, answer = function(params)
            outputs = hidden * real[..., None], answer  # what padding becomes is nobody's business
            return jnp.sum(outputs[0] * pull_hidden) + jnp.sum(answer * pull_velocity), outputs

        return jax.value_and_grad(scalar, has_aux=True)(params)

    (_, ours), our_gradients = jit(lambda: values_and_gradients(one_pass))()
    (_, theirs), their_gradients = jit(lambda: values_and_gradients(lockstep(real & ~causal)))()
    assert difference(ours, theirs) < CLOSE
    assert difference(our_gradients, their_gradients) < CLOSE * largest(their_gradients)
    _, wrong = jit(lockstep(real))(params)
    assert difference(ours[1], wrong) > FAR
