"""Align image tokens with words before any sentence is read: SigLIP's sigmoid loss (Zhai et al. 2023), patch by patch.

A backbone that starts from noise learns to ignore its images before it learns to look. So each image token is first
taught which named things have their center in its patch, by similarity to the words' own embeddings, and where in the
patch, by a small head that is thrown away afterwards.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from insula.collect.scenes import THING_NAMES
from insula.model.backbone import Backbone
from insula.model.config import ModelConfig
from insula.model.vision import Vision, encode_images
from insula.shapes import Array, Float, Int
from insula.tokens.text import TextTokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """Sigmoid temperature and bias, scalars, and `offset` [W, names, 2], which reads (y, x) inside a patch off its
    token."""

    scale: Array
    bias: Array
    offset: Array

    @classmethod
    def start(cls, width: int) -> "Head":
        """For image tokens of this width. With a bias of −4 the sigmoid starts at 2 %, about the share of (patch, name)
        pairs that belong together, so no update goes into learning that most do not (SigLIP, §3.2, there −10)."""
        return cls(jnp.asarray(10.0), jnp.asarray(-4.0), jnp.zeros((width, len(THING_NAMES), 2)))


def name_tokens(text: TextTokenizer) -> Int[np.ndarray, "n words"]:
    """Token ids of each of `THING_NAMES` as it stands inside a sentence, padded by repeating the last."""
    rows = [text.encode(f" {name}") for name in THING_NAMES]  # with the space: a tokenizer has other entries without
    longest = max(map(len, rows))
    return np.array([row + row[-1:] * (longest - len(row)) for row in rows])


def grounding_loss(
    vision: Vision,
    backbone: Backbone,
    head: Head,
    config: ModelConfig,
    words: Int[Array, "n words"],
    images: dict[str, Array],
    places: dict[str, Float[Array, "B n 2"]],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Sigmoid loss over (patch, name) pairs plus the squared error of offsets where a name is present.

    `places[camera]`: (y, x) of each name as fractions of the image, NaN where it does not show (`Scenes.places`). Also
    returns both parts, and "found": the share of present names that their patch is said to show.
    """
    tokens = encode_images(vision, config, images)
    where = jnp.stack([places[name] for name in config.cameras], axis=1)  # [B, C, n, 2]
    grid = config.vision.grid

    # NaN becomes the first patch for now, which `present` takes back: indices must be numbers.
    cell = jnp.clip(jnp.nan_to_num(where) * grid, 0, grid - 1e-4)
    row, column = jnp.moveaxis(jnp.floor(cell).astype(jnp.int32), -1, 0)
    present = jax.nn.one_hot(row * grid + column, grid * grid, axis=2)
    present = jnp.where(jnp.isfinite(where[..., :1]).swapaxes(2, 3), present, 0.0)  # [B, C, P, n]
    present = present.reshape(tokens.shape[0], tokens.shape[1], -1)

    unit = tokens / (jnp.linalg.norm(tokens, axis=-1, keepdims=True) + 1e-6)
    names = jnp.mean(backbone.embedding[words], axis=1)
    names = names / (jnp.linalg.norm(names, axis=-1, keepdims=True) + 1e-6)
    logits = head.scale * unit @ names.T + head.bias
    # By the number of names, not of pairs: nearly all pairs are negatives, and would thin out what there is to learn.
    sigmoid = jnp.sum(jax.nn.softplus(jnp.where(present > 0, -logits, logits))) / jnp.sum(present)

    inside = (cell - jnp.floor(cell) - 0.5)[:, :, None]  # [B, C, 1, n, 2]
    inside = jnp.broadcast_to(inside, (*where.shape[:2], grid * grid, *where.shape[2:]))
    error = jnp.square(jnp.tensordot(tokens, head.offset, axes=1) - inside.reshape(*present.shape, 2))
    offset = jnp.sum(error * present[..., None]) / jnp.sum(present)
    found = jnp.sum((logits > 0) & (present > 0)) / jnp.sum(present)

    return sigmoid + 10 * offset, {"sigmoid": sigmoid, "offset": offset, "found": found}
