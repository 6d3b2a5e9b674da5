"""Image augmentation, on the device inside the train step: images travel there as uint8, a quarter of the bytes of
floats, and are changed there rather than by the thread that decodes them, which has enough to do.

Colors of every image (brightness, contrast, saturation, as openpi's trainer does), and crops of those that have an
action. A question may ask where something is, and a crop would move it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from insula.batch import Batch
from insula.model.layers import widen
from insula.shapes import Array, Bool, Float, PRNGKeyArray, UInt8

CROP, BRIGHTNESS, CONTRAST, SATURATION = 0.05, 0.3, 0.4, 0.5  # openpi's; crop: of each side, colors: factor 1 ± this
GRAY = (0.299, 0.587, 0.114)  # luma of red, green and blue (ITU-R BT.601)


def augment(batch: Batch, rng: PRNGKeyArray) -> Batch:
    """The batch with other images, uint8 of the same sizes; every camera and sample drawn by itself."""
    # Questions have no action. One with an action keeps its meaning under a crop: its chunk names no place in an image.
    moved = jnp.any(batch.action_mask, axis=(1, 2))
    cameras = batch.observation.images
    keys = jax.random.split(rng, len(cameras))

    # Sorted, as JAX passes dictionaries: a camera's key does not depend on who built the batch.
    images = {name: _augment(cameras[name], moved, key) for name, key in zip(sorted(cameras), keys, strict=True)}
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, images=images))


def _augment(images: UInt8[Array, "B h w 3"], moved: Bool[Array, "B"], rng: PRNGKeyArray) -> UInt8[Array, "B h w 3"]:
    crop, jitter = jax.random.split(rng)
    x = images.astype(jnp.float32)
    x = jnp.where(moved[:, None, None, None], _crop(x, crop), x)  # all are cropped: rows have no branch of their own

    strength = jnp.array([[BRIGHTNESS, CONTRAST, SATURATION]])
    factors = 1 + strength * jax.random.uniform(jitter, (x.shape[0], 3), minval=-1, maxval=1)
    bright, contrast, saturation = (factors[:, i, None, None, None] for i in range(3))
    x = x * bright
    x = _blend(x, jnp.mean(_gray(x), axis=(1, 2, 3), keepdims=True), contrast)
    x = _blend(x, _gray(x), saturation)

    # Whole gray levels again, as a camera gives them: serving never sees others.
    return jnp.round(jnp.clip(x, 0, 255)).astype(jnp.uint8)


def _crop(x: Float[Array, "B h w 3"], rng: PRNGKeyArray) -> Float[Array, "B h w 3"]:
    """A random window of 1 − CROP of each side, back at full size."""
    height, width = x.shape[1:3]
    scale = jnp.full(2, 1 / (1 - CROP))
    free = jnp.array([height, width]) * (scale - 1)  # pixels that the enlarged image sticks out, so no edge comes in
    shift = -free[None] * jax.random.uniform(rng, (x.shape[0], 2))

    def one(image: Array, translation: Array) -> Array:
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, translation, "bilinear")

    return jax.vmap(one)(x, shift)


def _gray(x: Array) -> Array:
    return jnp.sum(x * widen(jnp.array(GRAY), x.ndim), axis=-1, keepdims=True)


def _blend(x: Array, towards: Array, factor: Array) -> Array:
    """`factor` 1 leaves `x`, 0 gives `towards`; beyond 1 away from it."""
    return towards + factor * (x - towards)
