"""A trained policy as a backend: fixed shapes, rows that fail alone, metadata that tell a client what to send."""

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from insula.data.images import resize_with_pad
from insula.data.observe import check_raw
from insula.errors import DecodeError, InsulaError, NonFiniteError
from insula.policy import Inputs, Policy, Seed, join
from insula.policy.modes import Chunk, Mode
from insula.serve.backend import Answer
from insula.serve.observations import Request

log = logging.getLogger(__name__)

_Found = TypeVar("_Found")


class PolicyBackend:
    """Acts by flow. `name` and `certificate` are shown on the server's page: what is served, and what was measured of
    its insulation."""

    mode = Mode.FLOW

    def __init__(self, policy: Policy, name: str, certificate: str) -> None:
        self.policy = policy
        self.metadata = describe(policy)
        self.about = {
            "policy": name,
            "mode": str(self.mode),
            "certificate": certificate,
            "preset": policy.config.name,
            "seed": policy.seed,
            "insula": version("insula"),
        }
        self._answered = 0

    def warm(self, size: int) -> None:
        """Compile what batches of `size` need, by acting on one of black pictures: with and without a last chunk."""
        blank = self.blank()
        nothing_left = {"actions": np.zeros((0, self.policy.robot.action_dim), np.float32), "delay": 0}
        for observation in (blank, blank | {"previous": nothing_left}):
            check_able(self.answer([Request(observation)] * size, size))

    def answer(self, requests: Sequence[Request], size: int) -> list[Answer]:
        """As `Backend.answer`. Rows are repeated to fill the batch, so that no other size is ever compiled."""
        seeds = [request.seed or (self._answered + n,) for n, request in enumerate(requests, start=1)]
        self._answered += len(requests)
        chunks = self.together(requests, seeds, size, self.read, self.sample)

        wrong = NonFiniteError("the policy produced NaN or infinite actions")
        return [chunk if isinstance(chunk, InsulaError) or np.isfinite(chunk).all() else wrong for chunk in chunks]

    def read(self, observation: dict[str, Any]) -> Inputs:
        """One row, as the model is given it. Raises as `Policy.read`."""
        return self.policy.read([observation])

    def sample(self, inputs: Inputs, seeds: Sequence[Seed]) -> list[Chunk]:
        """A chunk for each row."""
        return list(self.policy.sample(inputs, seeds))

    def together(
        self,
        requests: Sequence[Request],
        seeds: Sequence[Seed],
        size: int,
        read: Callable[[dict[str, Any]], Inputs],
        run: Callable[[Inputs, Sequence[Seed]], list[_Found | InsulaError]],
    ) -> list[_Found | InsulaError]:
        """`run` on all rows that `read` can read, filled up to `size`; an error in the place of every other one."""
        rows = [self._row(request, read) for request in requests]
        good = [(row, seed) for row, seed in zip(rows, seeds, strict=True) if not isinstance(row, InsulaError)]
        if not good:
            return [row for row in rows if isinstance(row, InsulaError)]

        filled = good + good[:1] * (size - len(good))
        found = iter(run(join([row for row, _ in filled]), [seed for _, seed in filled]))
        return [row if isinstance(row, InsulaError) else next(found) for row in rows]

    def blank(self) -> dict[str, Any]:
        """An observation of black pictures, to compile with."""
        robot, side = self.policy.robot, self.policy.config.vision.image_size
        black = np.zeros((side, side, 3), np.uint8)
        return {"images": dict.fromkeys(robot.cameras, black), "state": np.zeros(robot.state_dim), "task": ""}

    def _row(self, request: Request, read: Callable[[dict[str, Any]], Inputs]) -> Inputs | InsulaError:
        """One row by itself, so that what is wrong with it is not its neighbors' concern."""
        policy, observation = self.policy, request.observation
        try:
            check_raw(observation, policy.robot)

            # Of one size here, on the host: a size of its own would compile a program of its own while robots wait.
            square = (policy.config.vision.image_size,) * 2
            pictures = {name: resize_with_pad(observation["images"][name], square) for name in policy.robot.cameras}
            return read(observation | {"images": pictures})
        except InsulaError as error:
            return error
        except Exception:
            # A fault of ours, and still this row's alone. The log has all of it.
            log.exception("an observation could not be read")
            return InsulaError("the policy failed to read this; the server's log says how")


def check_able(answers: Sequence[Any]) -> None:
    """A policy that cannot act on black pictures can act on nothing, and before it is served is the time to say so.
    Raises what it answered, but for words that mean nothing: pictures that mean something may have others."""
    for answer in answers:
        if isinstance(answer, InsulaError) and not isinstance(answer, DecodeError):
            raise answer


def describe(policy: Policy) -> dict[str, Any]:
    """What a client needs to know to ask well."""
    robot = policy.robot
    return {
        "server": "insula",
        "robot": next(name for name, one in policy.assets.robots.items() if one is robot),
        "cameras": list(robot.cameras),
        "image_size": policy.config.vision.image_size,
        "state_dim": robot.state_dim,
        "action_dim": robot.action_dim,
        "horizon": robot.horizon,
        "units": dict(robot.units),
        "rtc_max_delay": policy.config.objective.rtc_max_delay or None,  # None: guided, so any delay will do
    }
