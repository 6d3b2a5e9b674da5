"""What `insula data describe`, `stats` and `fit-fast` do: from a data set to what a training run takes."""

import dataclasses
import os
from pathlib import Path

import tyro

from insula.checks import check_integer, check_number
from insula.data.command import fit_fast, stats
from insula.data.config import DataConfig
from insula.data.describe import describe
from insula.files import check_output_file, check_output_folder
from insula.model.config import preset

CHUNKS = 200_000
PROCESSES = min(2, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class DescribeConfig:
    """Print a mapping for a data set, to be corrected and given to insula train --data."""

    path: tyro.conf.Positional[Path]
    """A LeRobot data set (v2.1 or v3.0)."""
    preset: str = "tiny"
    """Whose cameras to find."""


def run_describe(config: DescribeConfig) -> None:
    """Print it. Raises DatasetError, InputError."""
    print(describe(config.path, preset(config.preset).cameras), end="")


@dataclasses.dataclass(frozen=True)
class StatsConfig:
    """Statistics of state and actions over all episodes, quantiles exact."""

    path: tyro.conf.Positional[Path]
    """A LeRobot data set, or a .toml mapping."""
    out: Path | None = None
    """Write norm_stats.json: a .json file, or a folder for a mapping of several robots."""
    preset: str = "tiny"
    """Whose chunks the statistics of relative actions are made of."""
    horizon: int | None = None
    """Steps of a chunk, as --model.horizon will be in training; the preset's unless given."""
    chunks: int = CHUNKS
    """Spread evenly over all episodes, to count clipped values in."""
    processes: int = PROCESSES
    """To share the data files between."""

    def __post_init__(self) -> None:
        _check(self)


def run_stats(config: StatsConfig) -> None:
    """Print tables, and write what was asked for. Raises DatasetError, InputError, FileError."""
    if config.out is not None and config.out.suffix:
        check_output_file(config.out, (".json",), "out")
    elif config.out is not None:
        check_output_folder(config.out, "out")
    horizon = config.horizon or preset(config.preset).horizon
    print(stats(config.path, horizon, config.out, config.chunks, config.processes))


@dataclasses.dataclass(frozen=True)
class FitFastConfig:
    """Fit a FAST tokenizer on chunks of all episodes, for insula train --fast, with a report."""

    path: tyro.conf.Positional[Path]
    """A LeRobot data set, or a .toml mapping."""
    out: Path
    """Folder for the tokenizer and report.json."""
    vocab: int = DataConfig.fast_vocab
    """Entries."""
    scale: float = DataConfig.fast_scale
    """Of the DCT coefficients before rounding: larger is finer and longer."""
    preset: str = "tiny"
    """Whose horizon and token budget count."""
    horizon: int | None = None
    """Steps of a chunk, as --model.horizon will be in training; the preset's unless given."""
    chunks: int = CHUNKS
    """Spread evenly over all episodes of each robot."""
    processes: int = PROCESSES
    """To share the work between."""

    def __post_init__(self) -> None:
        _check(self)
        check_integer("vocab", self.vocab, 256)
        check_number("scale", self.scale, "> 0 and < 1e6", lambda scale: 0 < scale < 1e6)


def run_fit_fast(config: FitFastConfig) -> None:
    """Fit, write, and print a table. Raises DatasetError, InputError, FileError."""
    check_output_folder(config.out, "out")
    model = preset(config.preset)
    horizon, budget = config.horizon or model.horizon, model.max_fast_len
    print(
        fit_fast(config.path, horizon, budget, config.out, config.vocab, config.scale, config.chunks, config.processes)
    )


def _check(config: StatsConfig | FitFastConfig) -> None:
    check_integer("chunks", config.chunks, 1)
    check_integer("processes", config.processes, 1)
    if config.horizon is not None:
        check_integer("horizon", config.horizon, 1)
