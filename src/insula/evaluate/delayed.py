"""What a robot executes while its next chunk is on its way: any policy, with a delay of so many control steps.

    asked at step     k                       k + period
    executed          old chunk   | new chunk, from its own step `delay` on
                      k … k + delay − 1       … k + period − 1

An episode begins with a robot that holds until its first chunk is there, and then executes it from its first action on.

The plan of chunks is the very one a robot's loop runs (`insula.client.plan`). Time stands still while the policy acts,
so a delay here is exactly what it says, on any machine.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from insula.client.plan import Plan, Stitching
from insula.errors import InputError, InsulaError
from insula.evaluate.episodes import Acts
from insula.policy.modes import Chunk

REMEMBERED = 10
"""Delays of which the largest is expected next, as in `insula.client.runtime`."""


@dataclasses.dataclass(frozen=True)
class Delay:
    """A chunk asked for at step k is there at step k + `steps`, give or take `jitter`. Raises InputError for values
    that cannot be."""

    steps: int = 0
    jitter: int = 0
    stitching: Stitching = Stitching.SWITCH

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.jitter <= self.steps:
            raise InputError(
                f"delay is {self.steps} steps, jitter {self.jitter}; expected a delay ≥ 0 and a jitter up to it"
            )

    @property
    def longest(self) -> int:
        """Steps until a chunk is there at the latest."""
        return self.steps + self.jitter


@dataclasses.dataclass(eq=False)
class _Episode:
    plan: Plan
    late: deque[int]
    last: np.ndarray | None = None
    origin: int | None = None
    """The step of the observation that `last` was predicted from; None where it was held."""
    acted: int = -1
    """The step of the last action that was not held."""


class DelayedPolicy:
    """A policy as seen by a robot that looks again every `period` steps and gets an answer `delay` later: `act_batch`
    returns what the robot executes meanwhile, and behind it what it would go on with: [n, D] each, n ≥ period.

    `hold` is the action [D] for steps in which nothing is due; entries that are NaN stay what they last were (a gripper
    must not open because a chunk is late). `jumps` collects the largest change of an action, over the dimensions that
    `moves` selects, where one chunk follows another. Where the policy had no chunk, the last one goes on, and at its
    end the robot holds; `failures` counts these by what was said. `held`: by episode, the steps in which it held.
    """

    def __init__(self, policy: Acts, delay: Delay, period: int, hold: np.ndarray, moves: slice = slice(None)) -> None:
        if delay.longest > period:
            raise InputError(
                f"a delay of up to {delay.longest} steps, but the next chunk is asked for after {period}; "
                "expected at most that"
            )

        self.policy = policy
        self.delay = delay
        self.period = period
        self.jumps: list[float] = []
        self.failures: Counter[str] = Counter()
        self.held: dict[tuple[int, ...], list[int]] = {}
        self._hold = hold
        self._moves = moves
        self._episodes: dict[tuple[int, ...], _Episode] = {}

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """One chunk of the policy itself."""
        return self.policy.act(observation)

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """`seeds` are (scene, …, step): all but the last name an episode."""
        # Rows that only fill a batch repeat a seed: they are the same row.
        rows = {tuple(seed): row for row, seed in reversed(list(enumerate(seeds)))}
        for seed in rows:
            if seed[-1] == 0:
                self._episodes[seed[:-1]] = _Episode(Plan(self.delay.stitching), deque(maxlen=REMEMBERED))
                self.held[seed[:-1]] = []

        asked = [
            self._ask(observation, self._episodes[tuple(seed[:-1])], seed[-1])
            for observation, seed in zip(observations, seeds, strict=True)
        ]
        chunks = self.policy.act_batch(asked, seeds)
        for chunk in chunks:
            if not isinstance(chunk, InsulaError) and len(chunk) < self.period:
                raise InputError(f"chunks have {len(chunk)} steps, but the next is asked for after {self.period}")

        played = {seed: self._play(self._episodes[seed[:-1]], seed, chunks[row]) for seed, row in rows.items()}
        return [played[tuple(seed)] for seed in seeds]

    def _ask(self, observation: dict[str, Any], episode: _Episode, step: int) -> dict[str, Any]:
        if self.delay.stitching is not Stitching.RTC:
            return observation

        # Also where nothing is left: without any, another program runs, and an episode would depend on its neighbors.
        left = episode.plan.left(step)
        if left is None:
            left = np.zeros((0, len(self._hold)), np.float32)
        expected = min(max(episode.late, default=self.delay.steps), len(left))
        return observation | {"previous": {"actions": left, "delay": expected}}

    def _play(self, episode: _Episode, seed: tuple[int, ...], chunk: Chunk) -> np.ndarray:
        """The next `period` actions, and what is left of the plan behind them."""
        first, late = seed[-1], self._late(seed)
        rows: list[np.ndarray] = []
        for step in range(first, first + self.period):
            if step == first + late:
                self._add(episode, first, chunk, step)

            action, origin = episode.plan.action(step), episode.plan.origin(step)
            if action is None:
                action = self._hold_still(episode)
                self.held[seed[:-1]].append(step)
            elif episode.origin is not None and origin != episode.origin:
                assert episode.last is not None
                self.jumps.append(float(np.abs(action - episode.last)[self._moves].max()))

            episode.last = action
            episode.origin = origin
            episode.acted = step if origin is not None else episode.acted
            rows.append(action)

        if late == self.period:  # there with the next request
            self._add(episode, first, chunk, first + late)
        episode.late.append(late)
        return np.stack(rows + episode.plan.ahead(first + self.period))

    def _add(self, episode: _Episode, seen: int, chunk: Chunk, step: int) -> None:
        if isinstance(chunk, InsulaError):
            self.failures[str(chunk)] += 1
            return

        episode.plan.add(seen, chunk, start=step if episode.acted < seen else None)

    def _late(self, seed: tuple[int, ...]) -> int:
        """Of the seed alone, so that an episode evaluated alone is the same."""
        if not self.delay.jitter:
            return self.delay.steps

        rng = np.random.default_rng([abs(int(part)) for part in seed])
        return int(self.delay.steps + rng.integers(-self.delay.jitter, self.delay.jitter + 1))

    def _hold_still(self, episode: _Episode) -> np.ndarray:
        kept = np.isnan(self._hold)
        last = np.zeros_like(self._hold) if episode.last is None else episode.last
        return np.where(kept, last, self._hold).astype(np.float32)
