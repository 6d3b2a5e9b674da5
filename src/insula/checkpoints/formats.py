"""The formats a model can come in, and which one a file is."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Sequence

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
PREFIX_COMPONENTS = 4
"""The longest prefix of a wrapped model that is looked for."""
FORMATS = (INSULA, LEROBOT, OPENPI, OPENPI_TORCH, HUGGING_FACE, BIG_VISION)


def recognize(source: WeightSource, config: ModelConfig, ignore: Sequence[str] = ()) -> tuple[Format, str]:
    """The format whose names the source has most of, and the prefix that stands before them there, usually "".

    Names that match a pattern of `ignore` do not count. Raises CheckpointError where there is none, or where two
    prefixes fit equally well, such as those of the weights and of their running average.
    """
    names = [name for name in source.entries if not any(fnmatch.fnmatchcase(name, p) for p in ignore)]

    # By counting names rather than by one telltale tensor: a file may lack any single one.
    found: dict[tuple[Format, str], set[str]] = defaultdict(set)
    for format in FORMATS:
        table = resolve(format.table(config), config).keys() | {second for second, _ in format.tied}
        for name in names:
            for prefix in _prefixes(name):
                if format.canonical(name.removeprefix(prefix)) in table:
                    found[format, prefix].add(name)

    if not found:
        first = ", ".join(sorted(source.entries)[:3]) or "none at all"
        known = "; ".join(format.name for format in FORMATS)
        raise CheckpointError(f"{source.path}: names like {first} belong to no known format; known: {known}")

    best = max(found, key=lambda key: (len(found[key]), -len(key[1])))

    # As many names again that the best does not cover: weights and their average, a policy and its teacher.
    for rival, covered in found.items():
        if len(covered) == len(found[best]) and not covered & found[best]:
            prefix = max(best[1], rival[1])
            raise CheckpointError(
                f"{source.path} holds this model twice, under names like {min(found[best])} and {min(covered)}; "
                f"say which to leave over, such as --ignore '{prefix}*'"
            )

    return best


def _prefixes(name: str) -> list[str]:
    """Nothing, and the first few components: "", "policy.", "policy.model." """
    ends = [match.end() for match in re.finditer(r"[./]", name)]
    return [name[:end] for end in [0, *ends[:PREFIX_COMPONENTS]]]
