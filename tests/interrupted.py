"""A training that Ctrl-C ends."""

import signal

import pytest

from insula.checkpoints.store import CheckpointStore
from insula.train import run as training
from insula.train.config import TrainConfig
from insula.train.loop import Every


def train_and_interrupt(config: TrainConfig, after: int) -> None:
    """Train until step `after`, where the signal comes."""
    real = training.run_loop

    def interrupted(*args: object, **named: object) -> object:
        *head, hooks, quiet, tell = args
        return real(*head, (*hooks, Every(after, lambda _: signal.raise_signal(signal.SIGINT))), quiet, tell, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_loop", interrupted)
        assert not training.train(config, quiet=True)
    assert CheckpointStore(config.run / "checkpoints").latest() == after
