"""One process of a training: python one_of_several.py SETTINGS COORDINATOR COUNT INDEX [MORE …], where MORE is
"resume", "signal:NUMBER:STEP", "settings:OTHER" or "fail:WHY"."""

import dataclasses
import logging
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from insula.checkpoints.seal import SEAL_FILE
from insula.cli import execute
from insula.errors import DatasetError
from insula.parallel.processes import ProcessesConfig
from insula.train import command
from insula.train import run as training
from insula.train.config import TrainConfig, read_config
from insula.train.loop import Every
from insula.train.step import TrainState


def signal_after(run: Path, step: int, number: int) -> None:
    """This signal to oneself, once so many steps are made; a kill waits for a checkpoint, to have something to lose."""
    real = training.run_loop

    def send(state: TrainState) -> None:
        if int(state.step) != step:
            return
        while number == signal.SIGKILL and not any(run.glob(f"checkpoints/*/{SEAL_FILE}")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    def signaled(*args: object, **named: object) -> object:
        place = next(i for i, one in enumerate(args) if isinstance(one, tuple))
        hooks = (*args[place], Every(step, send))
        return real(*args[:place], hooks, *args[place + 1 :], **named)

    training.run_loop = signaled


def fail(text: str, *_: object) -> None:
    raise DatasetError(text)


if __name__ == "__main__":
    path, coordinator, count, index, *more = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING, format="insula: %(message)s")
    other = [Path(one.removeprefix("settings:")) for one in more if one.startswith("settings:")]
    found = read_config(other[0] if other else Path(path))
    processes = ProcessesConfig(False, coordinator, int(count), int(index))
    config: TrainConfig = dataclasses.replace(found, processes=processes, resume="resume" in more)
    for one in more:
        if one.startswith("signal:"):
            signal_after(config.run, int(one.split(":")[2]), int(one.split(":")[1]))
        if one.startswith("fail:"):
            training.open_data = partial(fail, one.removeprefix("fail:"))

    # As `insula train` with these settings: its errors, its exit codes.
    command.train_defaults = lambda preset, arguments: config  # type: ignore[assignment]
    sys.exit(execute(["train"]))
