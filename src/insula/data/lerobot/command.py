"""What `insula data convert` and `insula data doctor` do."""

import dataclasses
from json import dumps
from pathlib import Path

import tyro

from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.lerobot.reader import TasksFrom


@dataclasses.dataclass(frozen=True)
class DataConvertConfig:
    """Write a data set (v2.1 or v3.0) again as v3.0: the same rows and pictures, true global statistics."""

    source: tyro.conf.Positional[Path]
    """A LeRobot data set."""
    destination: tyro.conf.Positional[Path]
    """A new folder."""
    overwrite: bool = False
    """Replace what is there."""
    tasks_from: TasksFrom | None = None
    """Whom to believe where the rows mean another task than the episode table says."""


def run_data_convert(config: DataConvertConfig) -> None:
    """Write it, and say what it holds. Raises DatasetError."""
    done = convert_dataset(config.source, config.destination, overwrite=config.overwrite, tasks_from=config.tasks_from)
    print(f"{len(done.episodes)} episodes, {len(done)} frames, {done.info.codebase_version}: {config.destination}")


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Find everything that is wrong with a data set. Exit code 0: sound; 1: faults were found."""

    path: tyro.conf.Positional[Path]
    """A LeRobot data set (v2.1 or v3.0)."""
    json: bool = False
    """Print the faults as JSON."""
    quick: bool = False
    """Decode three pictures of each episode and camera rather than all."""


def run_doctor(config: DoctorConfig) -> int:
    """Print what was found, and return the exit code."""
    found = examine(config.path, every_frame=not config.quick)
    if config.json:
        print(dumps([finding.to_json() for finding in found], indent=1))
    else:
        print("\n".join(map(str, found)) if found else f"{config.path}: sound")
    return 1 if found else 0
