"""A client for `insula serve`, and any server that speaks openpi's protocol. One connection, one thread at a time."""

import contextlib
import dataclasses
import random
import socket
import struct
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import ClientConnection, connect

from insula.client.protocol import LIMITS, ErrorKind, Limits, check_metadata, pack, read_error, unpack
from insula.errors import InputError, ProtocolError, ServerError, printable

KEY_VARIABLE = "INSULA_API_KEY"
"""Of the environment, for whoever has no better place for a key."""
FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0
"""Seconds between attempts to connect again: doubled each time, up to the second one, so that a server that returns is
found within two."""
REPLY_LIMITS = dataclasses.replace(LIMITS, message=64 * 2**20, numbers=2**22)
"""A server is trusted with more than a client, and still not with everything."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """`actions` [H, D] in the robot's units. Milliseconds: `infer_ms` in the policy, `server_ms` in the server with all
    waiting, `round_trip_ms` as seen from here. `subtask`: what they were chosen for, in words, where the server acts on
    subtasks; `subtask_age`: how many requests ago it was seen to be next, 0 for one that was told."""

    actions: np.ndarray
    round_trip_ms: float
    infer_ms: float | None
    server_ms: float | None
    raw: dict[str, Any]
    subtask: str | None = None
    subtask_age: int | None = None


class Client:
    """Connects when it is first needed, and again after the connection was lost.

    `api_key` is sent in a header, `timeout` (seconds) is how long one reply may take. `certificate` is a file of
    certificates to trust, for a server of your own (wss://).
    """

    def __init__(
        self, url: str, api_key: str | None = None, timeout: float = 10.0, certificate: str | None = None
    ) -> None:
        self.url = url if "://" in url else f"ws://{url}"
        self.timeout = timeout
        self._headers = authorization(api_key)
        self._certificate = certificate
        self._connection: ClientConnection | None = None
        self._hang_up = contextlib.ExitStack()
        self._metadata: dict[str, Any] | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._connection is not None

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says of its policy. Connects where that has not happened yet; raises as `connect`."""
        if self._metadata is None:
            self.connect()
        assert self._metadata is not None
        return self._metadata

    def connect(self) -> None:
        """One attempt. Raises ServerError where it fails, ProtocolError where the other side is no policy server or
        wants another key, InputError where the address is none."""
        self.close()
        try:
            connecting = connect(
                self.url,
                compression=None,  # pictures do not shrink, and it would take longer than the local network
                max_size=REPLY_LIMITS.message,
                additional_headers=self._headers,
                open_timeout=self.timeout,
                close_timeout=1.0,
                ssl=self._ssl(),
                proxy=None,  # a robot's policy is beside it; a proxy of the environment would delay every chunk
            )
            # The library wants a block (with), which a connection that lasts for many calls does not have.
            connection = self._hang_up.enter_context(connecting)
        except InvalidURI:
            raise InputError(f"{self.url}: no address of a server, expected such as ws://127.0.0.1:8000") from None
        except InvalidHandshake as error:
            raise as_error(self.url, error) from None
        except (OSError, TimeoutError, ValueError, ConnectionClosed) as error:
            # Closed: the server went in the middle of the handshake.
            raise ServerError(f"{self.url}: cannot be reached ({error})") from None

        # Sending must end, too: a server that does not read any more, or a cable that is cut in mid-picture, would hold
        # the thread, and with it every attempt to hang up.
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.timeout))
        self._connection = connection
        told = self._read(self.timeout)
        check_metadata(told)
        self._metadata = told

    def wait(self, seconds: float) -> None:
        """Attempt to connect until it succeeds, with growing pauses, at most this long. Raises as the last attempt."""
        end, pause = time.monotonic() + seconds, FIRST_WAIT
        while True:
            try:
                return self.connect()
            except ServerError:
                if time.monotonic() + pause >= end:
                    raise

            # Robots that lost the same server at the same moment must not all come back at the same moment.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_WAIT)

    def infer(self, observation: Mapping[str, Any]) -> Reply:
        """The next actions. `observation`: {"images": {camera: uint8 [h, w, 3]}, "state": [S], "task": str},
        and "subtask": str to tell a server that acts on subtasks what to do now.

        Raises ServerError where the server is gone or does not answer in time (the connection is closed then: a late
        reply would be taken for the next one's), ProtocolError where it refuses the observation, which says why.
        """
        if self._connection is None:
            self.connect()
        assert self._connection is not None

        self._expect_nothing()
        sent = time.perf_counter()
        try:
            self._connection.send(pack(observation))
        except ConnectionClosed as error:
            self.close()
            raise ServerError(f"{self.url}: connection lost ({error})") from None

        answer = self._read(self.timeout)
        return read_reply(answer, (time.perf_counter() - sent) * 1000)

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        self._connection = None
        self._hang_up.close()

    def abort(self) -> None:
        """Hang up at once, from any thread: a call that is under way ends with ServerError."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _expect_nothing(self) -> None:
        """A reply that is there before it was asked for would be taken for the next one's, and its actions for new."""
        assert self._connection is not None
        try:
            self._connection.recv(timeout=0)
        except TimeoutError:
            return
        except ConnectionClosed as error:
            self.close()
            raise ServerError(f"{self.url}: connection lost ({error})") from None

        self.close()
        raise ServerError(f"{self.url}: sent a message that nobody asked for; the connection is closed")

    def _read(self, timeout: float, limits: Limits = REPLY_LIMITS) -> dict[str, Any]:
        assert self._connection is not None
        try:
            message = self._connection.recv(timeout)
        except TimeoutError:
            self.close()
            raise ServerError(f"{self.url}: no answer within {timeout:g} s") from None
        except ConnectionClosed as error:
            self.close()
            raise ServerError(f"{self.url}: connection lost ({error})") from None

        if isinstance(message, str):
            raise ProtocolError(*read_error(message))
        return unpack(message, limits)

    def _ssl(self) -> Any:
        if self._certificate is None:
            return None

        import ssl

        return ssl.create_default_context(cafile=self._certificate)


