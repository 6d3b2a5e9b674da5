"""The VLM backbone: a Gemma-style text model over [images | prompt | FAST], read once.

Training and serving call the same function; at serving the FAST suffix is simply absent.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from insula.batch import Observation
from insula.model import layers
from insula.model.attention import attend
from insula.model.config import ModelConfig
from insula.model.vision import Vision, encode_images
from insula.model.weights import Weight, dense, zeros
from insula.shapes import AnyArray, Array, Bool, Float, Int, Leaf, Shaped
from insula.tokens import masks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackboneLayer:
    """Gemma layer; leaves are stacked over depth."""

    attention_norm: Leaf
    query: Leaf
    key: Leaf
    value: Leaf
    out: Leaf
    mlp_norm: Leaf
    gate: Leaf
    up: Leaf
    down: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Backbone:
    embedding: Leaf
    layers: BackboneLayer
    norm: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackboneOutput:
    """One backbone pass: final hidden states (of the positions asked for), keys and values of every layer, and
    what is real."""

    hidden: Float[Array, "B U W"]
    keys: Float[Array, "X B T G E"]
    values: Float[Array, "X B T G E"]
    token_mask: Bool[Array, "B T"]
    ar_mask: Bool[Array, "B T"]


def backbone_weights(config: ModelConfig) -> Backbone:
    """The weight table."""
    c = config.backbone
    x, w, f, n, g, e = c.depth, c.width, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
    return Backbone(
        embedding=Weight((config.vocab_size, w), "VW", "normal", w**-0.5),
        layers=BackboneLayer(
            attention_norm=zeros("XW", x, w),
            query=dense("XWNE", x, w, n, e, fan_in=w),
            key=dense("XWGE", x, w, g, e, fan_in=w),
            value=dense("XWGE", x, w, g, e, fan_in=w),
            out=dense("XNEW", x, n, e, w, fan_in=n * e),
            mlp_norm=zeros("XW", x, w),
            gate=dense("XWF", x, w, f, fan_in=w),
            up=dense("XWF", x, w, f, fan_in=w),
            down=dense("XFW", x, f, w, fan_in=f),
        ),
        norm=zeros("W", w),
    )


def embed(
    vision: Vision,
    backbone: Backbone,
    config: ModelConfig,
    observation: Observation,
    ar_mask: Bool[Array, "B L"] | None,
) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """The sequence [images | tokens]: embeddings, and `column_masks`."""
    x = encode_images(vision, config, observation.images)
    if observation.tokens is not None:
        text = backbone.embedding[observation.tokens] * backbone.embedding.shape[-1] ** 0.5
        x = jnp.concatenate([x, text], axis=1)
    return x, *column_masks(config, observation, ar_mask)


def column_masks(
    config: ModelConfig, observation: Observation, ar_mask: Bool[AnyArray, "B L"] | None
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Which columns of [images | tokens] are real, and which start a causal step. Images come first, in the order of
    `config.cameras`, and are bidirectional; without `ar_mask` so is all text."""
    present = jnp.stack([jnp.asarray(observation.image_mask[name], bool) for name in config.cameras], axis=1)
    token_mask = jnp.repeat(present, config.vision.num_patches, axis=1)
    column_ar_mask = jnp.zeros(token_mask.shape, bool)
    if observation.tokens is not None:
        text_ar = jnp.zeros(observation.tokens.shape, bool) if ar_mask is None else jnp.asarray(ar_mask, bool)
        token_mask = jnp.concatenate([token_mask, jnp.asarray(observation.token_mask, bool)], axis=1)
        column_ar_mask = jnp.concatenate([column_ar_mask, text_ar], axis=1)
    return token_mask, column_ar_mask


def run_backbone(
    vision: Vision,
    backbone: Backbone,
    config: ModelConfig,
    observation: Observation,
    ar_mask: Bool[Array, "B L"] | None = None,
    positions: Int[Array, "B U"] | None = None,
) -> BackboneOutput:
    """Embed and read the whole sequence once. `ar_mask` is None when there is no FAST suffix (serving).

    `positions`: those whose final hidden state is wanted, all unless given. Unrolled, the last layer's queries and
    feed-forward run for these only; its keys and values, which the expert reads, exist for every position either way.
    """
    x, token_mask, column_ar_mask = embed(vision, backbone, config, observation, ar_mask)
    return run_layers(backbone, config, x, token_mask, column_ar_mask, positions)


def run_layers(
    backbone: Backbone,
    config: ModelConfig,
    x: Float[Array, "B T W"],
    token_mask: Bool[Array, "B T"],
    ar_mask: Bool[Array, "B T"],
    positions: Int[Array, "B U"] | None = None,
) -> BackboneOutput:
    """What `run_backbone` does with its embeddings."""
    mask = masks.make_attn_mask(token_mask, ar_mask)
    rotary = masks.positions(token_mask)
    dtype = config.compute.dtype

    def layer(x: Array, p: BackboneLayer, wanted: Array | None = None) -> tuple[Array, tuple[Array, Array]]:
        y = layers.rms_norm(x, p.attention_norm)
        k = layers.rope(layers.matmul(y, p.key, dtype), rotary)
        v = layers.matmul(y, p.value, dtype)

        # Keys and values exist for every position; queries and all that follows, in the last layer, for those wanted.
        query_rotary, query_mask = rotary, mask
        if wanted is not None:
            x, query_rotary, query_mask = (gather_positions(rows, wanted) for rows in (x, rotary, mask))
            y = layers.rms_norm(x, p.attention_norm)

        q = layers.rope(layers.matmul(y, p.query, dtype), query_rotary) * config.backbone.head_dim**-0.5
        x = x + layers.merge_heads(attend(q, k, v, query_mask), p.out, dtype)
        x = x + layers.geglu(layers.rms_norm(x, p.mlp_norm), p.gate, p.up, p.down, dtype)
        return x, (k, v)

    if config.compute.scan_layers:
        x, (keys, values) = layers.walk(layer, x, backbone.layers, scan=True)
        x = x if positions is None else gather_positions(x, positions)
    else:
        last = partial(layer, wanted=positions)
        x, (keys, values) = layers.walk(layer, x, backbone.layers, scan=False, last=last)

    return BackboneOutput(layers.rms_norm(x, backbone.norm), keys, values, token_mask, ar_mask)


def gather_positions(rows: Shaped[Array, "B T *rest"], positions: Int[Array, "B U"]) -> Shaped[Array, "B U *rest"]:
    """Row `positions[b, i]` of each sample."""
    return jnp.take_along_axis(rows, positions.reshape(*positions.shape, *(1,) * (rows.ndim - 2)), axis=1)
