"""What answers requests: a policy on a thread of its own, so that nothing on the network waits for arithmetic."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from insula.errors import InsulaError
from insula.serve.observations import Request

log = logging.getLogger(__name__)

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


@runtime_checkable
class Thinks(Protocol):
    """A backend whose requests have a "subtask" in their observation, and that can say what it should be."""

    def think(self, requests: Sequence[Request], size: int) -> list[str | InsulaError]:
        """The subtask of each request, or why there is none. Else as `Backend.answer`."""
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


async def in_one_call(
    worker: Worker,
    method: Callable[[Sequence[Request], int], list[_Answer | InsulaError]],
    requests: Sequence[Request],
    sizes: Sequence[int],
) -> tuple[list[_Answer | InsulaError], float]:
    """What a method of the backend answers, in a batch of the next of `sizes`, and the seconds it took. Where it breaks
    there is an error for each request."""
    size = next(size for size in sizes if size >= len(requests))
    started = time.perf_counter()
    answers: list[_Answer | InsulaError]
    try:
        answers = await worker.call(method, requests, size)
    except Exception:
        # A fault of ours. The log has all of it, a reply nothing: neither paths nor code are a client's business.
        log.exception("a batch of %d failed", len(requests))
        answers = [InsulaError("the policy failed; the server's log says how") for _ in requests]

    return answers, time.perf_counter() - started


def _settle(done: asyncio.Future, outcome: Any, failed: BaseException | None) -> None:
    if done.done():
        return
    if failed is not None:
        done.set_exception(failed)
    else:
        done.set_result(outcome)
