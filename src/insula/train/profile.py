"""A trace of some updates, made by JAX's own profiler: what the devices did, and when."""

import logging
from pathlib import Path
from typing import Any

import jax

from insula.errors import brief

log = logging.getLogger(__name__)


class Profile:
    """Traces updates `steps[0]` to `steps[1]`, counted from 1, into `folder`; none where `steps` is None.

        with Profile(folder, (10, 12)) as profile:
            profile.before(step, state)
            ...  # the update to `step`
            profile.after(step, state)

    A trace that cannot be made is told of, and training goes on without it.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None = None):
        self.folder = folder
        self._due = steps
        self._first: int | None = None
        self._done: int | None = None

    def before(self, step: int, state: Any) -> None:
        """Start where it is time. A run that goes on may start in between."""
        if self._due is None or self._first is not None or not self._due[0] <= step <= self._due[1]:
            return

        jax.block_until_ready(state)  # else updates before it, which are queued, would be in it
        try:
            jax.profiler.start_trace(self.folder)
            self._first = step
        except Exception as error:  # of any kind: another profiler runs, the disk is full
            self._give_up(error)

    def after(self, step: int, state: Any) -> None:
        """Write the trace where the update to `step` was its last."""
        self._done = step
        if self._first is not None and self._due is not None and step == self._due[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace where one runs. Tells where there never was one."""
        due, self._due = self._due, None
        if due is None:
            return
        if self._first is None:
            log.warning("nothing is traced: steps %d to %d were not made here", *due)
            return

        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._give_up(error)
        else:
            last = self._done if self._done is not None else self._first
            log.warning(
                "a trace of steps %d to %d is in %s, for XProf or ui.perfetto.dev", self._first, last, self.folder
            )

    def _give_up(self, error: Exception) -> None:
        self._due = None
        log.warning("no trace in %s: %s", self.folder, brief(error))

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
