"""Where metrics go beside metrics.jsonl, which always has all of them.

Each kind is an extra, imported only when it is asked for. A run has one name with all of them, kept in its folder, so
that a resumed run goes on under it.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from insula.errors import FileError, InputError, brief
from insula.runs.folder import NAME_FILE, TENSORBOARD_FOLDER

SinkKind = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "insula"
"""Unless WANDB_PROJECT or TRACKIO_PROJECT says another."""


@runtime_checkable
class Sink(Protocol):
    """What takes metrics. It may raise anything: the log then goes on without it."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a row. A step may come twice: with other metrics, or again in a run that goes on from a checkpoint."""
        ...

    def close(self, failed: bool) -> None:
        """Hand over what is not written yet. `failed`: whether an exception ends the run."""
        ...


class TensorBoard:
    """Event files in RUN/tensorboard, which a resumed run adds one to."""

    def __init__(self, run: Path, name: str, settings: dict[str, Any]):
        from tensorboardX import SummaryWriter  # here, as below: an extra that few install

        self._writer = SummaryWriter(str(run / TENSORBOARD_FOLDER))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """As `Sink`."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """As `Sink`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in RUN/wandb, for `wandb sync`."""

    def __init__(self, run: Path, name: str, settings: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=name,
            resume="allow",
            dir=str(run),
            config=settings,
            settings=wandb.Settings(console="off"),  # it would take our progress bar for output
        )
        # Its own step never goes back, as ours does in a run that goes on from a checkpoint: rows would be dropped.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """As `Sink`."""
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        """As `Sink`."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in its own folder on this machine (`trackio show`) unless its variables name a server."""

    def __init__(self, run: Path, name: str, settings: dict[str, Any]):
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project, name=name, resume="allow", config=settings, embed=False)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """As `Sink`."""
        self._run.log(metrics, step=step)

    def close(self, failed: bool) -> None:
        """As `Sink`."""
        self._run.finish()


OPEN: dict[str, Callable[[Path, str, dict[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
"""By name, which is that of the extra as well: what opens one for a run's folder, its name and its settings."""
_HINTS = {"wandb": "; without a login, set WANDB_MODE=offline"}


def open_sinks(kinds: Iterable[str], run: Path, settings: dict[str, Any]) -> dict[str, Sink]:
    """Those that are asked for. Raises InputError for one that is not installed or cannot be opened; none stays open
    then."""
    found: dict[str, Sink] = {}
    try:
        for kind in kinds:
            found[kind] = _open(kind, run, settings)
    except BaseException:
        for sink in found.values():
            sink.close(failed=True)
        raise
    return found


def _open(kind: str, run: Path, settings: dict[str, Any]) -> Sink:
    try:
        return OPEN[kind](run, run_name(run), settings)
    except ImportError as error:
        raise InputError(
            f"log_to: {kind} is not installed ({brief(error)}); it is an extra: pip install 'insula[{kind}]'. "
            "A bare --log-to goes without"
        ) from error
    except FileError:
        raise
    except Exception as error:  # of any kind: these libraries have errors of their own, for the network and for logins
        raise InputError(f"log_to: {kind} cannot be opened: {brief(error)}{_HINTS.get(kind, '')}") from error


def run_name(run: Path) -> str:
    """What a run is called elsewhere: its folder's name as it was first asked for, and eight letters that tell it from
    others of that name. Kept in the folder. Raises FileError where that file holds something else."""
    path = run / NAME_FILE
    if path.exists():
        name = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[\w.-]{1,128}", name):
            raise FileError(
                f"{path}: got {name!r:.80}, expected a name of letters, digits, '.', '-' and '_'; remove it"
            )
        return name

    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", run.resolve().name)[:64]
    name = f"{readable}-{uuid.uuid4().hex[:8]}"
    path.write_text(f"{name}\n", encoding="utf-8")
    return name
