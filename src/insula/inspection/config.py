"""What `insula inspect` is asked for, as one frozen value."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from insula.checks import check_integer, check_seed
from insula.data.config import DataConfig
from insula.model.config import TINY, ModelConfig

INSPECTED = DataConfig(on_overflow="drop_token_loss")
"""A sample whose actions do not fit can still be looked at."""


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """See one sample as a model does: every token and mask, who may look at whom, what each loss scores, and, measured,
    where gradients go. Writes one offline page. Exit code 1 where insulation leaks or nothing is shown. On the command
    line --preset (tiny, tabletop, small, pi05, pi0) chooses the model where there is no run."""

    run: Path | None = None
    """A training run: its weights, and samples it was never trained on."""
    data: Path | None = None
    """Without a run: a LeRobot data set or a .toml mapping, seen by random weights."""
    sample: int = 0
    """Which one."""
    source: str | None = None
    """Of which source of the mapping, such as arm:actions; the first that has actions unless given."""
    training: bool = False
    """Look at samples the run was trained on."""
    seed: int = 0
    """Of noise and flow time."""
    out: Path | None = None
    """The page; inspect.html in the run, or here, unless given."""
    certificate: Path | None = None
    """Also write the gradients to this .json file."""
    serve: bool = False
    """Serve the page on this machine, with a picker for samples, instead of writing it."""
    port: int = 8400
    """Of --serve; 0 takes a free one."""
    tokens_only: bool = False
    """Show the sequence and the masks without running the model: for one too large for this machine."""
    model: ModelConfig = TINY
    """Without a run: the model; --preset NAME chooses which one these flags change."""
    reading: Annotated[DataConfig, tyro.conf.arg(name="")] = INSPECTED
    """Without a run: how the data is read, as in training; --preset NAME chooses the dialect."""

    def __post_init__(self) -> None:
        check_integer("sample", self.sample, 0)
        check_integer("port", self.port, 0, 65_535)
        check_seed("seed", self.seed)
