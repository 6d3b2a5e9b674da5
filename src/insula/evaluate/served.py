"""A policy that is served elsewhere, as one to evaluate: what a robot gets, through the same wire."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from insula.client.connection import Client


class ServedPolicy:
    """`client` is asked for one row after another. Raises as `Client.infer`."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """One chunk [H, D]."""
        return self.client.infer(observation).actions

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        """[B, H, D]. The server draws the noise by the seeds given here, so an episode is the one it is in process."""
        # Rows that only fill a batch repeat a seed: asked once.
        chunks: dict[tuple[int, ...], np.ndarray] = {}
        for observation, seed in zip(observations, seeds, strict=True):
            name = tuple(map(int, seed))
            if name not in chunks:
                chunks[name] = self.act(observation | {"seed": list(name)})

        return np.stack([chunks[tuple(map(int, seed))] for seed in seeds])
