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
    leave_out: tuple[str, ...] = ()
    """Columns and cameras that are not to be written, such as damaged ones that nobody needs."""
    drop_episodes: tuple[int, ...] = ()
    """Episodes that are not to be written, by the numbers the doctor gives."""


def run_data_convert(config: DataConvertConfig) -> None:
    """Write it, and say what it holds. Raises DatasetError."""
    done = convert_dataset(
        config.source,
        config.destination,
        overwrite=config.overwrite,
        tasks_from=config.tasks_from,
        leave_out=config.leave_out,
        drop_episodes=config.drop_episodes,
    )

    # Opened again, so that these are figures of what was written.
    print(f"{len(done.episodes)} episodes, {len(done)} frames, {done.info.codebase_version}: {config.destination}")


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Find everything that is wrong with a data set. Exit code 0: sound, perhaps with notes; 1: faults were found."""

    path: tyro.conf.Positional[Path]
    """A LeRobot data set (v2.1 or v3.0)."""
    json: bool = False
    """Print faults and notes as JSON."""
    quick: bool = False
    """Decode three pictures of each episode and camera rather than all."""


def run_doctor(config: DoctorConfig) -> int:
    """Print what was found, faults before notes, and return the exit code."""
    # Every frame unless asked otherwise: three pictures of an episode miss most of what can be damaged.
    found = examine(config.path, every_frame=not config.quick)
    faults = [finding for finding in found if not finding.is_note]

    # JSON alone, also where nothing was found: a script parses all of what is printed.
    if config.json:
        print(dumps([finding.to_json() for finding in found], indent=1))
        return 1 if faults else 0

    for finding in found:
        print(finding)

    if not faults:
        # Notes leave the exit code alone, so that scripts can ask whether a data set may be trained on.
        notes = f", with {len(found)} note{'s' if len(found) > 1 else ''}" if found else ""
        print(f"{config.path}: sound{notes}")

    return 1 if faults else 0
