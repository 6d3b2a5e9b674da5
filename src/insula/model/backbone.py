"""The VLM backbone: a Gemma-style text model over [images | prompt | FAST], read once (PaliGemma, arXiv 2407.07726).

    images, prompt   one bidirectional block: what serving sees, and what the action expert may read
    FAST             causal, after it, in the same pass

Training and serving call the same function; at serving the FAST suffix is simply absent. One pass is enough because
no prefix position can see the suffix: its keys and values are the same numbers with the suffix there and without it.
Two passes with logits for every position take 1.7 times as long at tiny, 11 times at 257,152 entries (docs/log.md).
"""

import dataclasses
from collections.abc import Callable
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
    """Gemma layer (arXiv 2403.08295, §2): no biases, GeGLU, RMSNorm before each branch and none after. Leaves are
    stacked over depth."""

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
    """The text model's parameters. `embedding` [V, W] also is the token head: the two are tied in Gemma."""

    embedding: Leaf
    layers: BackboneLayer
    norm: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackboneOutput:
    """One backbone pass: final hidden states (of the n positions asked for, or of all T), keys and values of every
    layer, and what is real."""

    hidden: Float[Array, "B n W"]
    keys: Float[Array, "X B T G E"]
    values: Float[Array, "X B T G E"]
    token_mask: Bool[Array, "B T"]
    ar_mask: Bool[Array, "B T"]


def backbone_weights(config: ModelConfig) -> Backbone:
    """The weight table."""
    c = config.backbone
    x, w, f, n, g, e = c.depth, c.width, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
    return Backbone(
        # Rows of about unit length, so that logits of a normed hidden state start at the size of one.
        embedding=Weight((config.vocab_size, w), "VW", "normal", w**-0.5),
        layers=BackboneLayer(
            # Zeros, for a norm's scale is 1 + this (`layers.rms_norm`).
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
    """The sequence [images | tokens]: embeddings, and `column_masks`. Raises InputError as `encode_images`."""
    x = encode_images(vision, config, observation.images)

    if observation.tokens is not None:
        x = jnp.concatenate([x, embed_tokens(backbone, config, observation.tokens)], axis=1)

    return x, *column_masks(config, observation, ar_mask)


def column_masks(
    config: ModelConfig, observation: Observation, ar_mask: Bool[AnyArray, "B L"] | None
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Which columns of [images | tokens] are real, and which start a causal step. Images come first, in the order of
    `config.cameras`, and are bidirectional; without `ar_mask` so is all text."""
    # An absent camera keeps its columns, masked: shapes stay static, and a robot with fewer cameras shares the batch.
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
    Raises InputError as `encode_images`.
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
    rotary = masks.positions(token_mask)  # of real tokens: where the padding stands, and how much, changes nothing

    def layer(x: Array, p: BackboneLayer, wanted: Array | None = None) -> tuple[Array, tuple[Array, Array]]:
        y = layers.rms_norm(x, p.attention_norm)
        k, v = keys_and_values(p, config, y, rotary)

        # The last layer's output is read only where a token is scored, at most 24 of 76 positions at tiny. Queries and
        # feed-forward of the others took a tenth of the whole train step. Their keys and values are needed either way.
        query_rotary, query_mask = rotary, mask
        if wanted is not None:
            x, query_rotary, query_mask = (gather_positions(rows, wanted) for rows in (x, rotary, mask))
            y = layers.rms_norm(x, p.attention_norm)

        return update(p, config, x, y, query_rotary, lambda q: attend(q, k, v, query_mask)), (k, v)

    # A scan runs one and the same body for every layer, so there the last one cannot do less.
    if config.compute.scan_layers:
        x, (keys, values) = layers.walk(layer, x, backbone.layers, config.compute)
        x = x if positions is None else gather_positions(x, positions)
    else:
        last = partial(layer, wanted=positions)
        x, (keys, values) = layers.walk(layer, x, backbone.layers, config.compute, last)

    return BackboneOutput(layers.rms_norm(x, backbone.norm), keys, values, token_mask, ar_mask)


def keys_and_values(
    p: BackboneLayer, config: ModelConfig, y: Float[Array, "B n W"], rotary: Int[Array, "B n"]
) -> tuple[Float[Array, "B n G E"], Float[Array, "B n G E"]]:
    """What one layer lets others read of these positions, from its normed input `y`; the n-th is at rotary position
    `rotary`."""
    k = layers.rope(layers.matmul(y, p.key, config.compute.dtype), rotary)
    return k, layers.matmul(y, p.value, config.compute.dtype)


def update(
    p: BackboneLayer,
    config: ModelConfig,
    x: Float[Array, "B n W"],
    y: Float[Array, "B n W"],
    rotary: Int[Array, "B n"],
    look: Callable[[Array], Array],
) -> Float[Array, "B n W"]:
    """The rest of the layer: what these positions `x`, normed `y`, become by `look`, from queries [B, n, N, E] to what
    they find, and by the feed-forward."""
    dtype = config.compute.dtype
    q = layers.rope(layers.matmul(y, p.query, dtype), rotary) * config.backbone.head_dim**-0.5
    x = x + layers.merge_heads(look(q), p.out, dtype)
    return x + layers.geglu(layers.rms_norm(x, p.mlp_norm), p.gate, p.up, p.down, dtype)


def embed_tokens(backbone: Backbone, config: ModelConfig, tokens: Int[AnyArray, "B n"]) -> Float[Array, "B n W"]:
    """Text as it enters the backbone."""
    # Gemma's factor: the table serves as token head too and has small entries; times √W they have the size of
    # everything else in the residual stream. Image tokens come from a projection of their own and take none.
    text = layers.look_up(backbone.embedding, tokens) * backbone.embedding.shape[-1] ** 0.5
    return layers.enter(text, config.compute)


def gather_positions(rows: Shaped[Array, "B T *rest"], positions: Int[Array, "B U"]) -> Shaped[Array, "B U *rest"]:
    """Row `positions[b, i]` of each sample."""
    return jnp.take_along_axis(rows, positions.reshape(*positions.shape, *(1,) * (rows.ndim - 2)), axis=1)
