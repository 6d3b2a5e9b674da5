"""Images as PNG bytes and back."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from insula import letterbox
from insula.errors import DatasetError, InputError

PNG = b"\x89PNG\r\n\x1a\n"
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
NOT_COLOR = "not 8-bit color"
"""The doctor's name for it."""
COLOR_REMEDY = "write such values as numbers, or scale them to 8-bit RGB in a way you can state"
_PNG_DEPTH = 24
"""Where a PNG says how many bits a channel has; the byte behind says which channels there are."""
_EXACT_IN_COLOR = ("L", "P", "1")
_MODES = {
    "1": "black and white",
    "L": "8-bit gray, one channel",
    "LA": "8-bit gray with alpha",
    "P": "a palette",
    "PA": "a palette with alpha",
    "RGBA": "color with alpha",
    "CMYK": "CMYK",
    "I": "32-bit gray",
    "I;16": "16-bit gray",
    "F": "floating-point gray",
}


@dataclass(frozen=True)
class EncodedImages:
    """The frames of one camera: `files` [T] byte strings (PNG, JPEG, WEBP), `histogram` int64 [3, 256] of their pixels,
    (height, width)."""

    files: tuple[bytes, ...]
    histogram: np.ndarray
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class EncodedVideo:
    """The `frames` of one camera as a part of a video file, the first at `start` seconds; the other fields as above."""

    path: Path
    frames: int
    histogram: np.ndarray
    size: tuple[int, int]
    start: float = 0.0

    def __len__(self) -> int:
        return self.frames


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3] to PNG, losslessly.

    Rows are left unfiltered: on rendered images a quarter smaller than Pillow's choice of filters, five times faster to
    write and twice as fast to read. (Photographs would be somewhat larger.)
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # a row begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    pixels = zlib.compress(rows.tobytes(), level=1)

    return PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode_pngs(images: Sequence[np.ndarray] | np.ndarray) -> EncodedImages:
    """uint8 [T, h, w, 3] to PNG. Raises InputError for another shape or dtype."""
    # Frames come as a list from a simulator, as one array from files.
    stack = np.stack(images) if not isinstance(images, np.ndarray) else images
    if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 3:
        raise InputError(f"images: got {stack.dtype}{list(stack.shape)}, expected uint8 [frames, height, width, 3]")
    return EncodedImages(tuple(map(encode_png, stack)), histogram(stack), (stack.shape[1], stack.shape[2]))


def decode_image(data: bytes, size: tuple[int, int], where: str) -> np.ndarray:
    """Encoded bytes of a recorded frame to uint8 [h, w, 3], turned as its EXIF orientation asks.

    Raises DatasetError, naming `where`, for another size, damaged bytes, or anything but 8-bit color: what 16 bits, an
    alpha channel or a palette mean is the recorder's secret, and a guess would teach wrong pictures. Gray of 8 bits, as
    a mono camera's, is shown as gray, which is exact.
    """

    def check(image: Image.Image) -> None:
        kind = _not_8_bit_color(image, data)
        if kind and image.mode != "L":
            raise DatasetError(f"{where}: the picture is {kind}, expected 8-bit color; {COLOR_REMEDY}", NOT_COLOR)

        height, width = _upright_size(image, size)
        if (height, width) != size:
            raise DatasetError(
                f"{where}: the image is {height}×{width} (height×width), info.json says {size[0]}×{size[1]}; correct "
                "the feature's shape or record the frame again",
                "picture size",
            )

    return _decode(data, where, check)


def decode_any(data: bytes, where: str) -> np.ndarray:
    """The same for an image of any size and for whatever 8-bit color can hold exactly: gray and palettes as well."""

    def check(image: Image.Image) -> None:
        kind = _not_8_bit_color(image, data)
        if kind and (image.mode not in _EXACT_IN_COLOR or _is_transparent(image)):
            raise DatasetError(f"{where}: the picture is {kind}, expected 8-bit color; {COLOR_REMEDY}", NOT_COLOR)

    return _decode(data, where, check)


def _decode(data: bytes, where: str, check: Callable[[Image.Image], None]) -> np.ndarray:
    """`check` is called before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            check(image)
            # LeRobot's loader turns them as well: an upside-down camera is recorded with a flag alone.
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as e:
        raise DatasetError(
            f"{where}: unreadable image ({len(data)} bytes: {e}); expected {', '.join(PICTURE_FORMATS)}. "
            "Remove the episode or restore the file",
            "unreadable image",
        ) from None


def _not_8_bit_color(image: Image.Image, data: bytes) -> str | None:
    """What it is instead, in words; None for 8-bit color."""
    # Pillow opens color of 16 bits as RGB and drops the lower half: only the header knows.
    if data.startswith(PNG) and len(data) > _PNG_DEPTH and data[_PNG_DEPTH] > 8:
        channels = {0: "gray", 2: "color", 4: "gray with alpha", 6: "color with alpha"}
        return f"{data[_PNG_DEPTH]}-bit {channels.get(data[_PNG_DEPTH + 1], 'of an unknown kind')}"

    if getattr(image, "n_frames", 1) > 1:
        return f"an animation of {image.n_frames} frames"  # type: ignore[attr-defined]
    if image.mode == "RGB":
        return "color with a transparent value" if _is_transparent(image) else None

    return _MODES.get(image.mode, f"of Pillow's mode {image.mode}")


def _is_transparent(image: Image.Image) -> bool:
    return "transparency" in image.info


def _upright_size(image: Image.Image, expected: tuple[int, int]) -> tuple[int, int]:
    """(height, width) once the picture is upright."""
    size = (image.height, image.width)
    if expected not in (size, size[::-1]):  # asking a PNG for its EXIF decodes it, whatever its size
        return size

    on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return size[::-1] if on_its_side else size


def resize_with_pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] to `size` (height, width): shrunk or grown without stretching, the rest black, as the device
    does it (`insula.letterbox`). For pictures of several sizes in one batch; others travel as they are."""
    if image.shape[:2] == size:
        return image

    box = letterbox.fit_box((image.shape[0], image.shape[1]), size)
    # Pillow's bilinear filter averages over all pixels it covers when shrinking, as the device does.
    inner = Image.fromarray(image).resize((box.columns, box.rows), Image.Resampling.BILINEAR)
    out = np.zeros((*size, 3), np.uint8)
    out[box.above : box.above + box.rows, box.left : box.left + box.columns] = np.asarray(inner)

    return out


def histogram(images: np.ndarray) -> np.ndarray:
    """How often each value occurs per channel: uint8 [..., 3] to int64 [3, 256]."""
    # One pass for each channel: np.histogram would sort 200,000 pixels into floating bins.
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
