"""The server: connections in, tickets out. All of the network is on one event loop, all of the policy on one thread.

    GET /healthz  200 while the process lives     GET /metrics  for Prometheus
    GET /readyz   503 until all is compiled       GET /         a page for people
    anything that upgrades to a WebSocket is a robot

Framing, keep-alive and HTTP are the `websockets` library's.
"""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers, MultipleValuesError
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from insula.client.protocol import LIMITS, ErrorKind, error_frame, pack, unpack
from insula.errors import ProtocolError
from insula.serve.backend import Backend, Thinks, Worker
from insula.serve.batching import Batcher
from insula.serve.guard import Guard
from insula.serve.metrics import CONTENT_TYPE, Metrics
from insula.serve.observations import Renames, read_request
from insula.serve.sockets import Bounded, quiet
from insula.serve.status import RELOAD_S, render_status
from insula.serve.thinking import Mind, Thinker
from insula.serve.tickets import Done, Subtask, Ticket

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
"""For the request that opens a connection: a client that sends it byte by byte is closed."""
SEND_S = 10.0
"""For one reply: a client that does not read is closed."""
PING_S = 20.0
"""Between pings, and for their answer: a client whose cable is cut is noticed within twice this."""
DRAIN_S = 8.0
"""For what is in line when the server is asked to stop."""
WATCH_S = 0.5
MOST_UNREAD = 4 * 2**20
"""Bytes that wait for one client to read them: a thousand times a chunk of actions."""
SPARE_SOCKETS = 256
"""Connections beyond those of robots: pages, health checks, and those who are still at their handshake."""
OUTSTANDING = 4
"""Replies one connection may owe its client before its next message is read."""


@dataclass(eq=False)
class Robot:
    """One connection, as the page shows it; `subtask` is what its last chunk was for."""

    address: str
    since: float = field(default_factory=time.time)
    answered: int = 0
    refused: int = 0
    last_ms: float | None = None
    owed: int = 0
    subtask: Subtask | None = None
    mind: Mind = field(default_factory=Mind)


@dataclass(eq=False)
class Owed:
    """A reply that is due: a ticket's, or a refusal that needed none. `arrived` in seconds of `perf_counter`."""

    arrived: float
    ticket: Ticket | None = None
    refusal: ProtocolError | None = None


