"""Several processes, one for each host, that train one model together.

Each runs the same program, over arrays whose pieces lie on the devices of all. What is no array (settings, metrics, the
names of checkpoints) is process 0's to write, and what depends on a file is process 0's to decide: two processes that
read a folder a moment apart would go different ways, and then wait for each other for ever.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from insula.checks import check_integer
from insula.errors import CheckpointError, InputError, brief

log = logging.getLogger(__name__)
LOST = 40.0
"""Seconds without a sign of life after which a process is taken for dead. JAX itself waits for 100, and then aborts
with a stack trace."""
LOST_CONNECTION = ("UNKNOWN:", "INTERNAL:", "UNAVAILABLE:", "ABORTED:", "DEADLINE_EXCEEDED:")
"""How errors of a program of all devices begin that another process is the reason of, rather than our memory."""
PATIENCE = 300.0
"""Seconds in which all processes have to start, JAX's own number."""
BEAT = 2.0
"""Seconds between two signs of life."""
GONE, FAILED = "gone", "failed"
"""The last sign of a process that ended well, and of one that did not."""
_LEAVING = threading.Event()
EXIT_LOST = 75
"""The exit code where another process was lost (EX_TEMPFAIL): start again with --resume."""


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """How this process finds the others; alone unless told. Raises InputError where only a part is given."""

    join: bool = False
    """Join the others as SLURM, Kubernetes, Open MPI or a TPU pod say where they are."""
    coordinator: str | None = None
    """HOST:PORT at which process 0 listens, where nothing says so; then `count` and `index`, too."""
    count: int | None = None
    """Processes in all."""
    index: int | None = None
    """Of this process, from 0."""

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise InputError(
                f"processes: coordinator, count and index belong together, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing"
            )
        if missing:
            return

        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(f"processes: coordinator is {self.coordinator!r}, expected HOST:PORT")
        check_integer("processes: count", self.count, 1)
        check_integer("processes: index", self.index, 0, self.count - 1)  # type: ignore[operator]


ALONE = ProcessesConfig()


