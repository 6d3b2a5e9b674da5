"""How a picture of one size becomes one of another: shrunk or grown without stretching, in the middle, the rest black.

This is openpi's `resize_with_pad`, down to the last gray level. openpi trains and serves with Pillow's bilinear filter,
which is a triangle as wide as the step between the new pixels (so every old pixel counts when a picture shrinks), first
along the rows, then along the columns, each rounded to whole gray levels. The host calls Pillow, the device multiplies
with the weights from here; both take the place from here.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Box:
    """Where a picture lies in the frame: `rows` × `columns` pixels, with `above` and `left` of them black before it."""

    rows: int
    columns: int
    above: int
    left: int


def fit_box(picture: tuple[int, int], frame: tuple[int, int]) -> Box:
    """The box for a picture in a frame, both (height, width).

    The size is computed in floating point and cut off, as openpi and LeRobot do it: 260×256 in 224×224 takes 223 rows,
    where exact arithmetic would give 224. A model that was trained there saw that black row.
    """
    ratio = max(picture[1] / frame[1], picture[0] / frame[0])
    rows, columns = (max(1, int(side / ratio)) for side in picture)  # at least 1: a line of pixels stays one

    return Box(rows, columns, above=(frame[0] - rows) // 2, left=(frame[1] - columns) // 2)


def triangle_weights(old: int, new: int) -> np.ndarray:
    """float32 [new, old]: what each of the `old` pixels of a line adds to each of the `new` ones. Rows add up to 1."""
    step = old / new  # old pixels from one new one to the next
    centers = (np.arange(new) + 0.5) * step
    distance = np.abs(np.arange(old) + 0.5 - centers[:, None])

    # No narrower than an old pixel where a picture grows. Divided by the sum: at an edge part of a triangle is missing.
    weights = np.maximum(0.0, 1.0 - distance / max(step, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
