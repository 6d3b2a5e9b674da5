"""Pictures of other sizes than the model's: one formula on host and device, openpi's, and how LeRobot's differs."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from insula.data.images import resize_with_pad
from insula.letterbox import fit_box, triangle_weights
from insula.model.vision import resize

SIZES = [
    *[(260, 256), (256, 260), (480, 640), (640, 480), (100, 75), (75, 100), (30, 40), (224, 224), (224, 100)],
    *[(1, 1), (1, 300), (300, 1), (1000, 3), (223, 225), (225, 223), (448, 448), (449, 447), (7, 5), (720, 1280)],
]
"""(height, width)"""


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Noise, and hard edges: all that a filter could show."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    image[: size[0] // 3, : size[1] // 2] = 255
    image[size[0] // 2 :, size[1] // 2 :] = 0
    return image


def on_the_device(image: np.ndarray, size: int) -> np.ndarray:
    """In grey levels."""
    return (np.asarray(resize(image[None], size)[0], np.float64) + 1) * 127.5


def openpi_client(image: np.ndarray, size: int) -> np.ndarray:
    """What openpi's transform of pictures does, by Pillow alone."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    ratio = max(width / size, height / size)
    inner = Image.fromarray(image).resize((int(width / ratio), int(height / ratio)), resample=Image.Resampling.BILINEAR)
    frame = Image.new("RGB", (size, size), 0)
    frame.paste(inner, (max(0, int((size - inner.width) / 2)), max(0, int((size - inner.height) / 2))))
    return np.asarray(frame)


@pytest.mark.parametrize("into", [224, 64, 17])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_host_and_device_are_one_formula(size: tuple[int, int], into: int) -> None:
    image = picture(size)
    host, device = resize_with_pad(image, (into, into)).astype(float), on_the_device(image, into)
    difference = np.abs(host - device)
    assert difference.max() <= 1.0 + 1e-3 and np.mean(difference > 0.5) < 0.05  # halves, rounded the other way
    assert device.min() >= -1e-3 and device.max() <= 255 + 1e-3


@pytest.mark.parametrize("into", [224, 64])
@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 4], ids=str)
def test_it_is_what_openpi_trains_with(size: tuple[int, int], into: int) -> None:
    image = picture(size)
    np.testing.assert_array_equal(resize_with_pad(image, (into, into)), openpi_client(image, into))


def test_random_sizes() -> None:
    rng = np.random.default_rng(1)
    for seed, (height, width) in enumerate(rng.integers(1, 700, (12, 2)).tolist()):
        image = picture((height, width), seed)
        host = resize_with_pad(image, (224, 224)).astype(float)
        assert np.abs(host - on_the_device(image, 224)).max() <= 1.0 + 1e-3, (height, width)


def test_a_size_that_floating_point_cuts_off() -> None:
    """The black row is where both targets put it; computed in whole numbers, everything would be a row off."""
    box = fit_box((260, 256), (224, 224))
    assert (box.rows, box.columns, box.above, box.left) == (223, 220, 0, 2)
    assert not on_the_device(np.full((260, 256, 3), 255, np.uint8), 224)[-1].any()


@pytest.mark.parametrize(("old", "new"), [(640, 224), (30, 224), (224, 224), (1, 9), (9, 1), (261, 224)])
def test_weights(old: int, new: int) -> None:
    weights = triangle_weights(old, new)
    assert weights.shape == (new, old) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)  # no side is preferred
    if old > new:
        assert (weights.sum(0) > 0).all()  # no old pixel is passed over
    if old == new:
        np.testing.assert_array_equal(weights, np.eye(old, dtype=np.float32))


def test_bars_are_black_and_nothing_is_stretched() -> None:
    pixels = np.asarray(resize(np.full((1, 48, 64, 3), 255, np.uint8), 32))[0]
    assert (pixels[:4] == -1).all() and (pixels[28:] == -1).all() and (pixels[4:28] == 1).all()


def lerobot(image: np.ndarray, size: int) -> np.ndarray:
    """LeRobot's formula, in grey levels: no filter when a picture shrinks."""
    torch = pytest.importorskip("torch")
    height, width = image.shape[:2]
    ratio = max(width / size, height / size)
    rows, columns = int(height / ratio), int(width / ratio)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    inner = torch.nn.functional.interpolate(pixels, size=(rows, columns), mode="bilinear", align_corners=False)
    out, above, left = np.zeros((size, size, 3)), (size - rows) // 2, (size - columns) // 2
    out[above : above + rows, left : left + columns] = inner[0].permute(1, 2, 0).numpy()
    return out


@pytest.mark.parametrize("size", [(30, 40), (128, 224), (100, 75)], ids=str)
def test_lerobot_agrees_where_nothing_shrinks(size: tuple[int, int]) -> None:
    """And where a picture shrinks, it differs: so says docs/checkpoints.md."""
    image = picture(size)
    assert np.abs(lerobot(image, 224) - on_the_device(image, 224)).max() <= 1.01
    assert np.abs(lerobot(image, 16) - on_the_device(image, 16)).max() > 50


def test_already_the_right_size_is_untouched() -> None:
    image = picture((64, 64))
    assert resize_with_pad(image, (64, 64)) is image
    np.testing.assert_array_equal(resize(image[None], 64)[0], jnp.asarray(image, jnp.float32) / 127.5 - 1)
