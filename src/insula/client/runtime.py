"""The loop a robot runs: it acts at a fixed rate while its next chunk is computed elsewhere.

    every 1/hz s     observe ─► ask, if it is time and nothing is asked ─► act on what is due, or hold
    beside it        one thread sends what was asked last, and connects again where the server has gone

The robot's own process decides: it holds when nothing is due, it never repeats an action, and it executes none that
came from an observation older than `max_age_s`, whatever the network does. Steps are counted by the clock: one that
could not be taken in its time is left out, with its action, and never made up for in a burst.
"""

import dataclasses
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from insula.client.connection import Client, Reply
from insula.client.plan import Plan, Stitching
from insula.client.protocol import PASSING, ErrorKind
from insula.client.record import Recorder, Tick
from insula.errors import InputError, InsulaError, ProtocolError, ServerError

REMEMBERED = 10_000
"""Round trips kept for the summary: a robot may run for days."""
DELAYS = 10
"""Replies of which the slowest says how long the next will take (Black et al. 2025, arXiv 2506.07339, algorithm 1)."""


class Robot(Protocol):
    """What the loop drives. Each call should return well within a control step."""

    def observe(self) -> Mapping[str, Any]:
        """{"images": {camera: uint8 [h, w, 3]}, "state": [S]} of this moment."""
        ...

    def act(self, action: np.ndarray) -> None:
        """Start to execute one action [D]."""
        ...

    def hold(self) -> None:
        """Stay where it is: called in every step in which nothing is due."""
        ...


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Raises InputError for values that cannot be."""

    hz: float
    """Control steps a second, those of the data the policy learned from."""
    stitching: Stitching = Stitching.SWITCH
    replan_steps: int = 1
    """Steps between two requests at least; the next is sent when the last was answered."""
    max_age_s: float = 2.0
    """An action is executed at most this long after the observation it was predicted from."""

    def __post_init__(self) -> None:
        if not 0 < self.hz <= 10_000:
            raise InputError(f"hz is {self.hz}, expected control steps a second, above 0")
        if self.replan_steps < 1:
            raise InputError(f"replan_steps is {self.replan_steps}, expected at least 1")
        if not 0 < self.max_age_s < math.inf:
            raise InputError(f"max_age_s is {self.max_age_s}, expected seconds above 0")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What happened: control steps, those in which the robot held, those that came too late and were left out, replies,
    requests that were refused, and connections that were lost."""

    steps: int
    held: int
    missed: int
    replies: int
    refused: int
    lost: int
    delay_ms: tuple[float, ...]
    """Round trips of the last replies."""


@dataclasses.dataclass(frozen=True)
class _Asked:
    step: int
    observation: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Answer:
    step: int
    reply: Reply | None
    error: InsulaError | None


