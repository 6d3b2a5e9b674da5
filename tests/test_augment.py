"""Augmentation on the device: what it changes, and what it must leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, difference, jit, model, replace_observation

from insula.batch import Batch
from insula.train import augment as augmentation
from insula.train.augment import augment
from insula.train.step import make_train_state, make_train_step


@pytest.fixture
def batch() -> Batch:
    """Four samples with a bright square, the last without any action."""
    _, batch = model(SMALL, batch_size=4)
    image = np.full((4, 16, 16, 3), 60, np.uint8)
    image[:, 4:9, 4:9] = (180, 120, 90)
    batch = replace_observation(batch, images={name: jnp.asarray(image) for name in SMALL.cameras})
    return dataclasses.replace(batch, action_is_pad=batch.action_is_pad.at[3].set(True))


def run(batch: Batch, seed: int = 0) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in jax.jit(augment)(batch, jax.random.key(seed)).observation.images.items()}


def test_images_stay_images_and_each_is_drawn_by_itself(batch: Batch) -> None:
    seen = run(batch)
    front = seen["front"]
    assert front.dtype == np.uint8 and front.shape == (4, 16, 16, 3)
    assert len({front[n].tobytes() for n in range(4)}) == 4 and not np.array_equal(front, seen["wrist"])
    assert np.array_equal(run(batch)["front"], front) and not np.array_equal(run(batch, 1)["front"], front)


def test_only_pictures_change(batch: Batch) -> None:
    changed = jax.jit(augment)(batch, jax.random.key(0))
    same = batch.observation.images
    assert difference(replace_observation(changed, images=same), replace_observation(batch, images=same)) == 0


def edges(image: np.ndarray) -> np.ndarray:
    """Where the square is, whatever its colors: pixels unlike the corner."""
    return np.abs(image.astype(int) - image[0, 0]).sum(-1) > 0


def test_a_sample_without_an_action_is_not_moved(batch: Batch) -> None:
    before = edges(np.asarray(batch.observation.images["front"])[0])
    for seed in range(5):
        seen = run(batch, seed)["front"]
        assert np.array_equal(edges(seen[3]), before)
        assert not all(np.array_equal(edges(seen[n]), before) for n in range(3))


def test_without_strength_nothing_changes(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CROP", "BRIGHTNESS", "CONTRAST", "SATURATION"):
        monkeypatch.setattr(augmentation, name, 0.0)
    still = augment(batch, jax.random.key(0)).observation.images
    assert difference(still, batch.observation.images) == 0
    ours, plain = losses(batch)
    assert ours == plain


def test_the_loss_sees_the_augmented_images(batch: Batch) -> None:
    ours, plain = losses(batch)
    assert abs(ours - plain) > 1e-4


def losses(batch: Batch) -> list[float]:
    """Of a train step with and without augmentation, from the same draws of noise and time."""
    params, _ = model(SMALL, batch_size=4)
    optimizer = optax.sgd(0.0)
    steps = (make_train_step(SMALL, optimizer, 0.9, jax.random.key(2), prepare=change) for change in (augment, None))
    return [float(jit(step)(make_train_state(params, optimizer), batch)[1]["total"]) for step in steps]
