"""Work spread over processes, where there is enough of it."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from insula.errors import InputError

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def mapping_over(processes: int) -> Iterator[Map]:
    """A `map` over so many processes, results in order; this process itself where it is 1. They are spawned: a script
    must call this under `if __name__ == "__main__":`."""
    if processes < 1:
        raise InputError(f"processes: got {processes}, expected at least 1")
    if processes == 1:
        yield map
        return
    on_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # in the workers: the parent decides
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=signal.signal, initargs=on_ctrl_c) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
