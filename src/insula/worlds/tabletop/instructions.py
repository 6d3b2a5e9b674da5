"""The sentences of one placement: `put the {color} block in the {color} bowl`, or `on the {color} block`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Literal

from insula.errors import InputError, did_you_mean

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
Relation = Literal["in", "on"]
NOUNS: dict[Relation, str] = {"in": "bowl", "on": "block"}
# Checkpoints know this sentence by its very words: another wording is another task to them.
_PATTERN = re.compile(r"put the (\w+) block in the (\w+) bowl")


def check_color(color: str, known: Sequence[str] = COLORS, what: str = "color") -> str:
    """Return `color` when it is known. Raises InputError naming what is known and the nearest match."""
    if color in known:
        return color

    raise InputError(f"{what}: got {color!r}, expected one of {', '.join(known)}{did_you_mean(str(color), known)}")


def instruction(block: str, target: str, relation: Relation = "in") -> str:
    """The sentence asking for the `block`-colored block in the `target`-colored bowl, or on the block of that color.
    Raises InputError for a color that is none of `COLORS`."""
    return f"put the {check_color(block)} block {relation} the {check_color(target)} {NOUNS[relation]}"


def parse(text: str) -> tuple[str, str]:
    """(block color, bowl color) of an instruction of the task `put`. Raises InputError for any other text."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise InputError(f"instruction: got {text!r}, expected 'put the {{color}} block in the {{color}} bowl'")

    return check_color(match[1], what="block color"), check_color(match[2], what="bowl color")


def all_instructions() -> list[str]:
    """Every instruction of the task `put` (36)."""
    return [instruction(block, bowl) for block, bowl in product(COLORS, COLORS)]
