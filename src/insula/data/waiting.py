"""Waiting for a batch with open eyes: a thread asks for it, so that whoever waits can see who died, and say so."""

import multiprocessing
import queue
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from insula.errors import WorkerError

Made = tuple[Any, BaseException | None]
"""What was asked for, or why it is not there."""
_GRAINS_WORDS = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")
_CAUSES: dict[int, str] = {
    signal.SIGKILL: "mostly by the kernel, for want of memory",
    signal.SIGBUS: "mostly since /dev/shm is full (docker run --shm-size)",
}


def is_due(waited: float, told: float, first: float) -> bool:
    """Whether to tell of a wait of so many seconds, last told of after `told` (0: never): after `first`, 2 · `first`,
    4 · `first` and so on."""
    return waited >= (2 * told if told else first)


class Puller:
    """`next(items)`, in a thread of its own: one item for each `ask()`, none ahead."""

    def __init__(self, items: Iterator[Any]):
        self._items = items
        self._asked = queue.SimpleQueue[bool]()
        self._made = queue.SimpleQueue[Made]()
        # A daemon: a read that never returns must not keep the command from ending.
        self._thread = threading.Thread(target=self._run, name="insula-loader", daemon=True)

    def ask(self) -> None:
        """Have the next item made."""
        if self._thread.ident is None:  # not before there is something to do
            self._thread.start()
        self._asked.put(True)

    def made(self, seconds: float) -> Made | None:
        """What was asked for, None where it does not come within so many seconds."""
        try:
            return self._made.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the thread, once the item that it may be waiting for has come."""
        self._asked.put(False)

    def _run(self) -> None:
        while self._asked.get():
            try:
                self._made.put((next(self._items), None))
            except BaseException as error:
                self._made.put((None, error))


class Workers:
    """The processes of one loader. Grain does not hand them out: they are those that are new while it is waited for."""

    def __init__(self, count: int):
        self.count = count
        self._others = set(multiprocessing.active_children())
        self._ours: set[BaseProcess] = set()

    def find(self) -> None:
        """Look for those that have started since. Does nothing once all are known."""
        if len(self._ours) < self.count:
            self._ours |= set(multiprocessing.active_children()) - self._others

    def check(self, step: int) -> None:
        """Raises WorkerError where one has ended: none does by itself, and no batch of its own will come any more."""
        self.find()
        for process in self._ours:
            if process.exitcode is not None:
                raise WorkerError(_death(process.exitcode, step))

    def explain(self, error: BaseException, step: int) -> None:
        """Raises WorkerError where `error` is Grain's word for a dead worker."""
        if found := _GRAINS_WORDS.search(str(error)):
            raise WorkerError(_death(int(found.group(1)), step)) from error

    def kill(self) -> None:
        """End them, whatever they do."""
        self.find()
        for process in self._ours:
            process.kill()

    def __str__(self) -> str:
        numbers = ", ".join(str(number) for number in sorted(process.pid or 0 for process in self._ours))
        return f"{self.count} worker process(es) (pid {numbers or 'unknown'})" if self.count else "A thread"


def _death(code: int, step: int) -> str:
    how = f"ended with exit code {code}; its own words are above"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal has a number alone
            name = f"signal {-code}"
        how = f"was killed by {name}" + (f" ({_CAUSES[-code]})" if -code in _CAUSES else "")

    return (
        f"loader: a process that makes batches {how}; the batch of step {step + 1} will not come. Go on from the "
        "newest checkpoint with --resume, and where memory is short with fewer --workers"
    )
