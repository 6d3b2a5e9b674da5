"""Backends that act by words: chunks decoded from FAST tokens, and flow towards a subtask that was said or told.

They tell clients their mode, which `PolicyBackend` does not: flow is what a client expects that knows of no modes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from insula.errors import DecodeError, InsulaError, ObservationError
from insula.policy import Inputs, Policy, Seed
from insula.policy.modes import PLACEHOLDER, Chunk, Mode, TokenPolicy, usable_subtask
from insula.policy.speaking import Said, Speaker
from insula.serve.observations import Request
from insula.serve.policy_backend import PolicyBackend, check_able


class TokenBackend(PolicyBackend):
    """Acts by FAST tokens. What is no chunk is a DecodeError, never zeros."""

    mode = Mode.TOKENS

    def __init__(self, policy: Policy, name: str, certificate: str) -> None:
        super().__init__(policy, name, certificate)
        self.metadata |= {"mode": str(self.mode), "rtc_max_delay": 0}  # a chunk cannot go on from the last one
        self.actor = TokenPolicy(policy)

    def warm(self, size: int) -> None:
        """Compile what batches of `size` need."""
        check_able(self.answer([Request(self.blank())] * size, size))

    def read(self, observation: dict[str, Any]) -> Inputs:
        """As `PolicyBackend.read`. Raises ObservationError for a "previous"."""
        if "previous" in observation:
            raise ObservationError("chunks of FAST tokens cannot go on from the last one, expected none", "previous")

        return super().read(observation)

    def sample(self, inputs: Inputs, seeds: Sequence[Seed]) -> list[Chunk]:
        """A chunk for each row, or a DecodeError."""
        return self.actor.sample(inputs, seeds)


class SubtaskBackend(PolicyBackend):
    """Acts by flow towards the "subtask" of an observation, and says it where it is asked to think."""

    mode = Mode.SUBTASK

    def __init__(self, policy: Policy, name: str, certificate: str) -> None:
        super().__init__(policy, name, certificate)
        self.metadata |= {"mode": str(self.mode)}
        self.speaker = Speaker(policy)

    def blank(self) -> dict[str, Any]:
        """As `PolicyBackend.blank`, with a subtask: without one it may never have been trained to act."""
        return super().blank() | {"subtask": PLACEHOLDER}

    def warm(self, size: int) -> None:
        """Compile what batches of `size` need, thoughts among them."""
        super().warm(size)
        check_able(self.think([Request(self.blank())] * size, size))

    def think(self, requests: Sequence[Request], size: int) -> list[str | InsulaError]:
        """As `Thinks.think`: a DecodeError where a subtask cannot be acted on (`usable_subtask`)."""
        seeds = [request.seed or (0,) for request in requests]  # the likeliest words: nothing is drawn
        said = self.together(requests, seeds, size, self._wonder, self._say)
        return [
            one if isinstance(one, InsulaError) else self._usable(one, request.observation)
            for one, request in zip(said, requests, strict=True)
        ]

    def _wonder(self, observation: dict[str, Any]) -> Inputs:
        return Inputs(self.policy.wonder([observation]), None, np.asarray(observation["state"])[None])

    def _say(self, inputs: Inputs, seeds: Sequence[Seed]) -> list[Said | InsulaError]:
        return list(self.speaker.say(inputs.observation, seeds))

    def _usable(self, said: Said, observation: dict[str, Any]) -> str | DecodeError:
        try:
            return usable_subtask(self.policy, said, observation)
        except DecodeError as error:
            return error


BACKENDS = {Mode.FLOW: PolicyBackend, Mode.TOKENS: TokenBackend, Mode.SUBTASK: SubtaskBackend}
