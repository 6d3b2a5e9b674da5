"""Batches in an order that is a pure function of (seed, position), prepared one step ahead of the train step."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType

import grain
import numpy as np

from insula.batch import Batch
from insula.data.samples import Samples


class BatchOrder:
    """`order[step]` -> sample numbers int64 [B]: shuffled anew every epoch, any step in O(1), no state.

    Every sample comes once per epoch; a batch may reach over the end of one. Raises ValueError for no samples.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        if size < 1 or batch_size < 1:
            raise ValueError(f"loader: got {size} samples and batch size {batch_size}, expected at least 1 of each")
        self._order = grain.MapDataset.range(size).seed(seed).shuffle().repeat().batch(batch_size)

    def __getitem__(self, step: int) -> np.ndarray:
        return self._order[step]


class Loader:
    """Endless batches of `samples`, from `start_step` on; a thread keeps `ahead` of them ready.

        with Loader(samples, batch_size=64, seed=0, start_step=resumed_step) as batches:
            batch = next(batches)

    `position` counts the batches handed out: a loader started there continues as if it had never stopped. An exception
    while making a batch is raised by the `next()` that would have returned it. `close()` stops the thread.
    """

    def __init__(self, samples: Samples, batch_size: int, seed: int, start_step: int = 0, ahead: int = 2):
        if start_step < 0:
            raise ValueError(f"loader: got start_step {start_step}, expected 0 or more")
        self.samples, self.order, self.position = samples, BatchOrder(len(samples), batch_size, seed), start_step
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=max(1, ahead))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(start_step,), name="insula-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise RuntimeError("loader: next() after close() or after an error; make a new one at the same position")
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.position += 1
        return item

    def close(self) -> None:
        """Stop the thread; a second call does nothing."""
        self._stop.set()
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            self._drain()  # a full queue would keep it waiting
            self._thread.join(timeout=0.05)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _fill(self, step: int) -> None:
        item: Batch | BaseException | None = None
        while not self._stop.is_set() and not isinstance(item, BaseException):
            try:
                item = self.samples.batch(self.order[step])
            except BaseException as e:  # the consumer raises it
                item = e
            step += 1
            self._hand_over(item)

    def _hand_over(self, item: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _drain(self) -> None:
        while True:
            try:
                self._ready.get_nowait()
            except queue.Empty:
                return
