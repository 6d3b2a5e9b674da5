"""Batches of a mixture, made ahead of the train step by a thread or by worker processes."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from insula.batch import Batch
from insula.data.mixture import Mixture, Order
from insula.data.waiting import Puller, Workers, is_due
from insula.errors import InputError

log = logging.getLogger(__name__)
AHEAD = 2
"""Batches kept ready."""
# As good as endless, and an int: Grain wants a range that ends.
LAST_STEP = 2**40
ALL_ROWS = slice(None)
LOOK_EVERY = 1.0
"""Seconds between two looks at what a batch is waited for."""
FIRST_WARNING = 60.0
"""Seconds until a wait is told of, then twice as many and so on. A first batch takes some, since workers start."""
CLOSING = 5.0
"""Seconds that thread and processes have to end by themselves. They need a half."""


class Loader:
    """Endless batches of `mixture`, from `start_step` on.

        with Loader(mixture, batch_size=64, seed=0, start_step=resumed_step) as batches:
            batch = next(batches)

    Which samples a batch holds depends on (seed, step) alone: a loader started at a step continues as if it had never
    stopped, whatever `workers` is (0: a thread; else this many processes). `rows`: those of every batch that this host
    makes; all hosts together see what one would. An exception while making a batch is raised by the
    `next()` that would have returned it; WorkerError where a process has died. A batch that does not come is told of,
    and waited for still. `close()` ends thread and processes.
    """

    def __init__(
        self,
        mixture: Mixture,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        workers: int = 0,
        rows: slice = ALL_ROWS,
    ):
        if start_step < 0:
            raise InputError(f"loader: got start_step {start_step}, expected 0 or more")

        self.mixture = mixture
        self.order = mixture.order(batch_size, seed)

        # By step and nothing else: no iterator's state has to be saved with a checkpoint.
        make = _Make(mixture, self.order, rows)

        # One thread: it is many times as fast as a step takes, and Grain's default would take the step's own cores.
        read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        batches = grain.MapDataset.range(start_step, LAST_STEP).map(make).to_iter_dataset(read)

        # Each process opens the data sets again: worth it only where decoding is slower than the step.
        if workers:
            # Grain's workers look at its flags, and there is no command line for them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()

            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
            batches = batches.mp_prefetch(options, _leave_signals_to_the_parent)

        self.step = start_step
        """Of the batch that comes next."""
        self._batches: Any = iter(batches)
        self._workers = Workers(workers)
        self._puller = Puller(self._batches)
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # Also after an error: to go on would skip that batch without a word.
        if self._closed:
            raise RuntimeError("loader: next() after close() or after an error; make a new one at the same position")

        try:
            batch = self._wait()
        except BaseException:
            # Also at Ctrl-C: threads and processes left behind would keep the command from ending.
            self.close()
            raise

        self.step += 1
        return batch

    def _wait(self) -> Batch:
        """The next batch. Raises what making it raised, or WorkerError."""
        self._workers.find()
        self._puller.ask()

        told, since = 0.0, time.monotonic()
        while (made := self._puller.made(LOOK_EVERY)) is None:
            # Grain tells of some deaths itself, but waits for ever where a process ended as if all were well.
            self._workers.check(self.step)

            waited = time.monotonic() - since
            if is_due(waited, told, FIRST_WARNING):
                log.warning("%s", self.describe(waited))
                told = waited

        self._workers.find()
        batch, error = made
        if error is not None:
            self._workers.explain(error, self.step)
            raise error
        return batch

    def describe(self, waited: float) -> str:
        """Which batch has not come for so many seconds, who makes it, and of what."""
        names = list(self.mixture.sources)
        source, rows = self.order[self.step]
        parts = []
        for number in dict.fromkeys(source.tolist()):  # in the order in which they are read
            mine = rows[source == number]
            first = self.mixture.sources[names[number]].where(int(mine[0]))
            parts.append(f"{names[number]} ({len(mine)} samples, the first is {first})")

        return (
            f"loader: the batch of step {self.step + 1} has not come for {waited:.0f} s. {self._workers} should make "
            f"it from {'; '.join(parts)}. Training waits on; a disk or a network mount that hangs is the usual reason"
        )

    def close(self) -> None:
        """End thread and processes; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._puller.close()

        # Grain joins its threads, also one that reads from a disk that hangs or from a process that is no more: a
        # command that should end would wait with it.
        closing = threading.Thread(target=self._batches.close, name="insula-close", daemon=True)
        closing.start()
        closing.join(CLOSING)
        if closing.is_alive():
            self._workers.kill()
            closing.join(CLOSING)
        if closing.is_alive():
            log.warning("loader: what makes batches does not end, and is left behind")

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _leave_signals_to_the_parent(number: int, count: int) -> None:
    # Ctrl-C goes to the whole group: the parent finishes its step, saves, and ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A terminal that closes is the parent's to answer as well. SIGTERM stays: it is how the parent ends us.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class _Make(grain.transforms.Map):
    """A step's batch, or this host's part of it."""

    def __init__(self, mixture: Mixture, order: Order, rows: slice):
        self.mixture = mixture
        self.order = order
        self.rows = rows

    def map(self, element: int) -> Batch:
        # Every host computes the whole order, which is cheap, and makes only its own rows.
        source, rows = self.order[element]
        return self.mixture.batch(source[self.rows], rows[self.rows])
