"""What robots are to do, in words: said on the policy's thread, between batches of actions.

    one robot     1 · · · · · 2     3     4     5     6          its requests
    thoughts        ██████          ░░░░░░░░░                    the first is waited for, the others are not
    acted on                1 1     1     1     1     3          the request whose picture the subtask was said of

Thoughts have a line of their own, and after a batch of them all actions that are due by then come first: no action is
delayed by more than one batch of thoughts. Both are filled up to the same sizes, so nothing else is compiled.

What was said belongs to one connection and to one task. It dies with the connection, and another task is thought about
before it is acted on.
"""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from insula.errors import InsulaError
from insula.serve.backend import Thinks, Worker, in_one_call
from insula.serve.metrics import Metrics
from insula.serve.observations import Request
from insula.serve.tickets import Subtask, Ticket, as_refusal


@dataclass(eq=False)
class Mind:
    """What is known for the robot of one connection: the last `subtask` that was said, for which `task`, and the number
    of the request whose observation it was said of; `requests` counts them. `gone`: nobody will ask again."""

    subtask: str | None = None
    task: str = ""
    seen: int = 0
    requests: int = 0
    gone: bool = False
    thought: "Thought | None" = None
    asked: float = -math.inf
    """When a thought was last put in line, in seconds of `perf_counter`."""

    def knows(self, task: str) -> bool:
        """Whether there is a subtask of this task."""
        return self.subtask is not None and self.task == task

    def recall(self, number: int) -> Subtask:
        """The subtask, as old as it is for request `number`."""
        assert self.subtask is not None
        return Subtask(self.subtask, number - self.seen)


@dataclass(eq=False)
class Thought:
    """One that is in line or under way: what it is about, and the tickets that have nothing else to act on."""

    mind: Mind
    task: str
    request: Request
    number: int
    waiting: list[Ticket] = field(default_factory=list)
    running: bool = False

    def is_wanted(self) -> bool:
        """Whether a robot that is still there could act on it."""
        self.waiting = [ticket for ticket in self.waiting if ticket.is_wanted()]
        return bool(self.waiting) or not self.mind.gone


class Thinker:
    """`sizes`: batch sizes that are compiled, ascending. `every`: seconds after which a subtask is said again."""

    def __init__(self, backend: Thinks, worker: Worker, sizes: Sequence[int], every: float, metrics: Metrics) -> None:
        self.backend = backend
        self.sizes = tuple(sizes)
        self.every = every
        self._worker = worker
        self._metrics = metrics
        self._line: deque[Thought] = deque()
        self._running: list[Thought] = []

    @property
    def is_due(self) -> bool:
        """Whether a thought is in line."""
        return bool(self._line)

    @property
    def held(self) -> int:
        """Tickets that wait for a thought."""
        thoughts = [*self._line, *self._running]
        return sum(not ticket.outcome.done() for thought in thoughts for ticket in thought.waiting)

    def admit(self, ticket: Ticket, mind: Mind) -> bool:
        """Whether a ticket has something to act on; if not, `think` returns it once it has. Puts a thought in line
        where one is due."""
        request = ticket.request
        mind.requests += 1
        number = mind.requests
        if (told := request.subtask) is not None:
            ticket.subtask = lambda: Subtask(told, 0)
            return True
        if request.seed is not None:
            mind = Mind(gone=True)  # of its own: what was asked before must not change what a seed gives

        ticket.subtask = lambda: mind.recall(number)
        thought = self._think_of(request, number, mind)
        if mind.knows(_task(request)):
            return True

        assert thought is not None
        thought.waiting.append(ticket)
        return False

    async def think(self) -> list[Ticket]:
        """Work on one batch of thoughts, where any are in line. Returns tickets that now have something to act on."""
        self._running = self._next()
        if not self._running:
            return []

        requests = [thought.request for thought in self._running]
        said, seconds = await in_one_call(self._worker, self.backend.think, requests, self.sizes)
        thoughts, self._running = self._running, []
        failed = sum(isinstance(one, InsulaError) for one in said)
        self._metrics.thought(len(said) - failed, failed, seconds)

        return [ticket for thought, one in zip(thoughts, said, strict=True) for ticket in _settle(thought, one)]

    def _think_of(self, request: Request, number: int, mind: Mind) -> Thought | None:
        """The thought that is in line or under way for this task; a new one where it is due."""
        task, now = _task(request), time.perf_counter()
        thought = mind.thought
        if thought is not None and thought.task == task:
            if not thought.running:  # of the newest observation, and still at its place in line
                thought.request, thought.number = request, number
            return thought
        if thought is not None and not thought.running:
            self._line.remove(thought)
        mind.thought = None  # of another task: whoever waited for it has asked for something else since

        if mind.knows(task) and now - mind.asked < self.every:
            return None

        mind.thought = Thought(mind, task, request, number)
        mind.asked = now
        self._line.append(mind.thought)
        return mind.thought

    def _next(self) -> list[Thought]:
        batch: list[Thought] = []
        while self._line and len(batch) < self.sizes[-1]:
            thought = self._line.popleft()
            if thought.is_wanted():
                thought.running = True
                batch.append(thought)

        return batch


def _settle(thought: Thought, said: str | InsulaError) -> list[Ticket]:
    """Remember what was said, for those who waited and those to come. Where nothing was, the last one stays."""
    mind = thought.mind
    if mind.thought is not thought:  # the robot has another task by now
        return []

    mind.thought = None
    if isinstance(said, InsulaError):
        for ticket in thought.waiting:
            ticket.refuse(as_refusal(said))
        return []

    mind.subtask, mind.task, mind.seen = said, thought.task, thought.number
    return thought.waiting


def _task(request: Request) -> str:
    """What is no text is refused by whoever reads it as an instruction."""
    task = request.observation.get("task")
    return task if isinstance(task, str) else ""