class PolicyServer:
    """`load` makes the backend, on the policy's thread. Then `run` until `stop`. `subtask_every`: seconds after which
    what a robot is to do is said again, by a backend that thinks."""

    def __init__(
        self,
        load: Callable[[], Backend],
        guard: Guard,
        sizes: tuple[int, ...],
        max_wait: float,
        renames: Renames | None = None,
        max_connections: int = 64,
        idle: float = 600.0,
        subtask_every: float = 1.0,
    ) -> None:
        self.metrics = Metrics()
        self.robots: dict[ServerConnection, Robot] = {}
        self.backend: Backend | None = None
        self._sockets: set[ServerConnection] = set()
        self.started = time.time()
        self._load = load
        self._guard = guard
        self._sizes = sizes
        self._max_wait = max_wait
        self._renames = renames or {}
        self._max_connections = max_connections
        self._idle = idle
        self._subtask_every = subtask_every
        self._worker = Worker()
        self._batcher: Batcher | None = None
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether every batch size is compiled and the server is not about to stop."""
        return self._ready.is_set() and not self._stop.is_set()

    def stop(self) -> None:
        """Answer what is in line, then return from `run`. From the event loop's own thread."""
        self._stop.set()

    async def run(self, listening: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT. Raises what loading or compiling raises."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Only the main thread may; a test runs the server beside itself.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self.stop)

        server = await serve(
            self._converse,
            sock=listening,
            ssl=tls,
            compression=None,
            origins=[None],  # browsers say where they come from, robots do not: no web page may drive one
            process_request=self._answer_http,
            open_timeout=HANDSHAKE_S,
            ping_interval=PING_S,
            ping_timeout=PING_S,
            close_timeout=1.0,
            max_size=LIMITS.message,
            max_queue=2,
            server_header=None,
            logger=quiet(),
            create_connection=functools.partial(  # type: ignore[arg-type]
                Bounded, self._sockets, self._max_connections + SPARE_SOCKETS
            ),
        )

        # Listening first: whoever asks meanwhile learns that we are alive and not ready yet.
        policy = asyncio.create_task(self._serve_policy())
        stopping = asyncio.create_task(self._stop.wait())
        watching = asyncio.create_task(self._watch_buffers())
        try:
            await asyncio.wait({policy, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if policy.done():
                await policy  # it never ends but by an error
        finally:
            self._stop.set()
            await self._shut(server)
            for task in (policy, stopping, watching):
                task.cancel()

    async def _serve_policy(self) -> None:
        self.backend = await self._worker.call(self._load)
        for size in self._sizes:
            await self._worker.call(self.backend.warm, size)

        count = lambda: len(self.robots)  # noqa: E731
        thinker = None
        if isinstance(self.backend, Thinks):
            thinker = Thinker(self.backend, self._worker, self._sizes, self._subtask_every, self.metrics)
        self._batcher = Batcher(self.backend, self._worker, self._sizes, self._max_wait, count, self.metrics, thinker)
        self.metrics.ready(True)
        self._ready.set()
        await self._batcher.run()

    async def _watch_buffers(self) -> None:
        """Give up whoever asks for more than it reads. The library answers pings without waiting for them to be read,
        and its own ping waits behind those answers: such a client would stay, and grow, for ever."""
        while True:
            await asyncio.sleep(WATCH_S)
            for connection in list(self._sockets):
                if connection.transport.get_write_buffer_size() > MOST_UNREAD:
                    connection.transport.abort()

    async def _shut(self, server: Server) -> None:
        self.metrics.ready(False)
        server.close(close_connections=False)  # nobody new
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                if self._batcher is not None:
                    await self._batcher.drain()
                while any(robot.owed for robot in self.robots.values()):  # answered, and not yet written
                    await asyncio.sleep(0.01)

        await asyncio.gather(
            *(robot.close(1001, "shutting down") for robot in list(self.robots)), return_exceptions=True
        )
        with contextlib.suppress(TimeoutError):  # those who never finished their handshake are not waited for
            async with asyncio.timeout(1.0):
                await server.wait_closed()

    # --- one robot ---------------------------------------------------------------------------------------------------

    async def _converse(self, connection: ServerConnection) -> None:
        """Metadata, then a reply for each message, in their order."""
        if len(self.robots) >= self._max_connections:  # several came in while the first was counted
            return

        robot = self.robots[connection] = Robot(_address(connection))
        self.metrics.connections(len(self.robots))
        try:
            # A client that came too early waits for the metadata, as openpi's does.
            await self._ready.wait()
            assert self.backend is not None
            await connection.send(pack(self.backend.metadata))
            await self._talk(connection, robot)
        except ConnectionClosed:
            pass
        finally:
            robot.mind.gone = True
            del self.robots[connection]
            self.metrics.connections(len(self.robots))

    async def _talk(self, connection: ServerConnection, robot: Robot) -> None:
        """Until one side has gone. A client that does not read ends the writer, which must end the reader: it would
        wait for ever to put another reply in line."""
        owed: asyncio.Queue[Owed] = asyncio.Queue(OUTSTANDING)
        reading = asyncio.create_task(self._read_messages(connection, robot, owed))
        writing = asyncio.create_task(self._write_replies(connection, robot, owed))
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The reader first: it abandons what its robot asked for, which the writer still waits for.
            for task in (reading, writing):
                task.cancel()
                await asyncio.wait({task})

        # What ended them may be a fault of ours: nothing is swallowed but the cancellation of a moment ago.
        for outcome in await asyncio.gather(reading, writing, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _read_messages(self, connection: ServerConnection, robot: Robot, owed: "asyncio.Queue[Owed]") -> None:
        last: Ticket | None = None
        try:
            while True:
                try:
                    async with asyncio.timeout(self._idle):
                        message = await connection.recv()
                except TimeoutError:
                    # Said in the closing frame: a message nobody asked for would be taken for the next reply.
                    await connection.close(1000, f"no request for {self._idle:g} s")
                    return

                reply = self._accept(message, last, robot)
                last = reply.ticket or last
                robot.owed += 1
                await owed.put(reply)
        finally:
            # Gone: what is in line for it is dropped, what is running is thrown away when it is done.
            if last is not None and not last.outcome.done():
                if not last.running:
                    self.metrics.abandoned()
                last.abandon()

    def _accept(self, message: bytes | str, last: Ticket | None, robot: Robot) -> Owed:
        arrived = time.perf_counter()
        try:
            request = read_request(unpack(message), self._renames)

            # A robot that asks again has no use for what it asked before.
            if last is not None and not last.running:
                last.refuse(ProtocolError(ErrorKind.SUPERSEDED, "", "a newer observation came before it was worked on"))
            assert self._batcher is not None
            return Owed(arrived, self._batcher.submit(request, 2 * self._max_connections, robot.mind))
        except ProtocolError as error:
            return Owed(arrived, refusal=error)

    async def _write_replies(self, connection: ServerConnection, robot: Robot, owed: "asyncio.Queue[Owed]") -> None:
        before: float | None = None
        while True:
            reply = await owed.get()
            try:
                if reply.refusal is not None:
                    raise reply.refusal
                assert reply.ticket is not None
                done = await reply.ticket.outcome
                frame: bytes | str = _frame(done, reply.arrived, before)
            except ProtocolError as error:
                done, frame = None, error_frame(ErrorKind(error.kind), error.field, error.message)
                robot.refused += 1
                self.metrics.refused(error.kind)

            try:
                async with asyncio.timeout(SEND_S):
                    await connection.send(frame)
            except TimeoutError:
                connection.transport.abort()  # it does not read: a closing handshake would wait for it, too
                return
            except ConnectionClosed:
                return

            robot.owed -= 1
            if done is not None:
                before = time.perf_counter() - reply.arrived
                robot.answered += 1
                robot.subtask = done.subtask
                robot.last_ms = before * 1000
                self.metrics.answered(before, done.waited)

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _answer_http(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """None lets a robot in."""
        try:
            path = urlsplit(request.path).path
            headers = {name: request.headers.get(name) for name in ("Host", "Authorization", "Upgrade")}
        except (ValueError, MultipleValuesError):  # there twice: a proxy before us may have read the other one
            return _plain(HTTPStatus.BAD_REQUEST, "not a request that this server understands")
        if not self._guard.knows(headers["Host"]):
            return _plain(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to names of this machine alone")
        if path == "/healthz":
            return _plain(HTTPStatus.OK, "OK")
        if path == "/readyz":
            return _plain(HTTPStatus.OK, "ready") if self.is_ready else _plain(_LATER, "not ready")
        if not self._guard.admits(headers["Authorization"]):
            return _plain(HTTPStatus.UNAUTHORIZED, "an API key is needed: Authorization: Api-Key KEY")

        if (headers["Upgrade"] or "").lower() == "websocket":
            if self._stop.is_set():
                return _plain(_LATER, "the server is shutting down")
            full = len(self.robots) >= self._max_connections
            return _plain(_LATER, f"{self._max_connections} robots are connected, which is the limit") if full else None
        if path == "/metrics":
            return _page(self.metrics.text(), CONTENT_TYPE)
        if path == "/":
            page = _page(render_status(self).encode(), "text/html; charset=utf-8")
            page.headers["Refresh"] = str(RELOAD_S)
            return page
        return _plain(HTTPStatus.NOT_FOUND, "no such page; there are /, /healthz, /readyz and /metrics")


_LATER = HTTPStatus.SERVICE_UNAVAILABLE


def _frame(done: Done, arrived: float, before: float | None) -> bytes:
    """A reply with openpi's timing fields; `prev_total_ms` is of the reply before it, `total_ms` of this one so far."""
    total = (time.perf_counter() - arrived) * 1000
    infer = done.inferred * 1000
    server = {"infer_ms": infer, "wait_ms": done.waited * 1000, "batch": done.batch, "total_ms": total}
    if before is not None:
        server["prev_total_ms"] = before * 1000

    reply = {"actions": done.actions, "policy_timing": {"infer_ms": infer}, "server_timing": server}
    if done.subtask is not None:
        reply |= {"subtask": done.subtask.text, "subtask_age": done.subtask.age}
    return pack(reply)


def _plain(status: HTTPStatus, text: str) -> Response:
    return _response(status, f"{text}\n".encode(), "text/plain; charset=utf-8")


def _page(body: bytes, kind: str) -> Response:
    return _response(HTTPStatus.OK, body, kind)


def _response(status: HTTPStatus, body: bytes, kind: str) -> Response:
    headers = Headers()
    headers["Content-Type"] = kind
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    headers["Cache-Control"] = "no-store"
    headers["X-Content-Type-Options"] = "nosniff"
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Api-Key"
    return Response(status.value, status.phrase, headers, body)


def _address(connection: ServerConnection) -> str:
    peer = connection.remote_address
    return f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unknown"
