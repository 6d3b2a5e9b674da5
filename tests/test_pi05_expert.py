"""π0.5's action expert against a second implementation: NumPy, float64, loops, written from its description alone.

Time enters by adaRMS (order scale, shift, gate; residual x + gate · y); queries share key heads; rotary positions go on
after the visible prefix; the feed-forward is GeGLU with the tanh form of GELU.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SMALL, by_leaf, jit, model, transformer

from insula import flow
from insula.losses import flow_matching_loss, masked_mean
from insula.model.config import ModelConfig
from insula.model.expert import run_expert
from insula.model.insulation import Memory

RELATIVE = 1e-5
CONFIGS = {
    f"{n} key heads": dataclasses.replace(SMALL, backbone=transformer(16, n), expert=transformer(12, n), horizon=5)
    for n in (1, 2, 4)
}
Weights = dict[str, np.ndarray]
LENGTHS, COLUMNS = (3, 6), 6  # visible prefix of each sample; the other columns are hidden


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def embed_time(t: float, width: int) -> np.ndarray:
    """The angle in float32: at up to 250 turns its rounding shows, and is part of what was trained."""
    waves = []
    for i in range(width // 2):
        period = np.float32(4e-3) * np.float32(4.0 / 4e-3) ** np.float32(i / (width // 2 - 1))
        waves.append(float(np.float32(t) * (np.float32(2 * math.pi) * (1 / period))))
    return np.concatenate([np.sin(waves), np.cos(waves)])


def rotate(x: np.ndarray, position: int) -> np.ndarray:
    """[head_dim]"""
    half = len(x) // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position / 10_000 ** (i / half)
        out[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        out[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def modulate(x: np.ndarray, w: Weights, name: str, condition: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kernel, bias = w[f"{name}.kernel"], w[f"{name}.bias"]
    scale, shift, gate = np.split(condition @ kernel + bias, 3)
    unit = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return unit * (1 + scale) + shift, gate


def velocity(
    w: Weights, config: ModelConfig, keys: np.ndarray, values: np.ndarray, length: int, x: np.ndarray, t: float
) -> np.ndarray:
    """One sample: keys, values [depth, M, G, E], of which `length` columns are visible; x [H, D]."""
    c = config.expert
    condition = silu(embed_time(t, c.width) @ w["time_in.kernel"] + w["time_in.bias"])
    condition = silu(condition @ w["time_out.kernel"] + w["time_out.bias"])
    x = x @ w["action_in.kernel"] + w["action_in.bias"]
    for layer in range(c.depth):
        p = {name.removeprefix("layers."): leaf[layer] for name, leaf in w.items() if name.startswith("layers.")}
        y, gate = modulate(x, p, "attention_norm", condition)
        heads = []
        for n in range(c.num_heads):
            g = n * c.num_kv_heads // c.num_heads
            own_k = [rotate(row @ p["key"][:, g], length + i) for i, row in enumerate(y)]
            own_v = [row @ p["value"][:, g] for row in y]
            seen_k = np.array([*keys[layer, :length, g], *own_k])
            seen_v = np.array([*values[layer, :length, g], *own_v])
            queries = np.array([rotate(row @ p["query"][:, n], length + i) for i, row in enumerate(y)])
            scores = np.exp(queries @ seen_k.T / math.sqrt(c.head_dim))
            heads.append(scores / scores.sum(1, keepdims=True) @ seen_v @ p["out"][n])
        x = x + gate * sum(heads)
        y, gate = modulate(x, p, "mlp_norm", condition)
        x = x + gate * ((gelu(y @ p["gate"]) * (y @ p["up"])) @ p["down"])
    x, _ = modulate(x, w, "norm", condition)
    return x @ w["action_out.kernel"] + w["action_out.bias"]


@pytest.fixture(params=CONFIGS)
def setting(request: pytest.FixtureRequest, np_rng: np.random.Generator):
    """ModelConfig, our expert and memory, and the same as float64 NumPy."""
    config = CONFIGS[request.param]
    expert = model(config)[0].expert
    c = config.expert
    keys, values = np_rng.normal(size=(2, c.depth, 2, COLUMNS, c.num_kv_heads, c.head_dim)).astype(np.float32)
    visible = np.arange(COLUMNS)[None] < np.array(LENGTHS)[:, None]
    memory = Memory(*map(jnp.asarray, (keys, values, visible, np.array(LENGTHS, np.int32))))
    weights = {name: leaf.astype(np.float64) for name, leaf in by_leaf(expert).items()}
    noisy = np_rng.normal(size=(2, config.horizon, config.action_dim)).astype(np.float32)
    return config, expert, memory, weights, noisy


def expected_velocity(
    config: ModelConfig, weights: dict, memory: Memory, x: np.ndarray, time: np.ndarray
) -> np.ndarray:
    keys, values = (np.asarray(leaf, np.float64) for leaf in (memory.keys, memory.values))
    rows = [velocity(weights, config, keys[:, i], values[:, i], LENGTHS[i], x[i], time[i]) for i in range(2)]
    return np.stack(rows)


def relative(ours: jax.Array, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_velocity_and_flow_loss(setting, np_rng: np.random.Generator) -> None:
    config, expert, memory, weights, noise = setting
    time = np.array([0.07, 0.8], np.float32)
    actions = np_rng.normal(size=noise.shape).astype(np.float32)
    state = jnp.zeros((2, config.state_dim))

    def run(expert, noise: jax.Array, actions: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        noisy = flow.add_noise(actions, noise, time)
        out = run_expert(expert, config, memory, state, noisy[:, None], time[:, None])[:, 0]
        mask = jnp.ones(out.shape, bool)
        return out, masked_mean(flow_matching_loss(out, flow.target_velocity(actions, noise), mask), mask)

    ours = jit(run)
    t = time[:, None, None].astype(np.float64)
    expected = expected_velocity(config, weights, memory, t * noise + (1 - t) * actions, time)
    out, loss = ours(expert, noise, actions, time)
    assert relative(out, expected) <= RELATIVE
    assert loss == pytest.approx(np.mean((expected - (noise - actions)) ** 2), rel=RELATIVE)
    for changed in (  # controls: another time, the modulation in another order
        ours(expert, noise, actions, time + 0.01)[0],
        ours(
            dataclasses.replace(expert, norm=jax.tree.map(lambda x: jnp.roll(x, 12, -1), expert.norm)),
            noise,
            actions,
            time,
        )[0],
    ):
        assert relative(changed, expected) > 1e-3


def test_ten_euler_steps(setting) -> None:
    config, expert, memory, weights, noise = setting
    state = jnp.zeros((2, config.state_dim))

    def step(x: jax.Array, time: jax.Array) -> jax.Array:
        return run_expert(expert, config, memory, state, x[:, None], time[:, None])[:, 0]

    ours = jit(lambda x: flow.integrate(step, x, 10))(jnp.asarray(noise))
    x = noise.astype(np.float64)
    for i in range(10):
        time = np.full(2, 1 - i / 10, np.float32)
        x = x - expected_velocity(config, weights, memory, x, time) / 10
    assert relative(ours, x) <= RELATIVE
    assert relative(jit(lambda x: flow.integrate(step, x, 9))(jnp.asarray(noise)), x) > 1e-3
