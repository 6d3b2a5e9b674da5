"""Vision encoder: a SigLIP-style ViT (Zhai et al. 2023, arXiv 2303.15343) whose output tokens have the backbone's
width.

    uint8 [B, h, w, 3] ─ resize ─► [−1, 1] ─ stem ─ + position ─► ViT layers, bidirectional ─ head ─► [B, P, W]

Token count, more than parameter count, is what a small policy costs: hence a stem that can merge patches.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from insula import letterbox
from insula.errors import InputError
from insula.model import layers
from insula.model.attention import attend
from insula.model.config import ModelConfig
from insula.model.layers import Linear, linear
from insula.model.weights import Weight, dense, zeros
from insula.shapes import AnyArray, Array, Float, Leaf, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """Scale (a plain factor) and bias of `layers.layer_norm`."""

    scale: Leaf
    bias: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisionLayer:
    """Pre-norm transformer layer with biases; leaves are stacked over depth."""

    attention_norm: LayerNorm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vision:
    """The encoder's parameters. `stem`: one matrix for each of `patch_sizes`. `position` [P, W], learned,
    starts as a grid of sines. `head`: to the backbone's width."""

    stem: tuple[Linear, ...]
    position: Leaf
    layers: VisionLayer
    norm: LayerNorm
    head: Linear


def vision_weights(config: ModelConfig) -> Vision:
    """The weight table."""
    c = config.vision
    x, w, f, n, e = c.depth, c.width, c.mlp_dim, c.num_heads, c.width // c.num_heads

    def norm(*lead: int) -> LayerNorm:
        return LayerNorm(Weight((*lead, w), "XW"[-len(lead) - 1 :], "ones"), zeros("XW"[-len(lead) - 1 :], *lead, w))

    # A convolution whose stride is its size is a product over the pixels of a patch. The first reads three colors.
    widths = (3, *c.stem_widths, w)
    stem = tuple(
        Linear(dense("ZW", p * p * i, o, fan_in=p * p * i), zeros("W", o))
        for p, (i, o) in zip(c.patch_sizes, itertools.pairwise(widths), strict=True)
    )
    heads = Linear(dense("XWNE", x, w, n, e, fan_in=w), zeros("XNE", x, n, e))

    return Vision(
        stem=stem,
        position=Weight((c.num_patches, w), "PW", "grid", 1.0),
        layers=VisionLayer(
            attention_norm=norm(x),
            query=heads,
            key=heads,
            value=heads,
            out=Linear(dense("XNEW", x, n, e, w, fan_in=w), zeros("XW", x, w)),
            mlp_norm=norm(x),
            up=Linear(dense("XWF", x, w, f, fan_in=w), zeros("XF", x, f)),
            down=Linear(dense("XFW", x, f, w, fan_in=f), zeros("XW", x, w)),
        ),
        norm=norm(),
        head=Linear(dense("WO", w, config.backbone.width, fan_in=w), zeros("O", config.backbone.width)),
    )


def encode_images(
    vision: Vision, config: ModelConfig, images: dict[str, UInt8[AnyArray, "B h w 3"]]
) -> Float[Array, "B image_tokens W"]:
    """The tokens of all cameras, in one batched call, in the order of `config.cameras`. Raises InputError where a
    camera of the config is missing."""
    missing = [name for name in config.cameras if name not in images]
    if missing:
        raise InputError(
            f"observation has cameras {sorted(images)}, config {config.name!r} also expects {missing}; "
            "give a black image with image_mask False for a camera that is absent"
        )

    # The config's order and not the dictionary's: a column's camera is known by its place alone.
    size = config.vision.image_size
    pixels = jnp.stack([resize(images[name], size) for name in config.cameras], axis=1)

    # Cameras join the batch axis: no image sees another before the backbone.
    tokens = _encode(vision, config, pixels.reshape(-1, size, size, 3))
    return tokens.reshape(pixels.shape[0], -1, tokens.shape[-1])


