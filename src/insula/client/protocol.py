"""openpi's WebSocket protocol, read by both sides as if the other were hostile.

    server ─► client   metadata, once                                    msgpack, one binary message
    client ─► server   an observation                                    msgpack, one binary message
    server ─► client   {"actions", "policy_timing", "server_timing"}     msgpack, one binary message
                       and where it acts on subtasks {"subtask", "subtask_age"}
           or          {"error", "field", "message"}                     JSON, one text message

As openpi-client writes them, arrays are maps {b"__ndarray__": True, b"data", b"dtype", b"shape"}, and scalars
{b"__npgeneric__": True, b"data", b"dtype"}. An array is a view of the bytes that came: nothing is ever allocated from a
claimed shape.
"""

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from insula.errors import ProtocolError, printable

MIB = 2**20
ARRAY, SCALAR = "__ndarray__", "__npgeneric__"
BFLOAT16 = "bfloat16"
"""NumPy has no such type; the name is that of ml_dtypes. Read as float32, exactly."""
DTYPES = {
    **{spelled: np.dtype("u1") for spelled in ("|u1", "uint8")},
    **{spelled: np.dtype("?") for spelled in ("|b1", "bool")},
    **{spelled: np.dtype("<i4") for spelled in ("<i4", "int32")},
    **{spelled: np.dtype("<i8") for spelled in ("<i8", "int64")},
    **{spelled: np.dtype("<f4") for spelled in ("<f4", "float32")},
    **{spelled: np.dtype("<f8") for spelled in ("<f8", "float64")},
}
"""What an array may be made of. By a table, and not by `np.dtype`, whose language has records and objects in it."""


class ErrorKind(enum.StrEnum):
    """Why there are no actions. Only `SUPERSEDED`, `STALE`, `OVERLOADED` and `STOPPING` may be asked again as it is."""

    MALFORMED = "malformed"
    """Not a message of this protocol."""
    LIMIT = "limit"
    """Larger, deeper or longer than the server reads."""
    INVALID = "invalid"
    """An observation this policy cannot act on."""
    SUPERSEDED = "superseded"
    """A newer observation came over the same connection before this one was looked at."""
    STALE = "stale"
    """It waited longer than its `max_age_ms`."""
    OVERLOADED = "overloaded"
    """Too many requests wait already."""
    STOPPING = "stopping"
    """The server is shutting down."""
    UNAUTHORIZED = "unauthorized"
    """The API key is missing or wrong. Never sent as a frame: such a connection is refused."""
    FAILED = "failed"
    """The policy failed, or its actions were not finite. Never answered by zeros."""
    UNDECODED = "undecoded"
    """What the policy said is no chunk, or no subtask: of another observation it may say one."""


PASSING = frozenset({"superseded", "stale", "overloaded", "stopping", "undecoded"})
"""Kinds that say nothing of the next observation."""


@dataclass(frozen=True)
class Limits:
    """What is read of one message; anything beyond is refused before it is looked at."""

    message: int = 16 * MIB
    """Bytes."""
    depth: int = 8
    """Maps in maps, lists in lists."""
    keys: int = 256
    """Of one map."""
    values: int = 65_536
    """Entries of all maps and lists together."""
    arrays: int = 64
    text: int = 8192
    """Bytes of one text or key."""
    numbers: int = 65_536
    """Of one array that is no picture (not uint8)."""
    pixels: int = 4 * MIB
    """Values of one picture, all colors: 1180 × 1180."""


LIMITS = Limits()
LARGEST_SIZE = 4096
"""Of anything in a server's metadata: pixels of a side, dimensions, steps."""


# --- writing ---------------------------------------------------------------------------------------------------------


def pack(message: Mapping[str, Any]) -> bytes:
    """One binary message. Raises ProtocolError naming the value that cannot be sent."""
    try:
        return msgpack.packb(message, default=_pack_array)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError("malformed", "", f"this cannot be sent: {error}") from None


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        # NumPy's own spelling for bfloat16 is "<V2", which would say nothing about what it is.
        name = BFLOAT16 if value.dtype.name == BFLOAT16 else value.dtype.newbyteorder("<").str
        if name != BFLOAT16 and name not in DTYPES:
            raise ValueError(f"an array of {value.dtype}; expected one of {', '.join(expected_dtypes())}")

        # Little-endian on the wire whatever the machine is.
        raw = value if name == BFLOAT16 else value.astype(DTYPES[name], copy=False)
        return {b"__ndarray__": True, b"data": raw.tobytes(), b"dtype": name, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}

    raise TypeError(f"a {type(value).__name__}; expected text, numbers, arrays, and maps and lists of them")


