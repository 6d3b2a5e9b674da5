"""A trained policy as a backend: fixed shapes, rows that fail alone, metadata that tell a client what to send."""

import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from insula.data.images import resize_with_pad
from insula.data.observe import check_raw
from insula.errors import InsulaError, NonFiniteError
from insula.policy import Inputs, Policy, join
from insula.serve.backend import Answer
from insula.serve.observations import Request

log = logging.getLogger(__name__)

Row = tuple[Inputs, tuple[int, ...]]
"""What the model is given for one request, and the seed of its noise."""


class PolicyBackend:
    """`name` and `certificate` are shown on the server's page: what is served, and what was measured of its
    insulation."""

    def __init__(self, policy: Policy, name: str, certificate: str) -> None:
        self.policy = policy
        self.metadata = describe(policy)
        self.about = {
            "policy": name,
            "certificate": certificate,
            "preset": policy.config.name,
            "seed": policy.seed,
            "insula": version("insula"),
        }
        self._answered = 0

    def warm(self, size: int) -> None:
        """Compile what batches of `size` need, by acting on one of black pictures: with and without a last chunk."""
        blank = self._blank()
        nothing_left = {"actions": np.zeros((0, self.policy.robot.action_dim), np.float32), "delay": 0}
        for observation in (blank, blank | {"previous": nothing_left}):
            for answer in self.answer([Request(observation)] * size, size):
                # A policy that cannot act on this can act on nothing; now is the time to say so.
                if isinstance(answer, InsulaError):
                    raise answer

    def answer(self, requests: Sequence[Request], size: int) -> list[Answer]:
        """As `Backend.answer`. Rows are repeated to fill the batch, so that no other size is ever compiled."""
        read = [self._read(request) for request in requests]
        chunks = iter(self._act([row for row in read if not isinstance(row, InsulaError)], size))

        return [row if isinstance(row, InsulaError) else next(chunks) for row in read]

    def _read(self, request: Request) -> Row | InsulaError:
        """One row by itself, so that what is wrong with it is not its neighbors' concern."""
        policy, observation = self.policy, request.observation
        self._answered += 1
        try:
            check_raw(observation, policy.robot)

            # Of one size here, on the host: a size of its own would compile a program of its own while robots wait.
            square = (policy.config.vision.image_size,) * 2
            pictures = {name: resize_with_pad(observation["images"][name], square) for name in policy.robot.cameras}
            inputs = policy.read([observation | {"images": pictures}])
        except InsulaError as error:
            return error
        except Exception:
            # A fault of ours, and still this row's alone. The log has all of it.
            log.exception("an observation could not be read")
            return InsulaError("the policy failed to read this; the server's log says how")

        return inputs, request.seed or (self._answered,)

    def _act(self, rows: list[Row], size: int) -> list[Answer]:
        if not rows:
            return []

        filled = rows + rows[:1] * (size - len(rows))
        chunks = self.policy.sample(join([inputs for inputs, _ in filled]), [seed for _, seed in filled])
        wrong = NonFiniteError("the policy produced NaN or infinite actions")
        return [chunk if np.isfinite(chunk).all() else wrong for chunk in chunks[: len(rows)]]

    def _blank(self) -> dict[str, Any]:
        robot, side = self.policy.robot, self.policy.config.vision.image_size
        black = np.zeros((side, side, 3), np.uint8)
        return {"images": dict.fromkeys(robot.cameras, black), "state": np.zeros(robot.state_dim), "task": ""}


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
