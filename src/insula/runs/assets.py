"""What travels inside every checkpoint besides the weights: enough to serve from the checkpoint alone.

config.json        the model's config and the version that wrote it
robots/NAME/       what its numbers mean: normalization (openpi's format), cameras, horizon
tokenizer/         text tokenizer, FAST codec, dialect
"""

import dataclasses
from importlib.metadata import version
from pathlib import Path

from insula.data.robot import Robot, read_robot
from insula.errors import InputError, MissingFileError, did_you_mean
from insula.files import read_json, write_json
from insula.model.config import ModelConfig, config_from_dict
from insula.runs.folder import MODEL_FILE, ROBOTS_FOLDER, TOKENIZER_FOLDER
from insula.tokens.sequence import FASTTokenizer


@dataclasses.dataclass(frozen=True)
class Assets:
    """The tokenizer holds its dialect; `robots` has at least one."""

    config: ModelConfig
    tokenizer: FASTTokenizer
    robots: dict[str, Robot]

    def robot(self, name: str | None = None) -> Robot:
        """The named one, or the only one. Raises InputError where it is not known or there are several."""
        if name is None and len(self.robots) > 1:
            raise InputError(f"this model knows several robots; choose one with robot=: {', '.join(self.robots)}")
        if name is not None and name not in self.robots:
            raise InputError(f"no robot {name!r}{did_you_mean(name, self.robots)}; known: {', '.join(self.robots)}")

        return self.robots[name or next(iter(self.robots))]

    def write(self, directory: Path) -> None:
        """All of it, as `read_assets` reads it."""
        write_config(directory, self.config)
        for name, robot in self.robots.items():
            robot.write(directory / ROBOTS_FOLDER / name)
        self.tokenizer.save(directory / TOKENIZER_FOLDER)


def write_config(directory: Path, config: ModelConfig) -> None:
    """The model's settings, and the version that wrote them."""
    directory.mkdir(parents=True, exist_ok=True)
    written = {"insula": version("insula"), "model": dataclasses.asdict(config)}
    write_json(directory / MODEL_FILE, written)


def read_assets(directory: Path) -> Assets:
    """Raises MissingFileError, or InputError naming the file and what is wrong in it."""
    path = directory / MODEL_FILE
    written = read_json(path, "model")

    # A robot's name is its folder's: nothing could contradict it.
    robots = sorted(path for path in (directory / ROBOTS_FOLDER).glob("*") if path.is_dir())
    if not robots:
        raise MissingFileError(f"{directory / ROBOTS_FOLDER}: no robot; a checkpoint holds what serves at least one")

    return Assets(
        config=config_from_dict(written["model"], str(path)),
        tokenizer=FASTTokenizer.load(directory / TOKENIZER_FOLDER),
        robots={path.name: read_robot(path) for path in robots},
    )