def error_frame(kind: ErrorKind, field: str, message: str) -> str:
    """A refusal as one text message, which openpi's client shows as it is."""
    return json.dumps({"error": kind, "field": field, "message": message}, ensure_ascii=False)


# --- reading ---------------------------------------------------------------------------------------------------------


def unpack(raw: bytes | str, limits: Limits = LIMITS) -> dict[str, Any]:
    """One message as plain values and arrays, which are read-only views of `raw`'s bytes.

    Raises ProtocolError naming the field and what is wrong with it, before anything large is allocated.
    """
    if isinstance(raw, str):
        raise ProtocolError(ErrorKind.MALFORMED, "", "a text message; expected a binary one, in msgpack")
    if len(raw) > limits.message:
        raise ProtocolError(ErrorKind.LIMIT, "", f"{len(raw)} bytes, at most {limits.message} are read")

    parts = _parse(raw, limits)
    if not isinstance(parts, dict):
        raise ProtocolError(ErrorKind.MALFORMED, "", f"holds {_kind(parts)}, expected a map")

    return _Reader(limits).map(parts, "", limits.depth)


def read_error(text: str) -> tuple[str, str, str]:
    """(kind, field, message) of a text message. A server of others writes what it likes: all of it is the message."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return ErrorKind.FAILED, "", printable(text)
    if not isinstance(said, dict) or not isinstance(said.get("message"), str):
        return ErrorKind.FAILED, "", printable(text)

    return printable(str(said.get("error")), 80), printable(str(said.get("field", "")), 200), printable(said["message"])


def check_metadata(told: Mapping[str, Any]) -> None:
    """What a client builds on, where it is there: numbers that are sizes, names that are text.

    Raises ProtocolError naming the first entry that is not.
    """
    for name in ("image_size", "state_dim", "action_dim", "horizon", "rtc_max_delay"):
        value = told.get(name)
        if value is not None and not (_is_size(value) and value <= LARGEST_SIZE):
            raise ProtocolError(ErrorKind.MALFORMED, name, f"the server says {value!r:.60}, expected a size")

    cameras = told.get("cameras", [])
    if not isinstance(cameras, list) or len(cameras) > 64 or not all(isinstance(name, str) for name in cameras):
        raise ProtocolError(ErrorKind.MALFORMED, "cameras", f"the server says {cameras!r:.60}, expected names")


def _parse(raw: bytes, limits: Limits) -> Any:
    """msgpack's own values. Its limits hold for one list or map at a time, so all entries are counted, too."""
    left = limits.values

    def counted(container: Any) -> Any:
        nonlocal left
        left -= len(container)
        if left < 0:
            raise ProtocolError(ErrorKind.LIMIT, "", f"more than {limits.values} entries in its maps and lists")
        return container

    def refused(code: int, data: bytes) -> Any:
        raise ProtocolError(ErrorKind.MALFORMED, "", f"a msgpack extension ({code}); expected plain values and arrays")

    try:
        return msgpack.unpackb(
            raw,
            strict_map_key=False,  # openpi writes the keys of arrays as bytes
            object_hook=counted,
            list_hook=counted,
            ext_hook=refused,
            max_str_len=limits.text,
            max_array_len=4096,
            max_map_len=limits.keys,
            max_ext_len=16,
        )
    except ProtocolError:
        raise
    except (msgpack.exceptions.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        # A list as a key, half a message, bytes behind its end, text that is no UTF-8, a limit of those above.
        said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        kind = ErrorKind.LIMIT if "exceeds max" in said else ErrorKind.MALFORMED
        raise ProtocolError(kind, "", f"cannot be read as msgpack: {said}") from None


class _Reader:
    """Turns msgpack's values into ours, with the name of the place it is at."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.arrays = 0

    def map(self, parts: dict, where: str, depth: int) -> dict[str, Any]:
        """Keys are text, or bytes that are text."""
        read = {}
        for key, value in parts.items():
            name = _text(key)
            if name is None:
                raise ProtocolError(ErrorKind.MALFORMED, where, f"a key is {_kind(key)}, expected text")
            if name in read:
                raise ProtocolError(ErrorKind.MALFORMED, where, f"the key {name!r:.80} is there twice")

            read[name] = self.value(value, f"{where}.{name}" if where else name, depth - 1)

        return read

    def value(self, value: Any, where: str, depth: int) -> Any:
        if depth < 0:
            raise ProtocolError(ErrorKind.LIMIT, where[:200], f"nested deeper than {self.limits.depth}")

        if isinstance(value, dict):
            names = {_text(key) for key in value}
            if ARRAY in names:
                return self.array(value, where)
            if SCALAR in names:
                return _scalar(value, where)
            return self.map(value, where, depth)
        if isinstance(value, list):
            return [self.value(entry, where, depth - 1) for entry in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value

        raise ProtocolError(
            ErrorKind.MALFORMED, where, f"{_kind(value)}; expected text, numbers, arrays, maps or lists"
        )

    def array(self, parts: dict, where: str) -> np.ndarray:
        """A view of the bytes that came, as float32 where they are bfloat16."""
        self.arrays += 1
        if self.arrays > self.limits.arrays:
            raise ProtocolError(ErrorKind.LIMIT, where, f"more than {self.limits.arrays} arrays")

        named = {_text(key): value for key, value in parts.items()}
        data, spelled, shape = named.get("data"), _text(named.get("dtype")), named.get("shape")
        if not isinstance(data, bytes):
            raise ProtocolError(ErrorKind.MALFORMED, where, f"an array whose data are {_kind(data)}, expected bytes")
        if spelled != BFLOAT16 and spelled not in DTYPES:
            expected = ", ".join(expected_dtypes())
            raise ProtocolError(ErrorKind.MALFORMED, where, f"an array of {spelled!r:.40}, expected one of {expected}")
        if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(size) for size in shape):
            raise ProtocolError(ErrorKind.MALFORMED, where, f"an array of shape {shape!r:.60}, expected up to 8 sizes")

        # Python's own integers: a product of claimed sizes cannot overflow to the number of bytes that came.
        dtype = np.dtype("<u2") if spelled == BFLOAT16 else DTYPES[spelled]
        count = math.prod(shape)
        if count * dtype.itemsize != len(data):
            raise ProtocolError(
                ErrorKind.MALFORMED, where, f"{len(data)} bytes, expected {count * dtype.itemsize} for {spelled}{shape}"
            )

        most = self.limits.pixels if dtype == np.uint8 else self.limits.numbers
        if count > most:
            raise ProtocolError(ErrorKind.LIMIT, where, f"{spelled}{shape} has {count} values, at most {most} are read")

        array = np.frombuffer(data, dtype).reshape(shape)
        if spelled == BFLOAT16:  # the upper half of a float32
            return (array.astype(np.uint32) << 16).view(np.float32)
        if dtype == np.bool_ and not np.isin(array.view(np.uint8), (0, 1)).all():
            raise ProtocolError(ErrorKind.MALFORMED, where, "booleans that are neither 0 nor 1")
        return array


def _scalar(parts: dict, where: str) -> Any:
    """A number or truth value as Python's own."""
    value = next((value for key, value in parts.items() if _text(key) == "data"), None)
    if not isinstance(value, bool | int | float):
        raise ProtocolError(ErrorKind.MALFORMED, where, f"a scalar whose data are {_kind(value)}, expected a number")

    return value


def expected_dtypes() -> list[str]:
    """The names of what arrays are made of, for messages."""
    return [*dict.fromkeys(dtype.name for dtype in DTYPES.values()), BFLOAT16]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> str | None:
    """Text, also where it was written as bytes; None for anything else."""
    if isinstance(value, bytes) and len(value) <= 256:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None

    return value if isinstance(value, str) else None


def _kind(value: Any) -> str:
    return {
        dict: "a map",
        list: "a list",
        bytes: "bytes",
        str: "text",
        bool: "a truth value",
        int: "an integer",
        float: "a number",
        type(None): "nothing",
    }.get(type(value), f"a {type(value).__name__}")
