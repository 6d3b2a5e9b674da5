"""The action expert: a Gemma-style transformer that turns noisy actions into a velocity (π0, arXiv 2410.24164, §IV;
π0.5, arXiv 2504.16054, §IV).

    noisy actions, time [, state] ─► layer 1 ─► … ─► layer X ─► velocity
                                        ▲               ▲
    memory: keys, values of backbone layer 1      … of backbone layer X

It attends to the backbone's memory and to itself in one softmax per layer. The flow time enters through adaRMS (π0.5),
or is mixed into each action token by an MLP before the first layer (π0).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from insula.model import layers
from insula.model.attention import attend_with_memory
from insula.model.config import ModelConfig
from insula.model.insulation import Memory
from insula.model.layers import Linear, linear
from insula.model.weights import dense, zeros
from insula.shapes import Array, Float, Leaf
from insula.tokens import masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertLayer:
    """Gemma layer; leaves are stacked over depth. A norm is a Linear that modulates (adaRMS), or a scale (RMSNorm)."""

    attention_norm: Linear | Leaf
    query: Leaf
    key: Leaf
    value: Leaf
    out: Leaf
    mlp_norm: Linear | Leaf
    gate: Leaf
    up: Leaf
    down: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expert:
    """The action expert's parameters. Layers have the depth and heads of the backbone's, and a width of their own."""

    action_in: Linear
    time_in: Linear
    time_out: Linear
    layers: ExpertLayer
    norm: Linear | Leaf
    action_out: Linear
    state_in: Linear | None
    """Only where `config.state_input` is "token"."""


def expert_weights(config: ModelConfig) -> Expert:
    """The weight table."""
    c = config.expert
    x, w, f, n, g, e = c.depth, c.width, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
    ada = config.time_input == "adarms"

    # Zero, as in adaLN-Zero (DiT, §3.2): every gate starts at 0, so every layer starts as the identity. A trap for
    # tests: no gradient passes a gate that is 0, so a fresh model shows exact zeros under any scheme, insulated or not.
    # That is why insulation is only ever shown on trained or randomized parameters.
    layer_norm = Linear(zeros("XWY", x, w, 3 * w), zeros("XY", x, 3 * w)) if ada else zeros("XW", x, w)

    def table(axes: str, i: int, o: int) -> Linear:
        return Linear(dense(axes, i, o, fan_in=i), zeros(axes[-1], o))

    # π0 mixes the time into each action token: its first matrix reads both, one after the other.
    return Expert(
        action_in=table("DW", config.action_dim, w),
        time_in=table("WO", w, w) if ada else table("iO", 2 * w, w),
        time_out=table("WO", w, w),
        layers=ExpertLayer(
            attention_norm=layer_norm,
            query=dense("XWNE", x, w, n, e, fan_in=w),
            key=dense("XWGE", x, w, g, e, fan_in=w),
            value=dense("XWGE", x, w, g, e, fan_in=w),
            out=dense("XNEW", x, n, e, w, fan_in=n * e),
            mlp_norm=layer_norm,
            gate=dense("XWF", x, w, f, fan_in=w),
            up=dense("XWF", x, w, f, fan_in=w),
            down=dense("XFW", x, f, w, fan_in=f),
        ),
        norm=Linear(zeros("WY", w, 3 * w), zeros("Y", 3 * w)) if ada else zeros("W", w),
        action_out=table("WD", w, config.action_dim),
        state_in=table("SW", config.state_dim, w) if config.state_input == "token" else None,
    )


def run_expert(
    expert: Expert,
    config: ModelConfig,
    memory: Memory,
    state: Float[Array, "B S"],
    noisy_actions: Float[Array, "B K H D"],
    time: Float[Array, "B K"] | Float[Array, "B K H"],
    attend: Callable[..., Float[Array, "B K A N E"]] = attend_with_memory,
) -> Float[Array, "B K H D"]:
    """Velocity of each of K noisy chunks at its own time, all reading one memory. `attend` is there to watch: it is
    called for every layer in turn, as `attend_with_memory` is, if layers are not scanned.

    A time for each step is for chunks whose first steps are known (`flow.hold`). The last step is never one of them:
    its time is the noisy part's, and the state token's.
    """
    dtype = config.compute.dtype
    horizon, width = config.horizon, config.expert.width
    x = linear(noisy_actions, expert.action_in, dtype)
    x, condition = _enter_time(expert, config, x, layers.time_embedding(time, width))
    x, condition = _enter_state(expert, config, x, condition, state)
    x = layers.enter(x, config.compute)

    # No mask for steps past the episode's end: a policy that acts has every step of its chunk before it. In training
    # they are read like the others and add no loss (`losses.flow_matching_loss`).
    ar = masks.suffix_ar_mask(horizon, expert.state_in is not None)[None]
    self_mask = masks.make_attn_mask(jnp.ones_like(ar), ar)[0]

    # The positions go on where the visible prefix of each sample ends, not where its padded columns do: serving has no
    # FAST columns and may pad its prompt to another length, and the same chunk must get the same velocity there.
    positions = memory.length[:, None, None] + jnp.arange(x.shape[2])[None, None]  # [B, 1, A]

    def norm(x: Array, p: Linear | Array) -> tuple[Array, Array | float]:
        """The normed input, and the gate of the branch that reads it."""
        if isinstance(p, Linear):
            return layers.ada_rms_norm(x, linear(condition, p, dtype))

        return layers.rms_norm(x, p), 1.0

    def layer(x: Array, inputs: tuple[ExpertLayer, Array, Array]) -> tuple[Array, None]:
        p, memory_k, memory_v = inputs

        # Layer i reads the keys and values of the backbone's layer i: hence the same depth and heads in both.
        y, gate = norm(x, p.attention_norm)
        q = layers.rope(layers.matmul(y, p.query, dtype), positions) * config.expert.head_dim**-0.5
        k = layers.rope(layers.matmul(y, p.key, dtype), positions)
        v = layers.matmul(y, p.value, dtype)
        y = attend(q, k, v, memory_k, memory_v, memory.mask, self_mask)
        x = x + gate * layers.merge_heads(y, p.out, dtype)

        y, gate = norm(x, p.mlp_norm)
        return x + gate * layers.geglu(y, p.gate, p.up, p.down, dtype), None

    x, _ = layers.walk(layer, x, (expert.layers, memory.keys, memory.values), config.compute)
    x, _ = norm(x, expert.norm)

    # Without the state's token, which predicts nothing. A velocity is float32: its error is a difference.
    return linear(x[:, :, -horizon:].astype(jnp.float32), expert.action_out, dtype)


def _enter_time(
    expert: Expert, config: ModelConfig, x: Float[Array, "B K H W"], time: Float[Array, "B K *each W"]
) -> tuple[Float[Array, "B K H W"], Float[Array, "B K *each W"]]:
    """Action tokens, and the condition of adaRMS where there is adaRMS. `time` is embedded, one for all tokens of a
    chunk or one for each."""
    dtype = config.compute.dtype
    if config.time_input == "adarms":
        hidden = jax.nn.silu(linear(time, expert.time_in, dtype))
        return x, jax.nn.silu(linear(hidden, expert.time_out, dtype))

    # Concatenated and not added: the MLP may weigh an action by its time (π0, appendix B). No norm reads the time then.
    each = time if time.ndim == x.ndim else jnp.broadcast_to(time[:, :, None, :], x.shape)
    both = jnp.concatenate([x, each], axis=-1)
    return linear(jax.nn.silu(linear(both, expert.time_in, dtype)), expert.time_out, dtype), time


def _enter_state(
    expert: Expert,
    config: ModelConfig,
    x: Float[Array, "B K H W"],
    condition: Float[Array, "B K *each W"],
    state: Float[Array, "B S"],
) -> tuple[Float[Array, "B K A W"], Float[Array, "B K *all W"]]:
    """The state's token before those of the actions, where it is a token, with the condition of the last of them."""
    if expert.state_in is None:
        return x, condition

    # The state does not depend on the flow time: one token for all K samples.
    token = linear(state, expert.state_in, config.compute.dtype)[:, None, None, :]
    if condition.ndim == x.ndim:
        condition = jnp.concatenate([condition[:, :, -1:], condition], axis=2)

    return jnp.concatenate([jnp.broadcast_to(token, (*x.shape[:2], 1, x.shape[-1])), x], axis=2), condition
