"""A policy server beside the test, in a thread of its own, and small policies to put behind it."""

import asyncio
import contextlib
import dataclasses
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from test_convert import OBSERVATION as OBSERVATION  # for tests of servers, too
from test_convert import STATS, folder_of_run

from insula.policy import Policy
from insula.ports import listen
from insula.serve.backend import Answer, Backend
from insula.serve.guard import make_guard
from insula.serve.observations import Request, parse_renames
from insula.serve.server import PolicyServer

HOST = "127.0.0.1"


def small_policy(folder: Path) -> Policy:
    """Randomized weights that were saved and read again: two cameras, state [2], chunks of 4 actions [3]."""
    return Policy.load(folder_of_run(folder / "run", STATS))


def zeros(request: Request) -> np.ndarray:
    return np.zeros((4, 3))


@dataclasses.dataclass
class Scripted:
    """A backend that answers `script(request)`, a chunk [H, D] or an error, and remembers what it was asked."""

    script: Callable[[Request], Answer] = zeros
    metadata: dict[str, Any] = dataclasses.field(default_factory=lambda: {"server": "insula"})
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    asked: list[Request] = dataclasses.field(default_factory=list)
    batches: list[int] = dataclasses.field(default_factory=list)

    def warm(self, size: int) -> None:
        """Nothing to compile."""

    def answer(self, requests: Sequence[Request], size: int) -> list[Answer]:
        """One after another."""
        self.asked += requests
        self.batches.append(len(requests))
        return [self.script(request) for request in requests]


@dataclasses.dataclass(frozen=True)
class Live:
    """A server that runs, and the event loop it runs on."""

    url: str
    server: PolicyServer
    loop: asyncio.AbstractEventLoop

    @property
    def http(self) -> str:
        return self.url.replace("ws", "http", 1)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def tasks(self) -> int:
        """Tasks of its event loop."""
        return len(asyncio.all_tasks(self.loop))

    def count(self, outcome: str) -> float:
        """Requests that ended so."""
        return self.server.metrics.outcomes().get(outcome, 0)


@contextlib.contextmanager
def live(
    backend: Backend | Callable[[], Backend],
    key: str | None = None,
    rename: Sequence[str] = (),
    sizes: tuple[int, ...] = (1,),
    max_wait: float = 0.0,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> Iterator[Live]:
    """Serve until the block ends."""
    listening = listen(HOST, 0)
    load = backend if callable(backend) else lambda: backend
    server = PolicyServer(load, make_guard(HOST, key), sizes, max_wait, parse_renames(rename), **settings)
    loop = asyncio.new_event_loop()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # as a process ends: no task is left behind
            runner.run(server.run(listening, tls))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        scheme = "ws" if tls is None else "wss"
        yield Live(f"{scheme}://{HOST}:{listening.getsockname()[1]}", server, loop)
    finally:
        with contextlib.suppress(RuntimeError):  # it has stopped already
            loop.call_soon_threadsafe(server.stop)
        thread.join(timeout=30)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(backend: Backend, **settings: Any) -> Iterator[str]:
    """As `live`; yields "ws://127.0.0.1:PORT"."""
    with live(backend, **settings) as running:
        yield running.url


def get(url: str, headers: dict[str, str] | None = None, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Status and body of a page."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers or {}), timeout=10, context=context
        ) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
