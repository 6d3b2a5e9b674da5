"""The formats a model can come in, and which one a file is."""

from insula.checkpoints.lerobot import LEROBOT
from insula.checkpoints.openpi import OPENPI, OPENPI_TORCH
from insula.checkpoints.paligemma import BIG_VISION, HUGGING_FACE
from insula.checkpoints.sources import WeightSource
from insula.checkpoints.tensor_map import Format, Line, paths, resolve
from insula.errors import CheckpointError
from insula.model.config import ModelConfig
from insula.model.params import weight_table


def _ours(config: ModelConfig) -> list[Line]:
    return [Line(path, path, weight.axes) for path, weight in paths(weight_table(config)).items()]


def _without_expert(config: ModelConfig) -> list[Line]:
    return [line for line in _ours(config) if not line.ours.startswith("expert.")]


INSULA = Format("insula", _ours)
BACKBONE = Format("insula, without expert", _without_expert)
FORMATS = (INSULA, LEROBOT, OPENPI, OPENPI_TORCH, HUGGING_FACE, BIG_VISION)


def recognize(source: WeightSource, config: ModelConfig) -> Format:
    """The format whose names the source has most of. Raises CheckpointError where it has none of any."""
    hits = {format: _hits(format, source, config) for format in FORMATS}
    best = max(FORMATS, key=lambda format: hits[format])
    if not hits[best]:
        first = ", ".join(sorted(source.entries)[:3])
        known = "; ".join(format.name for format in FORMATS)
        raise CheckpointError(f"{source.path}: names like {first} belong to no known format; known: {known}")
    return best


def _hits(format: Format, source: WeightSource, config: ModelConfig) -> int:
    names = resolve(format.table(config), config).keys()
    return sum(format.canonical(name) in names for name in source.entries)