class Loop:
    """One robot, one policy, one task. `should_stop` is asked before every step; `recorder` sees all of it.

    `clock` and `sleep` are there for simulations, in which time is not that of the wall.
    """

    def __init__(
        self,
        client: Client,
        robot: Robot,
        task: str,
        config: RuntimeConfig,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.robot = robot
        self.task = task
        self.config = config
        self.recorder = recorder
        self.plan = Plan(config.stitching, max_age=math.floor(config.max_age_s * config.hz))
        self._clock = clock
        self._sleep = sleep
        self._asker = _Asker(client)
        self._delays: deque[int] = deque(maxlen=DELAYS)
        self._replies = 0
        self._delay_ms: deque[float] = deque(maxlen=REMEMBERED)
        self._refused = 0
        self._started = 0.0
        self._dim: int | None = None
        self._acted = -1  # the step of the last action

    def run(self, steps: int | None = None, should_stop: Callable[[], bool] = lambda: False) -> Summary:
        """Act until control step `steps`, or until told to stop. The robot is left holding.

        Raises ProtocolError where the very first observation is refused for what it is, because every other one would
        be, too, and where the API key is wrong.
        """
        self._started = self._clock()
        step = taken = held = 0
        self._asker.start()
        try:
            while (steps is None or step < steps) and not should_stop():
                seen = self._look(step)

                # A robot that executed what it missed, one action right after another, would move at many times its
                # speed. Neither may an action come late: it was predicted for its own place in time.
                step = max(step, self._now())
                held += not self._act(step, seen)
                taken += 1

                step = max(step + 1, self._now())
                self._sleep(max(0.0, self._started + step / self.config.hz - self._clock()))
        finally:
            # First, and whatever else fails: hanging up may take its time.
            try:
                self.robot.hold()
            finally:
                self._asker.stop()

        lost = self._asker.lost
        return Summary(taken, held, step - taken, self._replies, self._refused, lost, tuple(self._delay_ms))

    def _now(self) -> int:
        """The control step that the clock is in."""
        return math.floor((self._clock() - self._started) * self.config.hz)

    def _look(self, step: int) -> Mapping[str, Any]:
        """Observe, and ask where it is time."""
        seen = self.robot.observe()
        self._receive(step)

        since = step - self._asker.last_step
        if self._asker.idle and since >= self.config.replan_steps:
            self._asker.ask(_Asked(step, self._request(step, seen)))
        return seen

    def _act(self, step: int, seen: Mapping[str, Any]) -> bool:
        """Returns whether there was something to do."""
        action, origin = self.plan.action(step), self.plan.origin(step)
        if action is None:
            self.robot.hold()
        else:
            self.robot.act(action)
            self._acted = step

        if self.recorder is not None:
            self.recorder.step(Tick(step, self._clock() - self._started, seen, action, origin, self._asker.connected))
        return action is not None

    def _receive(self, step: int) -> None:
        """Take what was answered since the last step. A fault of ours ends the loop: a robot that holds for ever, with
        nobody to say why, is worse."""
        if self._asker.failure is not None:
            raise self._asker.failure

        for answer in self._asker.answers():
            error = answer.error or self._misfit(answer.reply)
            if error is not None:
                self._refused += isinstance(error, ProtocolError)
                if self.recorder is not None:
                    self.recorder.error(answer.step, str(error))
                if _is_final(error, answer.step):
                    raise error
                continue

            assert answer.reply is not None
            self._delays.append(step - answer.step)
            self._delay_ms.append(answer.reply.round_trip_ms)
            self._replies += 1
            held = self._acted < answer.step
            self.plan.add(answer.step, answer.reply.actions, start=step if held else None)
            if self.recorder is not None:
                self.recorder.reply(answer.step, step, answer.reply)

    def _misfit(self, reply: Reply | None) -> ProtocolError | None:
        """Actions of another robot than this one's: of another number than the server says, or than it sent before."""
        if reply is None:
            return None
        found = reply.actions.shape[1]
        expected = self._dim or self._asker.client.metadata.get("action_dim") or found
        if found != expected:
            return ProtocolError(ErrorKind.FAILED, "actions", f"{found} numbers for a step, expected {expected}")

        self._dim = found
        return None

    def _request(self, step: int, seen: Mapping[str, Any]) -> dict[str, Any]:
        # After this the answer could not be executed any more: the server need not work on it.
        request = {**seen, "task": self.task, "max_age_ms": self.config.max_age_s * 1000}

        left = self.plan.left(step) if self.config.stitching is Stitching.RTC else None
        if left is not None and self._asker.connected:
            delay = min(max(self._delays, default=1), len(left))

            # Farther than it was trained to be given, a policy would refuse, and with 0 whatever it is given: then it
            # starts a chunk of its own.
            most = self._asker.client.metadata.get("rtc_max_delay")
            if most is None or delay <= most > 0:
                request["previous"] = {"actions": left, "delay": delay}
        return request


def _is_final(error: InsulaError, step: int) -> bool:
    """Whether asking again can only fail again."""
    if not isinstance(error, ProtocolError) or error.kind in PASSING:
        return False

    return step == 0 or error.kind == ErrorKind.UNAUTHORIZED


class _Asker:
    """Sends one observation after another from a thread of its own, the newest always; connects again where it must."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lost = 0
        self.last_step = -(10**9)
        self.connected = False
        self.failure: BaseException | None = None
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._busy = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="insula-client", daemon=True)

    @property
    def idle(self) -> bool:
        """Whether the next observation may be asked about."""
        return not self._busy.is_set()

    def start(self) -> None:
        self._thread.start()

    def ask(self, asked: _Asked) -> None:
        self._busy.set()
        self.last_step = asked.step
        self._asked.put(asked)

    def answers(self) -> list[_Answer]:
        """All there are, oldest first."""
        found = []
        while not self._answered.empty():
            found.append(self._answered.get())
        return found

    def stop(self) -> None:
        """Wait for nothing: what is under way is thrown away."""
        self._stopped.set()
        self._asked.put(None)
        self._thread.join(timeout=0.5)
        if self._thread.is_alive():
            self.client.abort()
            self._thread.join(timeout=0.5)
        if not self._thread.is_alive():
            self.client.close()

    def _run(self) -> None:
        try:
            self._ask_all()
        except BaseException as error:  # carried to the loop, whatever it is
            self.failure = error

    def _ask_all(self) -> None:
        while (asked := self._asked.get()) is not None:
            # Each answer before `_busy` is cleared: whoever finds us idle finds the answer, too.
            try:
                answer = _Answer(asked.step, self.client.infer(asked.observation), None)
                self.connected = True
                self._answered.put(answer)
            except InsulaError as error:
                self._answered.put(_Answer(asked.step, None, error))
                if isinstance(error, ServerError):
                    self._connect_again(asked.step)
            self._busy.clear()

    def _connect_again(self, step: int) -> None:
        """Until it succeeds. What was asked is lost: it is too old by then, and a new observation will be asked."""
        self.lost += self.connected
        self.connected = False
        said = ""
        while not self._stopped.is_set():
            try:
                return self.client.wait(2.0)
            except InsulaError as error:  # no policy server there, or none yet
                if str(error) != said:  # once, and not every two seconds
                    self._answered.put(_Answer(step, None, error))
                    said = str(error)
                self._stopped.wait(0.2)
