"""Frames nobody should send: each is refused by a typed error that names the field, and the next one is answered."""

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from fuzz_frames import fuzz
from live_server import OBSERVATION, Scripted, serving
from websockets.sync.client import ClientConnection, connect

from insula.client.protocol import LIMITS, ErrorKind, pack, unpack
from insula.errors import ProtocolError
from insula.serve.observations import read_request

MIB = 2**20
MOST_ALLOCATED = 64 * MIB


def array(data: Any = bytes(8), dtype: Any = "<f4", shape: Any = (2,), **more: Any) -> dict[bytes, Any]:
    """An array as openpi packs it, or nearly."""
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape} | {
        name.encode(): value for name, value in more.items()
    }


def state(**changes: Any) -> bytes:
    """An observation whose state is `array(**changes)`."""
    return msgpack.packb({"state": array(**changes), "task": "go"})


def nested(depth: int) -> bytes:
    """Maps in maps, by hand: packing them would recurse, too."""
    return b"\x81\xa1a" * depth + b"\xc0"


def lists(depth: int) -> bytes:
    return b"\x81\xa1a" + b"\x91" * depth + b"\xc0"


M, L, I = ErrorKind.MALFORMED, ErrorKind.LIMIT, ErrorKind.INVALID  # noqa: E741
FRAMES: dict[str, tuple[bytes | str, ErrorKind, str]] = {
    # No msgpack at all.
    "empty": (b"", M, ""),
    "text": ("hello", M, ""),
    "json": ('{"state": [0, 0]}', M, ""),
    "http": (b"GET / HTTP/1.1\r\n\r\n", M, ""),
    "pickle": (b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.", M, ""),
    "npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}", M, ""),
    "zeros": (bytes(64), M, ""),
    "ones": (b"\xff" * 64, M, ""),
    "reserved byte": (b"\xc1", M, ""),
    "half a message": (state()[:-3], M, ""),
    "two messages": (state() + state(), M, ""),
    "one byte behind the end": (state() + b"\x00", M, ""),
    # msgpack, and no map of values.
    "a number": (msgpack.packb(1), M, ""),
    "a list": (msgpack.packb([1, 2]), M, ""),
    "nothing": (msgpack.packb(None), M, ""),
    "an array": (msgpack.packb([array()]), M, ""),
    "a list as key": (b"\x81\x91\x01\x01", M, ""),
    "a map as key": (b"\x81\x80\x01", M, ""),
    "a number as key": (msgpack.packb({7: 1}), M, ""),
    "a key that is no text": (msgpack.packb({b"\xff\xfe": 1}), M, ""),
    "a key twice": (b"\x82\xa1a\x01\xc4\x01a\x02", M, ""),
    "a key twice, inside": (msgpack.packb({"observation": {"a": 1, b"a": 2}}), M, "observation"),
    "text that is no text": (b"\x81\xa4task\xa2\xff\xfe", M, ""),
    "an extension": (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), M, ""),
    "a time stamp": (msgpack.packb({"a": msgpack.Timestamp(1, 2)}), M, "a"),
    "bytes": (msgpack.packb({"state": b"\x00" * 8}), M, "state"),
    # Claims that are not true.
    "a list of 2³² entries": (b"\x81\xa5state\xdd\xff\xff\xff\xff", L, ""),
    "a map of 2³² entries": (b"\xdf\xff\xff\xff\xff", L, ""),
    "bytes of 4 GiB": (b"\x81\xa5state\xc6\xff\xff\xff\xff", M, ""),
    "text of 4 GiB": (b"\x81\xa4task\xdb\xff\xff\xff\xff", M, ""),
    "an extension of 4 GiB": (b"\x81\xa5state\xc9\xff\xff\xff\xff\x01", L, ""),
    # Too much of something.
    "deep maps": (nested(50), L, ".".join("a" * 9)),
    "deep lists": (lists(50), L, "a"),
    "a thousand maps deep": (nested(1000), L, ".".join("a" * 9)),
    "a million lists deep": (lists(1_000_000), M, ""),
    "many keys": (msgpack.packb({str(i): i for i in range(LIMITS.keys + 1)}), L, ""),
    "a long list": (msgpack.packb({"state": [0] * 5000}), L, ""),
    "many short lists": (msgpack.packb({"state": [[0] * 40] * 4000}), L, ""),
    "a list bomb": (msgpack.packb({"state": [[[]] * 4000] * 40}), L, ""),
    "many arrays": (msgpack.packb({f"images/{i}": array() for i in range(LIMITS.arrays + 1)}), L, "images/64"),
    "a long task": (msgpack.packb({"task": "x" * (LIMITS.text + 1)}), L, ""),
    "a long key": (msgpack.packb({"x" * (LIMITS.text + 1): 1}), L, ""),
    "many numbers": (state(data=bytes(4 * (LIMITS.numbers + 1)), shape=(LIMITS.numbers + 1,)), L, "state"),
    "many pixels": (
        msgpack.packb({"images": {"front": array(bytes(LIMITS.pixels + 2), "|u1", (LIMITS.pixels // 3 + 1, 1, 3))}}),
        L,
        "images.front",
    ),
    # Arrays that are none.
    "shape larger than the data": (state(shape=(1_000_000_000,)), M, "state"),
    "shape smaller than the data": (state(shape=(1,)), M, "state"),
    "shape that overflows to the size": (state(shape=(2**62, 4, 2)), M, "state"),
    "shape of 2⁶⁴ − 1": (state(shape=(2**64 - 1,)), M, "state"),
    "shape below zero": (state(shape=(-2,)), M, "state"),
    "shape below zero, twice": (state(shape=(-1, -2)), M, "state"),
    "shape of fractions": (state(shape=(2.0,)), M, "state"),
    "shape of truth": (state(shape=(True, 2)), M, "state"),
    "shape of text": (state(shape="2"), M, "state"),
    "shape of nine": (state(shape=(1,) * 8 + (2,)), M, "state"),
    "no shape": (msgpack.packb({"state": {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4"}}), M, "state"),
    "no data": (state(data=None), M, "state"),
    "data as text": (state(data="12345678"), M, "state"),
    "data as a list": (state(data=[0, 0]), M, "state"),
    "objects": (state(dtype="|O"), M, "state"),
    "records": (state(dtype=[["x", "<f4"]]), M, "state"),
    "records as text": (state(dtype="f4,f4"), M, "state"),
    "complex numbers": (state(dtype="<c8", shape=(1,)), M, "state"),
    "texts": (state(dtype="<U2", shape=(1,)), M, "state"),
    "dates": (state(dtype="<M8[ns]", shape=(1,)), M, "state"),
    "void": (state(dtype="|V8", shape=(1,)), M, "state"),
    "half precision": (state(dtype="<f2", shape=(4,)), M, "state"),
    "big-endian": (state(dtype=">f4"), M, "state"),
    "a type of 10,000 letters": (state(dtype="f" * 8000), M, "state"),
    "a type that is a number": (state(dtype=4), M, "state"),
    "booleans of 2": (state(data=b"\x02\x01", dtype="|b1"), M, "state"),
    "an array in an array": (state(data=array()), M, "state"),
    "a scalar of bytes": (
        msgpack.packb({"state": {b"__npgeneric__": True, b"data": b"x", b"dtype": "|O"}}),
        M,
        "state",
    ),
    "a scalar of nothing": (msgpack.packb({"state": {b"__npgeneric__": True}}), M, "state"),
    # Messages of this protocol, and no request.
    "state of text": (msgpack.packb({"state": "1"}), I, "state"),
    "state of texts": (msgpack.packb({"state": ["a", "b"]}), I, "state"),
    "state of lists of several lengths": (msgpack.packb({"state": [[1], [1, 2]]}), I, "state"),
    "a seed of text": (msgpack.packb({"seed": "1"}), I, "seed"),
    "a seed of fractions": (msgpack.packb({"seed": [0.5]}), I, "seed"),
    "a seed of nine": (msgpack.packb({"seed": [1] * 9}), I, "seed"),
    "an age of NaN": (msgpack.packb({"max_age_ms": float("nan")}), I, "max_age_ms"),
    "an age below zero": (msgpack.packb({"max_age_ms": -1}), I, "max_age_ms"),
    "an age of truth": (msgpack.packb({"max_age_ms": True}), I, "max_age_ms"),
}


def test_there_are_enough_of_them() -> None:
    assert len(FRAMES) >= 60


def refusal(frame: bytes | str) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        read_request(unpack(frame), {})
    return caught.value


@pytest.mark.parametrize("name", FRAMES)
def test_it_is_refused_by_name(name: str) -> None:
    frame, kind, field = FRAMES[name]
    error = refusal(frame)
    assert (error.kind, error.field) == (kind, field), str(error)
    assert 5 < len(error.message) < 400 and "\n" not in error.message


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FRAMES)
def test_nothing_large_is_allocated_for_it(name: str) -> None:
    frame = FRAMES[name][0]
    assert peak(lambda: refusal(frame)) < MOST_ALLOCATED


def test_the_measure_of_memory_sees_an_array() -> None:
    """The control of the test above: what a trusting reader would do for the shape that one of the frames claims."""
    assert peak(lambda: np.zeros(100 * MIB, np.uint8)) > MOST_ALLOCATED


def test_the_largest_message_is_read_within_the_bound() -> None:
    pictures = {f"camera_{i}": np.zeros((1024, 1024, 3), np.uint8) for i in range(5)}
    frame = pack({"images": pictures, "state": [0.0]})
    assert 15 * MIB < len(frame) <= LIMITS.message
    assert peak(lambda: read_request(unpack(frame), {})) < MOST_ALLOCATED

    error = refusal(frame + bytes(2 * MIB))
    assert error.kind == L and str(LIMITS.message) in error.message


def test_all_kinds_of_numbers_are_read() -> None:
    """The control of all of this: good arrays come out as they went in."""
    for kind in ("u1", "?", "<i4", "<i8", "<f4", "<f8"):
        sent = np.arange(6).reshape(2, 3).astype(kind)
        np.testing.assert_array_equal(unpack(pack({"a": sent}))["a"], sent)
        assert unpack(pack({"a": sent}))["a"].dtype == sent.dtype

    halves = {"a": array(np.array([0x3F80, 0xC000], "<u2").tobytes(), "bfloat16", (2,))}
    np.testing.assert_array_equal(unpack(msgpack.packb(halves))["a"], np.array([1.0, -2.0], np.float32))


# --- over the network ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def robot() -> Iterator[ClientConnection]:
    backend = Scripted(lambda request: np.zeros((4, 3)), {"server": "insula"})
    with serving(backend) as url, connect(url, max_size=None) as connection:
        connection.recv()
        yield connection


@pytest.mark.parametrize("name", FRAMES)
def test_the_connection_stays_usable(name: str, robot: ClientConnection) -> None:
    frame, kind, field = FRAMES[name]
    robot.send(frame)
    reply = robot.recv(timeout=10)
    assert isinstance(reply, str)

    said = json.loads(reply)
    assert (said["error"], said["field"]) == (kind, field)
    for secret in ("Traceback", ".py", "/home", "/usr", "site-packages"):
        assert secret not in reply

    robot.send(pack(OBSERVATION))
    assert unpack(robot.recv(timeout=10))["actions"].shape == (4, 3)


def test_a_message_beyond_the_limit_ends_the_connection_and_no_other(robot: ClientConnection) -> None:
    """It is refused before it is read, so where the next one begins is not known."""
    backend = Scripted(lambda request: np.zeros((4, 3)), {"server": "insula"})
    with serving(backend) as url, connect(url) as large, connect(url) as other:
        large.recv()
        other.recv()
        large.send(bytes(LIMITS.message + 1))
        with pytest.raises(Exception, match="1009"):
            large.recv(timeout=10)

        other.send(pack(OBSERVATION))
        assert unpack(other.recv(timeout=10))["actions"].shape == (4, 3)


def test_what_only_the_policy_can_refuse_is_left_to_it() -> None:
    """NaN and huge numbers are numbers; `insula.data.observe.check_raw` refuses them by name."""
    for value in ([float("nan")], [2**64 - 1], [1e30]):
        assert read_request(unpack(pack({"state": value})), {}).observation["state"].shape == (1,)


# --- by the thousand -------------------------------------------------------------------------------------------------


def test_mutated_frames() -> None:
    """4,000 of the fuzzer's. It raises for any outcome but an observation or a refusal."""
    counts = fuzz(4000, seed=0)
    assert sum(counts.values()) == 4000
    assert counts["malformed"] > 400 and counts["read"] > 100  # it reaches both sides of the line


def test_a_fuzzer_that_finds_a_crash_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with a reader that trusts keys to be UTF-8 it finds the hole."""
    monkeypatch.setattr("insula.client.protocol._text", lambda key: key.decode() if isinstance(key, bytes) else key)
    with pytest.raises(AssertionError, match="seed 0, frame"):
        fuzz(4000, seed=0)


def test_random_bytes() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        refusal_or_request(rng.randbytes(rng.randrange(200)))


def refusal_or_request(frame: bytes) -> None:
    try:
        read_request(unpack(frame), {})
    except ProtocolError as error:
        assert error.kind in set(ErrorKind)
