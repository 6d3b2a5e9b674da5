"""The loop: batches in, updates out, everything measured on the way. It knows nothing of models or data."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from insula.errors import NonFiniteError
from insula.train.step import TrainState

MetricRow = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Every:
    """Do `action(state)` after each `steps`-th update. Metrics it returns are written to the log."""

    steps: int
    action: Callable[[TrainState], MetricRow | None]


class MetricsLog:
    """One JSON object per line and step. TensorBoard as well where a writer is given."""

    def __init__(self, path: Path, tensorboard: Any = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")  # a resumed run writes on; some steps may be there twice
        self._tensorboard = tensorboard

    def write(self, step: int, metrics: MetricRow) -> None:
        """Add a line. Raises NonFiniteError naming metric and step, after writing it: the log's last line tells why a
        run ended."""
        self._file.write(json.dumps({"step": step, **{k: _short(v) for k, v in metrics.items()}}) + "\n")
        self._file.flush()  # a killed process loses no line, and `tail -f` shows each

        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} is {value} at step {step}; the newest checkpoint is from before. Resume from it "
                    "with lower rates (--optimizer.backbone-lr, ...) or a smaller --optimizer.clip-norm"
                )

    def close(self) -> None:
        """Close the file, and the writer of TensorBoard where there is one."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _short(value: float) -> float | str:
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)  # JSON has no NaN; a reader may refuse it


def run_loop(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Any],
    steps: int,
    log: MetricsLog,
    log_every: int = 20,
    hooks: tuple[Every, ...] = (),
    quiet: bool = False,
) -> tuple[TrainState, bool]:
    """Update until `state.step == steps`. Returns the state, and whether all steps were made: Ctrl-C, SIGTERM and
    SIGHUP end the loop after the running update, a second Ctrl-C at once.

    Metrics are averaged every `log_every` updates and before a hook. Each update's are checked: raises NonFiniteError.
    For the main thread only, where Python can set signal handlers.
    """
    done = int(state.step)
    # Still on the device. Fetching waits for the update, so fetching each would leave nothing queued behind it.
    pending: list[dict[str, jax.Array]] = []
    waited, since = 0.0, time.perf_counter()  # seconds
    with _interrupts() as interrupted, _progress(quiet) as bar:
        task = bar.add_task("training", total=steps, completed=done, figures="")

        def report() -> None:
            nonlocal pending, waited, since
            if pending:
                rows = jax.device_get(pending)
                _refuse_non_finite(log, done - len(rows), rows)
                averages = {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}
                seconds = (time.perf_counter() - since) / len(rows)
                log.write(done, averages | {"step_seconds": seconds, "data_wait_seconds": waited / len(rows)})

                figures = " ".join(f"{k} {averages[k]:.3f}" for k in ("total", "flow", "fast") if k in averages)
                bar.update(task, figures=f"{figures} {seconds * 1e3:.0f} ms/step")
            pending, waited, since = [], 0.0, time.perf_counter()

        while done < steps and not interrupted():
            before = time.perf_counter()
            try:
                batch = next(batches)
            except Exception:
                if interrupted():  # a signal for all our processes ends those that make batches, too
                    break
                raise
            waited += time.perf_counter() - before
            state, metrics = step(state, batch)
            pending.append(metrics)
            done += 1
            bar.update(task, completed=done)

            due = [hook for hook in hooks if done % hook.steps == 0 or done == steps]
            if due or done % log_every == 0:  # no hook, such as a checkpoint, gets a state nobody has looked at
                report()
            for hook in due:
                if found := hook.action(state):
                    log.write(done, found)
                since = time.perf_counter()  # a checkpoint is no part of an update's time

        report()  # the caller saves what it gets
        return state, done >= steps


def _refuse_non_finite(log: MetricsLog, start: int, rows: list[dict[str, Any]]) -> None:
    # Update by update: the mean of them would be NaN as well, but would not say at which one it began.
    for i, row in enumerate(rows):
        if not all(math.isfinite(float(value)) for value in row.values()):
            log.write(start + i + 1, {name: float(value) for name, value in row.items()})


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on the terminal, which may vanish while we train: that must not cost the state."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=quiet,
    )
    with contextlib.suppress(OSError):
        bar.start()
    try:
        yield bar
    finally:
        with contextlib.suppress(OSError):
            bar.stop()


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and SIGHUP set a flag instead of tearing through a half-made update: the old state is donated to
    it, so an exception then would leave none to save.

    Only a person's second Ctrl-C ends at once: schedulers and terminals send several signals for one ending.
    """
    seen: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.add(number)  # no more: a handler runs between any two instructions, with locks held

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the terminal may go
        numbers.append(signal.SIGHUP)

    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