def join_processes(config: ProcessesConfig) -> None:
    """Meet the other processes, before anything is computed; nothing where this one is alone. From here on a process
    that dies ends this one as well (`EXIT_LOST`). Raises InputError where nothing says where the others are, or they
    do not come."""
    if not (config.join or config.coordinator):
        return

    if config.coordinator:
        _wait_for_coordinator(config)

    try:
        jax.distributed.initialize(
            config.coordinator,
            config.count,
            config.index,
            cluster_detection_method="deactivate" if config.coordinator else None,
        )
    except (RuntimeError, ValueError) as error:  # JAX's own errors of a coordinator that does not answer are the first
        raise InputError(
            f"processes: cannot join the others ({brief(error)}); under SLURM, Kubernetes, Open MPI or on a TPU pod "
            "--processes.join finds them, else give --processes.coordinator HOST:PORT --processes.count N "
            "--processes.index I"
        ) from error

    if jax.process_count() > 1:
        threading.Thread(target=_watch, name="other processes", daemon=True).start()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What all do. At its end they wait for each other; where it raises in one of them, the others are told to end, as
    they may wait for that one inside a program of their devices, which nothing can interrupt."""
    if jax.process_count() == 1:
        yield
        return

    try:
        yield
        multihost_utils.sync_global_devices("insula: done")
        _sign(GONE)
    except BaseException as error:
        _LEAVING.set()  # no longer of interest: the others may end before we have said why
        if isinstance(error, (RuntimeError, ValueError)) and str(error).startswith(LOST_CONNECTION):
            _sign(FAILED)
            _end(f"another process of {jax.process_count()} is gone ({brief(error)})")
        atexit.register(_leave_failed)  # when the error has been told: process 0 may take JAX, and us, along
        raise


def _wait_for_coordinator(config: ProcessesConfig) -> None:
    """Until process 0 listens: JAX would wait without a word, and then abort. Raises InputError after `PATIENCE`."""
    log.warning(
        "process %d of %d meets the others at %s, and waits for them for up to %.0f s",
        *(config.index, config.count, config.coordinator, PATIENCE),
    )
    host, _, port = str(config.coordinator).rpartition(":")
    until = time.monotonic() + PATIENCE
    while config.index != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise InputError(
                    f"processes: process 0 does not answer at {config.coordinator} ({brief(error)}); is it started, "
                    "and can it be reached from here?"
                ) from error
            time.sleep(1)


def is_main() -> bool:
    """Whether this is process 0, which writes for all."""
    return jax.process_index() == 0


def on_main(action: Callable[[], int | None]) -> int | None:
    """What `action` returns on process 0 (None or an integer ≥ 0), on all. It is not run on the others, which raise
    CheckpointError where it raises on process 0."""
    if jax.process_count() == 1:
        return action()

    nothing, failed = -1, -2
    result: int = failed
    try:
        if is_main():
            found = action()
            result = nothing if found is None else found
    finally:
        agreed = int(multihost_utils.broadcast_one_to_all(np.int64(result)))

    if agreed == failed:
        raise CheckpointError("process 0 cannot go on; its own message says why")
    return None if agreed == nothing else agreed


def check_same(what: str, text: str, remedy: str) -> None:
    """Raises InputError unless `text` is the same on all processes: they would train different models in silence."""
    if jax.process_count() == 1:
        return

    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    of_all = np.asarray(multihost_utils.process_allgather(digest))
    others = [i for i, other in enumerate(of_all) if not np.array_equal(other, of_all[0])]
    if others:
        names = ", ".join(map(str, others))
        raise InputError(f"processes: {what} of process {names} are not those of process 0; {remedy}")


# --- the others' lives -----------------------------------------------------------------------------------------------


def _sign(text: str) -> None:
    """The last sign of this process. It no longer looks at the others', which may end before it has."""
    _LEAVING.set()
    with contextlib.suppress(Exception):  # without process 0 there is nobody to tell
        _table().key_value_set(f"insula/alive/{jax.process_index()}", text, allow_overwrite=True)


def _leave_failed() -> None:
    """Tell the others, and go: JAX would wait for them, for minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    _sign(FAILED)
    if is_main():
        time.sleep(2 * BEAT)  # the table of signs goes with us
    os._exit(1)


def _table() -> Any:
    """The coordinator's table of texts."""
    from jax._src import distributed  # not public; Orbax uses it for the same

    return distributed.global_state.client


def _watch() -> None:
    """Show signs of life, and look for those of the others. The main thread may wait for a dead one inside a program of
    its device, which nothing can interrupt: so the end is abrupt."""
    me, count = jax.process_index(), jax.process_count()
    heard = Heard(count, time.monotonic())
    for beat in itertools.count():
        if _LEAVING.wait(BEAT):
            return
        # Where process 0 is gone, and its table with it, JAX ends this process before we could.
        with contextlib.suppress(Exception):
            _table().key_value_set(f"insula/alive/{me}", str(beat), allow_overwrite=True)
            signs = {int(key.rpartition("/")[2]): sign for key, sign in _table().key_value_dir_get("insula/alive")}
            if (lost := heard.lost(signs, time.monotonic())) and not _LEAVING.is_set():
                names = ", ".join(map(str, lost))
                _end(f"process {names} of {count} is gone (it failed, or gave no sign of life for {LOST:.0f} s)")


class Heard:
    """When each process was last heard of, in this process's own seconds."""

    def __init__(self, count: int, now: float) -> None:
        self.last = {i: ("", now) for i in range(count)}

    def lost(self, signs: dict[int, str], now: float) -> list[int]:
        """The processes that have failed, or whose sign has not changed for too long."""
        for i, sign in signs.items():
            if sign != self.last[i][0]:
                self.last[i] = (sign, now)

        return [i for i, (sign, since) in self.last.items() if sign == FAILED or (sign != GONE and now - since > LOST)]


def _end(what: str) -> None:
    remedy = "go on from the newest checkpoint with --resume, on as many processes and devices as there are"
    print(f"insula: {what}; {remedy}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)
