"""Numbers and arrays as plain values, which JSON can hold and the page's script can read."""

import base64
import zlib
from typing import Any

import numpy as np


def pack(array: np.ndarray) -> dict[str, Any]:
    """Deflated, in base64: masks of a million cells take a few kilobytes. float32 keeps four digits."""
    if array.dtype.kind == "f":
        # The last 13 of 23 bits of a float32 hardly compress, and no eye can tell them.
        whole = np.ascontiguousarray(array, np.float32).view(np.uint32)
        array = (whole & np.uint32(0xFFFFE000)).view(np.float32)

    # What the script's `unpack` knows; another would be read as garbage.
    assert array.dtype in (np.uint8, np.float32)
    raw = zlib.compress(np.ascontiguousarray(array).tobytes(), 9)
    return {"dtype": str(array.dtype), "shape": array.shape, "data": base64.b64encode(raw).decode("ascii")}


def rounded(value: Any, digits: int = 5) -> float | None:
    """JSON has no NaN: None where it is not finite. A page has no use for sixteen digits."""
    return float(f"{float(value):.{digits}g}") if np.isfinite(value) else None


def rounded_rows(array: np.ndarray) -> Any:
    """Of any rank, as nested lists."""
    return [rounded_rows(row) if row.ndim else rounded(row) for row in array]
