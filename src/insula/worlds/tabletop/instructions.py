"""The instruction grammar: `put the {color} block in the {color} bowl`, to text and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import product

from insula.errors import InputError

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
# Checkpoints know this sentence by its very words: another wording is another task to them.
_PATTERN = re.compile(r"put the (\w+) block in the (\w+) bowl")


def check_color(color: str, known: Sequence[str] = COLORS, what: str = "color") -> str:
    """Return `color` when it is known. Raises InputError naming what is known and the nearest match."""
    if color in known:
        return color

    near = difflib.get_close_matches(str(color), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InputError(f"{what}: got {color!r}, expected one of {', '.join(known)}{hint}")


def instruction(block: str, bowl: str) -> str:
    """The sentence asking for the `block`-colored block in the `bowl`-colored bowl. Raises InputError for a color that
    is none of `COLORS`."""
    return f"put the {check_color(block)} block in the {check_color(bowl)} bowl"


def parse(text: str) -> tuple[str, str]:
    """(block color, bowl color) of an instruction. Raises InputError when `text` is not of the grammar."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise InputError(f"instruction: got {text!r}, expected 'put the {{color}} block in the {{color}} bowl'")

    return check_color(match[1], what="block color"), check_color(match[2], what="bowl color")


def all_instructions() -> list[str]:
    """Every sentence of the grammar (36)."""
    return [instruction(block, bowl) for block, bowl in product(COLORS, COLORS)]
