"""Going on with a run: its own settings, and those that may change on the way.

applied    steps, data that moved, how often something is done, who makes batches, the devices, the optimizer, what is
           done about a bad sample
refused    all else: the samples, their order, the model or the objective would become others halfway
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from insula.errors import CheckpointError, InputError
from insula.runs.folder import CHECKPOINTS_FOLDER, SETTINGS_FILE
from insula.train.config import TrainConfig, read_config
from insula.train.optimizer import PARTS, make_schedule

log = logging.getLogger(__name__)
Changes = dict[str, tuple[Any, Any]]
"""By dotted name: the value before, and after."""

MAY_CHANGE = frozenset(
    {
        "steps",
        "data",
        "workers",
        "accumulate",
        "evaluate_every",
        "checkpoint_every",
        "log_every",
        "keep",
        "keep_every",
        "certify",
        "log_to",
        "profile_steps",
        "reading.on_overflow",
        "reading.on_bad_sample",
        *(f"mesh.{field.name}" for field in dataclasses.fields(TrainConfig.mesh)),
        *(f"optimizer.{field.name}" for field in dataclasses.fields(TrainConfig.optimizer)),
    }
)


def stored_settings(run: Path) -> TrainConfig:
    """The settings a run was started with, as those of its resumption. Raises CheckpointError where there are none, or
    no checkpoint to go on from."""
    path = run / SETTINGS_FILE

    # Two different things: a folder that is no run, and a run that was ended before its first checkpoint.
    if not path.is_file():
        raise CheckpointError(f"{run}: nothing to resume, {path.name} is not there; start without --resume")
    if newest_step(run) is None:
        raise CheckpointError(f"{run}: nothing to resume, no checkpoint yet; start without --resume")

    # Where the run is now, not where it was started: folders move.
    return dataclasses.replace(read_config(path), run=run, resume=True)


def newest_step(run: Path) -> int | None:
    """The newest checkpoint of a run, None where there is none."""
    folder = run / CHECKPOINTS_FOLDER
    if not folder.is_dir():
        return None

    # By name, without a store: Orbax would look for devices, before this process could have joined others.
    steps = (int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())
    return max(steps, default=None)


def resumed_settings(asked: TrainConfig, base: TrainConfig | None = None) -> tuple[TrainConfig, TrainConfig]:
    """The stored settings, and these with what was asked for.

    `base` is what `asked` was made from: where the two differ, something was asked for. It is `TrainConfig(run)` unless
    given; a command line gives the stored settings, so that every flag counts. Raises InputError for what must not
    change, CheckpointError where there is nothing to resume.
    """
    stored = stored_settings(asked.run)

    # What was not asked for stays as it is stored, whatever the defaults are by now.
    settings = merge_settings(stored, asked, TrainConfig(run=asked.run) if base is None else base)
    settings = dataclasses.replace(settings, run=asked.run, resume=True)

    changes = differences(stored, settings)
    refused = {name: values for name, values in changes.items() if name not in MAY_CHANGE}
    if refused:
        told = "; ".join(
            f"{flag(name)}: stored {_shown(old)}, got {_shown(new)}" for name, (old, new) in refused.items()
        )
        # All or nothing: whoever sees half of the flags applied would take the rest for applied, too.
        rest = ", ".join(f"{flag(name)} {_shown(new)}" for name, (_, new) in changes.items() if name not in refused)
        may = f" (what may change is {rest})" if rest else ""
        raise InputError(f"{asked.run}: cannot change while the run goes on; drop it, or start a new run: {told}{may}")

    # An average can be dropped on the way. One that was never made cannot be read.
    decay = settings.optimizer.ema_decay
    if stored.optimizer.ema_decay is None and decay is not None:
        raise InputError(
            f"{asked.run}: --optimizer.ema-decay: stored None, got {decay}; this run has no average to go on with; "
            "drop it, or start a new run"
        )
    return stored, settings


def merge_settings(stored: Any, asked: Any, base: Any) -> Any:
    """The dataclass `stored`, with the fields in which `asked` differs from `base`; nested ones field by field."""
    changes = {}
    for field in dataclasses.fields(stored):
        values = [getattr(settings, field.name) for settings in (stored, asked, base)]
        if all(dataclasses.is_dataclass(value) for value in values):
            changes[field.name] = merge_settings(*values)
        elif values[1] != values[2]:
            changes[field.name] = values[1]

    return dataclasses.replace(stored, **changes)


def differences(before: Any, after: Any, prefix: str = "") -> Changes:
    """What changes from one dataclass to another of its kind, by dotted name."""
    found: Changes = {}
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
            found |= differences(old, new, f"{prefix}{field.name}.")
        elif old != new:
            found[prefix + field.name] = (old, new)

    return found


def flag(name: str) -> str:
    """How the command line calls a field."""
    return "--" + name.removeprefix("reading.").replace("_", "-")


def tell_changes(before: TrainConfig, after: TrainConfig, step: int) -> None:
    """One line for what is applied from `step` on, and one for what it does to the learning rates."""
    changes = differences(before, after)
    if not changes:
        return

    told = ", ".join(f"{flag(name)} {_shown(new)} (was {_shown(old)})" for name, (old, new) in changes.items())
    log.warning("%s goes on at step %d with %s", after.run, step, told)

    # The schedule is a function of the step and of all steps, so more of them move the rate of this very step.
    rates = []
    for part in PARTS:
        old, new = (
            float(make_schedule(c.optimizer, getattr(c.optimizer, f"{part}_lr"), c.steps)(step))
            for c in (before, after)
        )
        if old != new:
            rates.append(f"{part} {old:.2g} → {new:.2g}")

    if rates:
        log.warning(
            "the learning rates follow the schedule of %d steps from here on: %s", after.steps, ", ".join(rates)
        )


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else repr(value)