def resize(image: UInt8[AnyArray, "B h w 3"], size: int) -> Float[Array, "B size size 3"]:
    """uint8 → [−1, 1]. A camera of another resolution is resized on the device and padded with black to a square, so
    that nothing is stretched (`insula.letterbox`: the same gray levels as on the host, up to a rare rounding by 1)."""
    pixels = jnp.asarray(image).astype(jnp.float32)
    height, width = image.shape[1:3]
    if (height, width) != (size, size):
        box = letterbox.fit_box((height, width), (size, size))
        pixels = _shrink_or_grow(pixels, box.rows, box.columns)
        below, right = size - box.rows - box.above, size - box.columns - box.left
        # Black before scaling, so −1 after it, as pixels that openpi padded on the host come out.
        pixels = jnp.pad(pixels, ((0, 0), (box.above, below), (box.left, right), (0, 0)))
    return pixels / 127.5 - 1


def _shrink_or_grow(pixels: Float[Array, "B h w 3"], rows: int, columns: int) -> Float[Array, "B rows columns 3"]:
    """Along the width, then along the height; whole gray levels after each, with halves rounded up."""
    height, width = pixels.shape[1:3]
    across, down = letterbox.triangle_weights(width, columns), letterbox.triangle_weights(height, rows)

    # Rounding after each direction is what Pillow does on uint8: without it gray levels differ by one here and there.
    exact = jax.lax.Precision.HIGHEST  # GPUs would multiply with 10 bits, and be off by a gray level
    pixels = jnp.floor(jnp.tensordot(pixels, across, ((2,), (1,)), precision=exact) + 0.5)  # [B, h, 3, columns]
    pixels = jnp.floor(jnp.tensordot(pixels, down, ((1,), (1,)), precision=exact) + 0.5)  # [B, 3, columns, rows]
    return pixels.transpose(0, 3, 2, 1)


def _encode(vision: Vision, config: ModelConfig, x: Float[Array, "I h w 3"]) -> Float[Array, "I P W"]:
    """The stem, then the ViT: every image for itself."""
    c, dtype = config.vision, config.compute.dtype

    # A GELU between two steps of the stem; none before the first, which reads pixels.
    x = layers.enter(x, config.compute)
    for i, (patch, weight) in enumerate(zip(c.patch_sizes, vision.stem, strict=True)):
        x = linear(_patchify(jax.nn.gelu(x) if i else x, patch), weight, dtype)

    x = layers.add_bias(x.reshape(x.shape[0], c.num_patches, c.width), vision.position)

    def layer(x: Array, p: VisionLayer) -> tuple[Array, None]:
        y = layers.layer_norm(x, p.attention_norm.scale, p.attention_norm.bias)
        q, k, v = (linear(y, a, dtype) for a in (p.query, p.key, p.value))
        y = attend(q * q.shape[-1] ** -0.5, k, v, None)  # an image is never padded, so there is no mask
        x = x + layers.add_bias(layers.merge_heads(y, p.out.kernel, dtype), p.out.bias)

        y = layers.layer_norm(x, p.mlp_norm.scale, p.mlp_norm.bias)
        return x + linear(jax.nn.gelu(linear(y, p.up, dtype)), p.down, dtype), None

    x, _ = layers.walk(layer, x, vision.layers, config.compute)

    # No pooling and no class token, as in PaliGemma: the backbone attends to every patch.
    return linear(layers.layer_norm(x, vision.norm.scale, vision.norm.bias), vision.head, dtype)


def _patchify(x: Array, patch: int) -> Array:
    """[I, height, width, c] → [I, height/patch, width/patch, patch·patch·c]: row by row, color last, as SigLIP's kernel
    is stored."""
    images, height, width, channels = x.shape
    rows, columns = height // patch, width // patch

    x = x.reshape(images, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images, rows, columns, patch * patch * channels)
