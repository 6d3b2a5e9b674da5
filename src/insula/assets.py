"""What travels inside every checkpoint besides the weights: enough to serve from the checkpoint alone.

config.json        the model's config and the version that wrote it
norm_stats.json    normalisation, openpi's format
tokenizer/         text tokenizer, FAST codec, dialect
"""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

from insula.data import normalise
from insula.data.normalise import NormStats
from insula.model.config import Config, config_from_dict
from insula.tokens.sequence import FASTTokenizer

CONFIG_FILE, STATS_FILE, TOKENIZER_FOLDER = "config.json", "norm_stats.json", "tokenizer"


@dataclasses.dataclass(frozen=True)
class Assets:
    """`stats` holds "state" and "actions"; the tokenizer holds its dialect."""

    config: Config
    tokenizer: FASTTokenizer
    stats: dict[str, NormStats]

    def write(self, directory: Path) -> None:
        write_config(directory, self.config)
        normalise.save(directory / STATS_FILE, self.stats)
        self.tokenizer.save(directory / TOKENIZER_FOLDER)


def write_config(directory: Path, config: Config) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    written = {"insula": version("insula"), "model": dataclasses.asdict(config)}
    (directory / CONFIG_FILE).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def read_assets(directory: Path) -> Assets:
    """Raises FileNotFoundError, or ValueError naming the file and what is wrong in it."""
    path = directory / CONFIG_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    return Assets(
        config=config_from_dict(written["model"], str(path)),
        tokenizer=FASTTokenizer.load(directory / TOKENIZER_FOLDER),
        stats=normalise.load(directory / STATS_FILE),
    )
