"""Batches of a mixture, made ahead of the train step by a thread or by worker processes."""

import signal
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from insula.batch import Batch
from insula.data.mixture import Mixture, Order
from insula.errors import InputError

AHEAD = 2
"""Batches kept ready."""
# As good as endless, and an int: Grain wants a range that ends.
LAST_STEP = 2**40
ALL_ROWS = slice(None)


class Loader:
    """Endless batches of `mixture`, from `start_step` on.

        with Loader(mixture, batch_size=64, seed=0, start_step=resumed_step) as batches:
            batch = next(batches)

    Which samples a batch holds depends on (seed, step) alone: a loader started at a step continues as if it had never
    stopped, whatever `workers` is (0: a thread; else this many processes). `rows`: those of every batch that this host
    makes; all hosts together see what one would. An exception while making a batch is raised by the `next()` that would
    have returned it. `close()` ends thread and processes.
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

        self._batches: Any = iter(batches)
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        # Also after an error: to go on would skip that batch without a word.
        if self._closed:
            raise RuntimeError("loader: next() after close() or after an error; make a new one at the same position")

        try:
            return next(self._batches)
        except BaseException:
            # Also at Ctrl-C: threads and processes left behind would keep the command from ending.
            self.close()
            raise

    def close(self) -> None:
        """End thread and processes; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._batches.close()

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
