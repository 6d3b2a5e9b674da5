"""Which action is due: chunks by the control step they were predicted from, and how one follows another.

    step          4  5  6  7  8  9 10 11
    chunk of 4    a  a  a  a  a  a
    chunk of 6          b  b  b  b  b  b      predicted from what was seen at step 6, and arrived at step 8
    executed      a  a  a  a  b  b  b  b      switching: from the moment it is there, at its own place in time

Actions are never repeated, and never taken from behind a chunk's end: where nothing is due there is nothing, and the
robot holds. A robot that has held since the observation is where it was, so there a chunk begins with its first action:
its middle is for a robot that has already moved. Else its actions keep their place in time.
"""

import dataclasses
import enum
from collections import deque

import numpy as np

ENSEMBLE_DECAY = 0.01
"""Temporal ensembling weighs the i-th oldest prediction by exp(−0.01 · i): ACT's own (Zhao et al. 2023, §IV)."""


class Stitching(enum.StrEnum):
    """How a new chunk follows the one that is being executed."""

    SWITCH = "switch"
    """The newest one, at once."""
    ENSEMBLE = "ensemble"
    """The mean of all that have an action for a step (ACT)."""
    RTC = "rtc"
    """The newest one, which the policy was asked to make go on from the last (real-time chunking)."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunk:
    """Actions [H, D], the step of the observation they were predicted from, and the step of the first of them."""

    seen: int
    start: int
    actions: np.ndarray


class Plan:
    """`max_age`: an action is executed at most this many steps after the observation it was predicted from."""

    def __init__(self, stitching: Stitching = Stitching.SWITCH, max_age: int | None = None) -> None:
        self.stitching = stitching
        self.max_age = max_age
        self._chunks: deque[_Chunk] = deque()  # oldest first

    def add(self, seen: int, actions: np.ndarray, start: int | None = None) -> bool:
        """A chunk [H, D] predicted from what was seen at step `seen`, where it begins unless told. `start`: the step it
        begins at for a robot that has held since. Returns False for one that is no newer than what is there: replies
        may come in another order than they were asked for."""
        if self._chunks and seen <= self._chunks[-1].seen:
            return False

        self._chunks.append(_Chunk(seen, seen if start is None else start, actions))
        if self.stitching is not Stitching.ENSEMBLE:
            while len(self._chunks) > 1:
                self._chunks.popleft()
        return True

    def action(self, step: int) -> np.ndarray | None:
        """What is due at a step, [D]; None where nothing is."""
        while self._chunks and not self._covers(self._chunks[0], step) and self._chunks[0].start < step:
            self._chunks.popleft()

        return self._due(step)

    def ahead(self, step: int) -> list[np.ndarray]:
        """What would be due from a step on, [D] each, were no chunk to come any more. It forgets nothing."""
        rows: list[np.ndarray] = []
        while (action := self._due(step + len(rows))) is not None:
            rows.append(action)

        return rows

    def origin(self, step: int) -> int | None:
        """The step of the newest observation behind the action of a step; None where nothing is due."""
        covering = [chunk.seen for chunk in self._chunks if self._covers(chunk, step)]
        return covering[-1] if covering else None

    def left(self, step: int) -> np.ndarray | None:
        """What is left of the newest chunk from a step on, [n, D]; None where nothing is. What a policy is told for
        real-time chunking."""
        if not self._chunks:
            return None

        newest = self._chunks[-1]
        rest = newest.actions[max(step - newest.start, 0) :]
        return rest if len(rest) and newest.start <= step else None

    def clear(self) -> None:
        """Forget all: another episode begins."""
        self._chunks.clear()

    def _due(self, step: int) -> np.ndarray | None:
        due = [chunk.actions[step - chunk.start] for chunk in self._chunks if self._covers(chunk, step)]
        if not due:
            return None
        if len(due) == 1:
            return due[0]

        # Oldest first, with the most weight: the mean moves slowly, which is what makes it smooth.
        weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(due)))
        return np.average(due, axis=0, weights=weights).astype(due[0].dtype)

    def _covers(self, chunk: _Chunk, step: int) -> bool:
        young = self.max_age is None or step - chunk.seen <= self.max_age
        return young and chunk.start <= step < chunk.start + len(chunk.actions)
