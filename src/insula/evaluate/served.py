"""A policy that is served elsewhere, as one to evaluate: what a robot gets, through the same wire."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from insula.client.connection import Client
from insula.client.protocol import ErrorKind
from insula.errors import DecodeError, ProtocolError
from insula.policy.modes import Chunk


class ServedPolicy:
    """`client` is asked for one row after another, and the server's mode is what acts. Raises as `Client.infer`, but
    DecodeError where the policy said no chunk or no subtask, as it does in process."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """One chunk [H, D]."""
        try:
            return self.client.infer(observation).actions
        except ProtocolError as error:
            if error.kind == ErrorKind.UNDECODED:
                raise DecodeError(error.message) from None
            raise

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]) -> list[Chunk]:
        """A chunk [H, D] for each row, or a DecodeError. The server draws the noise by the seeds given here, and says a
        subtask for each of them, so an episode is the one it is in process."""
        # Rows that only fill a batch repeat a seed: asked once.
        chunks: dict[tuple[int, ...], Chunk] = {}
        for observation, seed in zip(observations, seeds, strict=True):
            name = tuple(map(int, seed))
            if name not in chunks:
                try:
                    chunks[name] = self.act(observation | {"seed": list(name)})
                except DecodeError as error:
                    chunks[name] = error

        return [chunks[tuple(map(int, seed))] for seed in seeds]
