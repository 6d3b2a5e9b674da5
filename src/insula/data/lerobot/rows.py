"""Columns of rows as numpy arrays and texts. The one place where the length of every row is checked.

A feature of shape [3] is stored as lists of three, one of shape [2, 3] as lists of two lists of three (or of six), one
of shape [1] as numbers, or lists of one; with 32-bit or 64-bit offsets, or of fixed size.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insula.data.lerobot.info import Feature
from insula.data.lerobot.metadata import shown
from insula.errors import DatasetError

_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)


@dataclass(frozen=True)
class BadRows:
    """Why a column is not what the feature says: `row` is the first such row, counted from 0, None where all are."""

    fault: str
    message: str
    row: int | None = None


def numbers(column: pa.ChunkedArray, feature: Feature) -> np.ndarray | BadRows:
    """[rows] for the shape [1], else [rows, *shape], in the feature's dtype; or what is wrong with it."""
    parts, first = [], 0
    for chunk in column.chunks:
        part = _numbers(chunk, feature, first)
        if isinstance(part, BadRows):
            return part
        parts.append(part)
        first += len(chunk)

    shape = () if feature.shape == (1,) else feature.shape

    return np.concatenate(parts) if parts else np.zeros((0, *shape), feature.dtype)


def texts(column: pa.ChunkedArray) -> list[str | None] | BadRows:
    """A text or None for each row; or what is wrong with the column."""
    found: list[str | None] = []
    for chunk in column.chunks:
        values = _lists_undone(chunk, (1,), len(found))
        if isinstance(values, BadRows):
            return values
        # By code: a dictionary may hold one text of a megabyte, once.
        if pa.types.is_dictionary(values.type):
            known = values.dictionary.to_pylist()
            listed = [None if i is None else known[i] for i in values.indices.to_pylist()]
        else:
            listed = values.to_pylist()

        if wrong := next((value for value in listed if not isinstance(value, str | None)), None):
            return BadRows("wrong dtype", f"holds {values.type} such as {shown(wrong)}, expected texts")

        found += listed

    return found


def picture_column(name: str, kind: pa.DataType) -> str:
    """What to read of a column: of pictures, their bytes alone."""
    has_bytes = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    return f"{name}.bytes" if has_bytes else name


def image_files(column: pa.ChunkedArray) -> pa.ChunkedArray | BadRows:
    """The bytes of each picture, null where a row has none."""
    kind = column.type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return BadRows("wrong dtype", f"is {kind}, expected pictures as {{bytes, path}}")

    files = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(files.type) or pa.types.is_large_binary(files.type)):
        return BadRows("wrong dtype", f"has bytes of type {files.type}, expected binary")

    return files


def _numbers(chunk: pa.Array, feature: Feature, first: int) -> np.ndarray | BadRows:
    if pa.types.is_dictionary(chunk.type):
        chunk = pc.cast(chunk, chunk.type.value_type)
    # Before lists are undone: of a text nobody wants to hear that its length is wrong.
    kind = leaf(chunk.type)
    if not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        example = f" such as {shown(chunk[0].as_py())}" if len(chunk) else ""
        return BadRows("wrong dtype", f"holds {chunk.type}{example}, meta/info.json says {feature.dtype}")

    values = _lists_undone(chunk, feature.shape, first)
    if isinstance(values, BadRows):
        return values

    size = int(np.prod(feature.shape))

    if values.null_count:
        at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        where = f" in dimension {at % size}" if size > 1 else ""
        return BadRows(
            "null", f"is null{where}, expected {feature.dtype} ({values.null_count} nulls)", first + at // size
        )

    array = values.to_numpy(zero_copy_only=False)
    # Each value is compared with what it became: a cast alone would cut off 2.5 and wrap 300 around.
    to_integers = array.dtype.kind in "iuf" and np.dtype(feature.dtype).kind in "iu"
    if not (to_integers or np.can_cast(array.dtype, feature.dtype, "same_kind")):
        return BadRows("wrong dtype", f"holds {array.dtype}, meta/info.json says {feature.dtype}")

    with np.errstate(over="ignore", invalid="ignore"):  # too large becomes infinity, which is refused as such
        cast = array.astype(feature.dtype, copy=False)
    if to_integers and len(wrong := np.flatnonzero(cast != array)):  # whole numbers may be stored as any kind
        message = f"is {array[wrong[0]]}, which {feature.dtype} cannot hold, as meta/info.json says"
        return BadRows("wrong dtype", message, first + int(wrong[0]) // size)

    return cast.reshape(len(chunk), *(() if feature.shape == (1,) else feature.shape))


def _lists_undone(chunk: pa.Array, shape: tuple[int, ...], first: int) -> pa.Array | BadRows:
    """The values of all rows, one row after another, once every list at every depth has its length."""
    depth, kind = 0, chunk.type
    while _is_list(kind):
        depth, kind = depth + 1, kind.value_type
    size = int(np.prod(shape))
    # Lists as deep as the shape, or one flat list, or a bare number.
    expected = shape if depth == len(shape) else (size,) * min(depth, 1)
    if depth not in (0, 1, len(shape)) or (depth == 0 and size > 1):
        held = "one value" if depth == 0 else f"lists {depth} deep"
        return BadRows("wrong shape", f"has {held} in each row, expected {list(shape)} ({chunk.type})")

    values, per_row = chunk, 1
    for length in expected:
        if values.null_count:
            at = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            said = f"is null, expected {_said(shape)} ({values.null_count} such rows)"
            return BadRows("null", said, first + at // per_row)

        # The length of each row, never their sum: rows of 6 and 8 would pass as two of 7.
        got = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        if len(wrong := np.flatnonzero(got != length)):
            rows = len(np.unique(wrong // per_row))
            lengths = np.unique(got[wrong]).tolist()[:5]
            of = f", of {' or '.join(map(str, lengths))} values" if len(lengths) > 1 else ""
            said = f"has {got[wrong[0]]} values, expected {_said(shape)} ({rows} such rows{of})"
            return BadRows("wrong shape", said, first + int(wrong[0]) // per_row)

        # flatten() heeds offsets and slices, which the child array would not.
        values, per_row = values.flatten(), per_row * length

    return values


def _said(shape: tuple[int, ...]) -> str:
    return str(shape[0]) if len(shape) == 1 else str(list(shape))


def leaf(kind: pa.DataType) -> pa.DataType:
    """The type of the values inside all lists."""
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def refuse(bad: BadRows, what: str) -> DatasetError:
    """The error to raise; `what` says which column of which file, episode and frame."""
    return DatasetError(f"{what} {bad.message}", bad.fault)
