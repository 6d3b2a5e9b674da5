"""One request on its way to a reply: what is known of it, whether it is still wanted, and what a refusal says."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from insula.client.protocol import ErrorKind
from insula.errors import (
    DecodeError,
    InputError,
    InsulaError,
    NonFiniteError,
    ObservationError,
    ProtocolError,
    TokenBudgetError,
)
from insula.serve.observations import Request


@dataclass(frozen=True)
class Subtask:
    """What a chunk is for, in words. `age`: how many requests of its connection ago it was seen to be next; 0 where it
    was told, or said of what this request has seen."""

    text: str
    age: int


@dataclass(frozen=True, eq=False)
class Done:
    """A chunk and where its time went, in seconds: waiting in line, and in the policy with `batch` others. `subtask`:
    what was acted on, None where the server reads none."""

    actions: np.ndarray
    waited: float
    inferred: float
    batch: int
    subtask: Subtask | None = None


@dataclass(eq=False)
class Ticket:
    """One request on its way. `outcome` is a `Done`, or a ProtocolError as its exception."""

    request: Request
    outcome: "asyncio.Future[Done]"
    arrived: float = field(default_factory=time.perf_counter)
    running: bool = False
    subtask: Callable[[], Subtask] | None = None
    """What to act on, asked when work on it begins: a newer one may have been said while it was in line."""

    def refuse(self, error: ProtocolError) -> None:
        """Answer with an error, unless there is an answer."""
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # looked at: whoever asked may be gone

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.outcome.cancel()

    def is_wanted(self) -> bool:
        """Whether it is worth working on. One that became too old in line is refused."""
        if self.outcome.done():  # gone, or superseded
            return False

        limit = self.request.max_age_ms
        waited = (time.perf_counter() - self.arrived) * 1000
        if limit is not None and waited > limit:
            said = f"waited {waited:.0f} ms, its max_age_ms is {limit:g}"
            self.refuse(ProtocolError(ErrorKind.STALE, "", said))
            return False

        return True


def to_act_on(request: Request, subtask: Subtask | None) -> Request:
    """The request as the policy is to see it."""
    if subtask is None:
        return request

    return dataclasses.replace(request, observation=request.observation | {"subtask": subtask.text})


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
        case DecodeError():
            return ProtocolError(ErrorKind.UNDECODED, "", str(error))
        case NonFiniteError():
            return ProtocolError(ErrorKind.FAILED, "actions", "the policy's actions are not finite")

    return ProtocolError(ErrorKind.FAILED, "", str(error))