def authorization(api_key: str | None) -> dict[str, str] | None:
    """The header that carries a key. Raises InputError, without the key, for one that no header can carry."""
    key = (api_key or "").strip()
    if not key:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("the API key has characters that no header can carry, expected printable ASCII without spaces")

    return {"Authorization": f"Api-Key {key}"}


def as_error(url: str, error: InvalidHandshake) -> ProtocolError | ServerError:
    """Why a server did not let us in, in its own words. A wrong key stays wrong: that is no server that is gone."""
    said = f"{url}: refused to connect ({_refusal(error)})"
    status = error.response.status_code if isinstance(error, InvalidStatus) else None

    return ProtocolError(ErrorKind.UNAUTHORIZED, "", said) if status in (401, 403) else ServerError(said)


def read_reply(answer: dict[str, Any], round_trip_ms: float) -> Reply:
    """Raises ProtocolError where there are no usable actions in it."""
    actions = answer.get("actions")
    if not isinstance(actions, np.ndarray) or actions.ndim != 2 or actions.dtype.kind != "f" or not actions.size:
        raise ProtocolError(ErrorKind.FAILED, "actions", f"the server sent {actions!r:.80}, expected numbers [H, D]")

    # float32, as every policy computes: what is too large for it becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        actions = actions.astype(np.float32)
    if not np.isfinite(actions).all():
        raise ProtocolError(ErrorKind.FAILED, "actions", "the server sent NaN or infinity; nothing of it is executed")

    infer, server = (
        _milliseconds(answer, "policy_timing", "infer_ms"),
        _milliseconds(answer, "server_timing", "total_ms"),
    )
    subtask, age = answer.get("subtask"), answer.get("subtask_age")
    subtask = printable(subtask) if isinstance(subtask, str) else None
    age = age if isinstance(age, int) and not isinstance(age, bool) and 0 <= age < 1e9 else None
    return Reply(actions, round_trip_ms, infer, server, answer, subtask, age)


def _milliseconds(answer: dict[str, Any], part: str, name: str) -> float | None:
    found = answer.get(part)
    value = found.get(name) if isinstance(found, dict) else None

    # A number that is no time is the same as none: nothing is decided by it.
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else None


def _refusal(error: InvalidHandshake) -> str:
    """The server's own words, where it said any: HTTP says more in its body than in its number."""
    response = getattr(error, "response", None)
    body = (response.body or b"").decode("utf-8", "replace").strip() if response is not None else ""
    return printable(body.splitlines()[0] if body else str(error), 200)


def _timeval(seconds: float) -> bytes:
    """C's struct timeval."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
