"""The loop: batches in, updates out, everything measured on the way. It knows nothing of models or data."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from insula.checkpoints.snapshot import snapshot
from insula.errors import NonFiniteError, brief
from insula.train.profile import Profile
from insula.train.sinks import Sink
from insula.train.step import TrainState

log = logging.getLogger(__name__)
MetricRow = dict[str, float]
Rates = Callable[[float], MetricRow]
MOST_SKIPPED = 3
"""Updates in a row. One bad sample is passed over; a training that has run away does not come back."""
REMEDY = (
    "resume from the newest checkpoint with lower rates (--optimizer.backbone-lr, ...) or a smaller "
    "--optimizer.clip-norm"
)


@dataclasses.dataclass(frozen=True)
class Every:
    """Do `action(state)` after each `steps`-th update. Metrics it returns are written to the log. The state is donated
    to the next update, unless it is `kept`: then the action gets a copy, and may read it for as long as it likes."""

    steps: int
    action: Callable[[TrainState], MetricRow | None]
    kept: bool = False


class MetricsLog:
    """One JSON object per line and step, and the same to each of `sinks`, by name. One that fails is told of once, and
    left out from there on: the file has everything, and no training ends since a network is gone. Without a path
    nothing is written: one of several processes does."""

    def __init__(self, path: Path | None, sinks: Mapping[str, Sink] | None = None):
        path = Path(os.devnull) if path is None else path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")  # a resumed run writes on; some steps may be there twice
        self._sinks = dict(sinks or {})

    def write(self, step: int, metrics: MetricRow) -> None:
        """Add a line. Raises NonFiniteError naming metric and step, after writing it: the log's last line tells why a
        run ended."""
        self.note(step, metrics)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"{name} is {value} at step {step}; {REMEDY}")

    def note(self, step: int, metrics: MetricRow) -> None:
        """Add a line, whatever is in it."""
        self._file.write(json.dumps({"step": step, **{k: _short(v) for k, v in metrics.items()}}) + "\n")
        self._file.flush()  # a killed process loses no line, and `tail -f` shows each

        for name, sink in list(self._sinks.items()):
            with self._without(name):
                sink.write(step, metrics)

    def close(self, failed: bool = False) -> None:
        """Close the file and the sinks, which are told whether an exception ends the run."""
        self._file.close()
        for name, sink in list(self._sinks.items()):
            with self._without(name):
                sink.close(failed)

    @contextlib.contextmanager
    def _without(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: they are others' code, and talk to disks and networks
            del self._sinks[name]
            log.warning("%s takes no more metrics (%s); metrics.jsonl still has all of them", name, brief(error))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None)


def _short(value: float) -> float | str:
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)  # JSON has no NaN; a reader may refuse it


def run_loop(
    state: TrainState,
    update: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[Any],
    steps: int,
    metrics_log: MetricsLog,
    log_every: int = 20,
    hooks: tuple[Every, ...] = (),
    quiet: bool = False,
    on_skipped: Callable[[int], None] = lambda step: None,
    *,
    rates: Rates = lambda seconds: {},
    profile: Profile | None = None,
) -> tuple[TrainState, bool]:
    """Update until `state.step == steps`. Returns the state, and whether all steps were made: Ctrl-C, SIGTERM and
    SIGHUP end the loop after the running update, a second Ctrl-C at once.

    Metrics are averaged every `log_every` updates and before a hook. An update whose metrics are not all finite has
    left the state as it was (`make_train_step`): its metrics are a line of their own, `on_skipped` is told, and more
    than `MOST_SKIPPED` in a row raise NonFiniteError. `rates(seconds)`: more metrics, of how long an update took. For
    the main thread only, where Python can set signal handlers.
    """
    done = int(state.step)
    meter = _Meter(metrics_log, Skipped(metrics_log, on_skipped), rates)
    profile = profile or Profile(Path())
    with _interrupts() as interrupted, _progress(quiet) as bar, profile:
        task = bar.add_task("training", total=steps, completed=done, figures="")
        while done < steps and not interrupted(done):
            before = time.perf_counter()
            try:
                batch = next(batches)
            except Exception:
                if interrupted(done):  # a signal for all our processes ends those that make batches, too
                    break
                raise
            waited = time.perf_counter() - before

            profile.before(done + 1, state)
            with jax.profiler.StepTraceAnnotation("update", step_num=done + 1):  # a trace is read by its steps
                state, metrics = update(state, batch)
            meter.add(metrics, waited)
            done += 1
            profile.after(done, state)
            bar.update(task, completed=done)

            due = [hook for hook in hooks if done % hook.steps == 0 or done == steps]
            # Asked for while the update still runs: to name hundreds of arrays takes a while, which nobody waits for.
            kept = snapshot(state) if any(hook.kept for hook in due) else state
            if due or done % log_every == 0:  # no hook, such as a checkpoint, gets a state nobody has looked at
                bar.update(task, figures=meter.report(done))
            for hook in due:
                if found := hook.action(kept if hook.kept else state):
                    metrics_log.write(done, found)
                meter.restart()  # a checkpoint is no part of an update's time

        meter.report(done)  # the caller saves what it gets
        return state, done >= steps


class _Meter:
    """Metrics since the last report, and how long their updates took."""

    def __init__(self, metrics_log: MetricsLog, skipped: "Skipped", rates: Rates):
        self._log = metrics_log
        self._skipped = skipped
        self._rates = rates
        # Still on the device. Fetching waits for the update, so fetching each would leave nothing queued behind it.
        self._pending: list[dict[str, jax.Array]] = []
        self._figures = ""
        self.restart()

    def restart(self) -> None:
        """What was before counts no more."""
        self._waited = 0.0  # seconds
        self._since = time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], waited: float) -> None:
        """Of an update, for whose batch the loop waited so many seconds."""
        self._pending.append(metrics)
        self._waited += waited

    def report(self, done: int) -> str:
        """Write the means of all that is pending, after so many steps. Returns them for the bar; those of the last time
        where nothing is pending. Raises NonFiniteError as `run_loop`."""
        if self._pending:
            rows = jax.device_get(self._pending)
            seconds = (time.perf_counter() - self._since) / len(rows)
            averages = means(self._skipped.leave_out(done - len(rows), rows))
            averages |= {"step_seconds": seconds, "data_wait_seconds": self._waited / len(rows)} | self._rates(seconds)
            self._log.write(done, averages)
            self._figures = _figures(averages)
            self._pending = []

        self.restart()
        return self._figures


def means(rows: list[dict[str, Any]]) -> MetricRow:
    """Of each metric over updates; none where there are no updates."""
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in (rows[0] if rows else ())}


def _figures(averages: MetricRow) -> str:
    """Of the bar: losses, and how fast it goes."""
    shown = [f"{name} {averages[name]:.3f}" for name in ("total", "flow", "fast") if name in averages]
    shown.append(f"{averages['step_seconds'] * 1e3:.0f} ms/step")
    if "samples_per_second" in averages:
        shown.append(f"{averages['samples_per_second']:.3g} samples/s")
    if "mfu" in averages:
        shown.append(f"MFU {averages['mfu']:.1%}")
    return " ".join(shown)


class Skipped:
    """The updates that were none, and how many of them in a row."""

    def __init__(self, metrics: MetricsLog, tell: Callable[[int], None]) -> None:
        self.metrics = metrics
        self.tell = tell
        self.in_a_row = 0

    def leave_out(self, start: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the others, of updates from `start` on. Raises NonFiniteError after too many in a row."""
        finite = []
        for step, row in enumerate(rows, start + 1):
            bad = [name for name, value in row.items() if not math.isfinite(float(value))]
            if not bad:
                self.in_a_row = 0
                finite.append(row)
                continue

            self.in_a_row += 1
            self.metrics.note(step, {name: float(value) for name, value in row.items()})
            self.tell(step)
            found = f"{bad[0]} is {float(row[bad[0]])} at step {step}"
            if self.in_a_row > MOST_SKIPPED:
                raise NonFiniteError(f"{found}, the update was skipped as the {MOST_SKIPPED} before it; {REMEDY}")
            log.warning("%s; the update was skipped", found)

        return finite


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
def _interrupts() -> Iterator[Callable[[int], bool]]:
    """Ctrl-C, SIGTERM and SIGHUP set a flag instead of tearing through a half-made update: the old state is donated to
    it, so an exception then would leave none to save. What is yielded says whether to end before the update after so
    many.

    Only a person's second Ctrl-C ends at once: schedulers and terminals send several signals for one ending.
    """
    seen: set[int] = set()
    several = jax.process_count() > 1

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.add(number)  # no more: a handler runs between any two instructions, with locks held
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    # Several processes must end before the same update, whichever of them is told to. JAX's coordinator agrees on one:
    # it listens for SIGTERM, and is told of the others as of one.
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: the terminal may go
        numbers.append(signal.SIGHUP)

    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda done: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
