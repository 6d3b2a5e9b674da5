"""Images as PNG bytes and back."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from insula import letterbox
from insula.errors import DatasetError, InputError

PNG = b"\x89PNG\r\n\x1a\n"
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")


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
    """uint8 [T, h, w, 3] to PNG. Raises ValueError for another shape or dtype."""
    stack = np.stack(images) if not isinstance(images, np.ndarray) else images
    if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 3:
        raise InputError(f"images: got {stack.dtype}{list(stack.shape)}, expected uint8 [frames, height, width, 3]")
    return EncodedImages(tuple(map(encode_png, stack)), histogram(stack), (stack.shape[1], stack.shape[2]))


def decode_image(data: bytes, size: tuple[int, int], where: str) -> np.ndarray:
    """Encoded bytes to uint8 [h, w, 3]. Raises DatasetError, naming `where`, for another size or damaged bytes."""

    def check(width: int, height: int) -> None:
        if (height, width) != size:
            raise DatasetError(
                f"{where}: the image is {height}×{width} (height×width), info.json says {size[0]}×{size[1]}; correct "
                "the feature's shape or record the frame anew"
            )

    return decode_any(data, where, check)


def decode_any(data: bytes, where: str, check: Callable[[int, int], None] | None = None) -> np.ndarray:
    """The same for an image of any size. `check(width, height)` is called before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            if check:
                check(*image.size)
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        if isinstance(e, DatasetError):
            raise
        raise DatasetError(
            f"{where}: unreadable image ({len(data)} bytes: {e}); expected {', '.join(PICTURE_FORMATS)}. "
            "Remove the episode or restore the file"
        ) from None


def resize_with_pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] to `size` (height, width): shrunk or grown without stretching, the rest black, as the device
    does it (`insula.letterbox`). For pictures of several sizes in one batch; others travel as they are."""
    if image.shape[:2] == size:
        return image
    box = letterbox.fit_box((image.shape[0], image.shape[1]), size)
    inner = Image.fromarray(image).resize((box.columns, box.rows), Image.Resampling.BILINEAR)
    out = np.zeros((*size, 3), np.uint8)
    out[box.above : box.above + box.rows, box.left : box.left + box.columns] = np.asarray(inner)
    return out


def histogram(images: np.ndarray) -> np.ndarray:
    """How often each value occurs per channel: uint8 [..., 3] to int64 [3, 256]."""
    return np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(3)])
