"""Requests of several robots, answered by one call.

    waiting   ▏a▕▏b▕▏c▕      the policy is busy, or others may yet come within `max_wait`
    running   ▏▏▏▏▏▏▏▏▏▏     one batch at a time, filled up to the next size that is compiled

A ticket that nobody waits for any more, or that is too old, is dropped before it is worked on; never after the fact is
an old chunk sent as if it were new.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from insula.client.protocol import ErrorKind
from insula.errors import InputError, InsulaError, NonFiniteError, ObservationError, ProtocolError, TokenBudgetError
from insula.serve.backend import Answer, Backend, Worker
from insula.serve.metrics import Metrics
from insula.serve.observations import Request

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Done:
    """A chunk and where its time went, in seconds: waiting in line, and in the policy with `batch` others."""

    actions: np.ndarray
    waited: float
    inferred: float
    batch: int


@dataclass(eq=False)
class Ticket:
    """One request on its way. `outcome` is a `Done`, or a ProtocolError as its exception."""

    request: Request
    outcome: "asyncio.Future[Done]"
    arrived: float = field(default_factory=time.perf_counter)
    running: bool = False

    def refuse(self, error: ProtocolError) -> None:
        """Answer with an error, unless there is an answer."""
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # looked at: whoever asked may be gone

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.outcome.cancel()


class Batcher:
    """`sizes`: batch sizes that are compiled, ascending. `connected()` says how many robots there are: with all of them
    in line there is nobody to wait for."""

    def __init__(
        self,
        backend: Backend,
        worker: Worker,
        sizes: Sequence[int],
        max_wait: float,
        connected: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self.backend = backend
        self.sizes = tuple(sizes)
        self.max_wait = max_wait
        self._worker = worker
        self._connected = connected
        self._metrics = metrics
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._changed = asyncio.Event()
        self._stopping = False
        self._free = 0.0  # when the last batch was done

    def submit(self, request: Request, most: int) -> Ticket:
        """Get in line. Raises ProtocolError where the server stops, or more than `most` wait already."""
        if self._stopping:
            raise ProtocolError(ErrorKind.STOPPING, "", "the server is shutting down; connect again")
        if len(self._waiting) >= most:
            raise ProtocolError(ErrorKind.OVERLOADED, "", f"{len(self._waiting)} requests wait already")

        ticket = Ticket(request, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        self._changed.set()
        return ticket

    async def run(self) -> None:
        """Answer for ever."""
        while True:
            self._running = await self._gather()
            if self._running:
                await self._answer(self._running)
                self._running = []
            self._changed.set()

    async def drain(self) -> None:
        """Accept nothing more, and wait until all that is in line is answered."""
        self._stopping = True
        while self._waiting or self._running:
            self._changed.clear()
            await self._changed.wait()

    async def _gather(self) -> list[Ticket]:
        """The next batch: the oldest tickets that are still wanted. May be empty."""
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()

        # Robots that were answered ask again within milliseconds, so also those that waited meanwhile wait for them:
        # else two groups of four would take turns for ever, each waiting for a whole batch of the other. Measured with
        # a policy of 50 ms and 8 robots: 4.1 times the throughput of one robot, and 7.8 so.
        end = max(self._waiting[0].arrived, self._free) + self.max_wait
        while len(self._waiting) < min(self.sizes[-1], self._connected()) and not self._stopping:
            left = end - time.perf_counter()
            if left <= 0:
                break
            self._changed.clear()
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                break

        batch: list[Ticket] = []
        while self._waiting and len(batch) < self.sizes[-1]:
            ticket = self._waiting.popleft()
            if self._is_wanted(ticket):
                ticket.running = True
                batch.append(ticket)

        return batch

    def _is_wanted(self, ticket: Ticket) -> bool:
        if ticket.outcome.done():  # gone, or superseded
            return False

        limit = ticket.request.max_age_ms
        waited = (time.perf_counter() - ticket.arrived) * 1000
        if limit is not None and waited > limit:
            ticket.refuse(ProtocolError(ErrorKind.STALE, "", f"waited {waited:.0f} ms, its max_age_ms is {limit:g}"))
            return False

        return True

    async def _answer(self, batch: list[Ticket]) -> None:
        size = next(size for size in self.sizes if size >= len(batch))
        started = time.perf_counter()
        answers: Sequence[Answer]
        try:
            answers = await self._worker.call(self.backend.answer, [ticket.request for ticket in batch], size)
        except Exception:
            # A fault of ours. The log has all of it, a reply nothing: neither paths nor code are a client's business.
            log.exception("a batch of %d failed", len(batch))
            answers = [InsulaError("the policy failed; the server's log says how")] * len(batch)

        self._free = time.perf_counter()
        inferred = self._free - started
        self._metrics.batch(len(batch), inferred)
        for ticket, answer in zip(batch, answers, strict=True):
            if isinstance(answer, InsulaError):
                ticket.refuse(as_refusal(answer))
            elif ticket.outcome.done():
                self._metrics.unwanted()  # the robot went while its chunk was made
            else:
                ticket.outcome.set_result(Done(answer, started - ticket.arrived, inferred, len(batch)))


def as_refusal(error: InsulaError) -> ProtocolError:
    """What a client is told."""
    match error:
        case ProtocolError():
            return error
        case ObservationError(field=name):
            return ProtocolError(ErrorKind.INVALID, name, str(error))
        case TokenBudgetError():
            return ProtocolError(ErrorKind.INVALID, "task", str(error))
        case InputError():
            return ProtocolError(ErrorKind.INVALID, "", str(error))
        case NonFiniteError():
            return ProtocolError(ErrorKind.FAILED, "actions", "the policy's actions are not finite")

    return ProtocolError(ErrorKind.FAILED, "", str(error))
