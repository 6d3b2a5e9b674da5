"""What `insula data stats` and `insula data fit-fast` do."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from insula.data import normalize as normalize
from insula.data.chunks import chunk_horizon, dim_names
from insula.data.fitting import FASTReport, action_chunks, measure_fast, robot_stats
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import read_mapping
from insula.data.normalize import NormStats
from insula.data.robot import Robot
from insula.files import write_json
from insula.terminal import as_text
from insula.tokens.fast import FASTCodec

REPORT_FILE = "report.json"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One robot data set: its statistics, how its dimensions are called, its chunks, how many values were clipped."""

    robot: Robot
    names: dict[str, list[str]]
    chunks: np.ndarray
    clipped: float


def measure(path: Path, horizon: int, limit: int, processes: int) -> dict[str, Measured]:
    """Every robot of a mapping, or of a plain folder; at most `limit` chunks of each, spread evenly."""
    found = {}
    for name, data in read_mapping(path).robots.items():
        # As training fits them, with the horizon too: relative actions spread wider the longer a chunk is.
        steps = chunk_horizon(data, name, horizon)
        stats = robot_stats(data, steps, processes=processes)
        robot = Robot(stats, tuple(data.cameras), steps, data.delta, data.units)
        dataset = LeRobotDataset(data.path, cache_bytes=0)
        names = {"state": dim_names(dataset, data.state), "actions": dim_names(dataset, data.actions)}
        # With this robot's own statistics: FAST sees what is normalized and clipped.
        chunks, clipped = action_chunks(data, robot, limit=limit, processes=processes)
        found[name] = Measured(robot, names, chunks, clipped)

    return found


def stats(path: Path, horizon: int, out: Path | None, limit: int, processes: int) -> str:
    """Write norm_stats.json of each robot below `out`, and return tables."""
    found = measure(path, horizon, limit, processes)
    for name, measured in found.items():
        # A file's name is taken at its word where there is one robot; several need a folder.
        if out is not None:
            target = out if out.suffix == ".json" and len(found) == 1 else out / f"{name}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            normalize.save_stats(target, measured.robot.stats)

    return "\n".join(_tables(name, measured) for name, measured in found.items())


def fit_fast(
    path: Path,
    horizon: int,
    budget: int,
    out: Path,
    vocab_size: int,
    scale: float,
    limit: int,
    processes: int,
) -> str:
    """Fit a codec on the chunks of all robots, write it and its report to `out`, and return a table."""
    found = measure(path, horizon, limit, processes)

    # One codec for all robots, as the model has one vocabulary; the report is of each, for one may fit badly.
    codec = FASTCodec.fit([chunk for measured in found.values() for chunk in measured.chunks], vocab_size, scale)
    codec.save(out)
    reports = {
        name: measure_fast(codec, measured.chunks, budget, measured.clipped, processes)
        for name, measured in found.items()
    }

    # Beside the codec: its errors and lengths hold for these data alone.
    written = {name: report.to_json() for name, report in reports.items()}
    write_json(out / REPORT_FILE, written)

    return _fast_table(reports)


def _tables(name: str, measured: Measured) -> str:
    tables = []
    for what, stats in measured.robot.stats.items():
        table = Table("", "min", "q01", "mean", "q99", "max", "std", "", title=f"{name}: {what}", title_justify="left")
        for dim, label in enumerate(measured.names[what]):
            columns = (stats.min, stats.q01, stats.mean, stats.q99, stats.max, stats.std)
            # A file that a mapping names may lack quantiles or extremes.
            figures = ["" if column is None else f"{column[dim]:.4g}" for column in columns]
            table.add_row(label, *figures, _note(stats, dim))

        tables.append(table)

    return as_text(
        *tables, f"{measured.clipped:.3%} of the normalized action values are beyond ±{measured.robot.clip:g}"
    )


def _note(stats: NormStats, dim: int) -> str:
    if stats.constant[dim]:
        return "constant: always 0"

    return "rarely moves: scaled by min and max" if stats.rarely_moves[dim] else ""


def _fast_table(reports: dict[str, FASTReport]) -> str:
    table = Table("", *reports, title="FAST", title_justify="left")

    # The budget includes "|" and EOS, which the tokens above do not count.
    rows: dict[str, Any] = {
        "chunks": lambda r: str(r.chunks),
        "tokens of a chunk: p50": lambda r: f"{r.tokens['p50']:.0f}",
        "p99": lambda r: f"{r.tokens['p99']:.0f}",
        "largest": lambda r: f"{r.tokens['max']:.0f}",
        'chunks that with "|" and EOS exceed the budget': lambda r: f"{r.over_budget} ({r.budget} tokens)",
        "not writable by the codec": lambda r: str(r.out_of_range),
        "reconstruction error, rms, normalized": lambda r: f"{r.reconstruction_error:.4f}",
        "values clipped": lambda r: f"{r.clipped:.3%}",
    }
    for label, figure in rows.items():
        table.add_row(label, *(figure(report) for report in reports.values()))

    return as_text(table)
