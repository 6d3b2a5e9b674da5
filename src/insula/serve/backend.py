"""What answers requests: a policy on a thread of its own, so that nothing on the network waits for arithmetic."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np

from insula.errors import InsulaError
from insula.serve.observations import Request

_Answer = TypeVar("_Answer")
Answer = np.ndarray | InsulaError
"""A chunk [H, D] in the robot's units, or why there is none."""


class Backend(Protocol):
    """Both methods run on one thread, one call after another."""

    metadata: dict[str, Any]
    """Sent to every client: what it needs to ask well, and nothing that would tell one checkpoint from another, so that
    trials can be blind."""
    about: dict[str, Any]
    """What is served, for the server's own page."""

    def warm(self, size: int) -> None:
        """Compile what batches of `size` need."""
        ...

    def answer(self, requests: Sequence[Request], size: int) -> list[Answer]:
        """One for each request; the batch is filled up to `size`. A bad request fails alone."""
        ...


class Worker:
    """One daemon thread that runs one function after another: what hangs on it cannot keep the process alive."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue = SimpleQueue()
        threading.Thread(target=self._run, name="policy", daemon=True).start()

    async def call(self, function: Callable[..., _Answer], *arguments: Any) -> _Answer:
        """Run there, wait here. Raises what it raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_Answer] = loop.create_future()
        self._jobs.put((function, arguments, loop, done))
        return await done

    def _run(self) -> None:
        while True:
            function, arguments, loop, done = self._jobs.get()
            try:
                outcome, failed = function(*arguments), None
            except BaseException as error:  # carried to the one who waits, whatever it is
                outcome, failed = None, error

            # The loop is closed where the server gave up waiting.
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, done, outcome, failed)


def _settle(done: asyncio.Future, outcome: Any, failed: BaseException | None) -> None:
    if done.done():
        return
    if failed is not None:
        done.set_exception(failed)
    else:
        done.set_result(outcome)
