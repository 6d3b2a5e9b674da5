"""The instruction grammar: `put the {colour} block in the {colour} bowl`, to text and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from itertools import product

from insula.errors import InputError

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
_PATTERN = re.compile(r"put the (\w+) block in the (\w+) bowl")


def check_colour(colour: str, known: Sequence[str] = COLOURS, what: str = "colour") -> str:
    """Return `colour` when it is known. Raises ValueError naming what is known and the nearest match."""
    if colour in known:
        return colour
    near = difflib.get_close_matches(str(colour), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InputError(f"{what}: got {colour!r}, expected one of {', '.join(known)}{hint}")


def instruction(block: str, bowl: str) -> str:
    """The sentence asking for the `block`-coloured block in the `bowl`-coloured bowl."""
    return f"put the {check_colour(block)} block in the {check_colour(bowl)} bowl"


def parse(text: str) -> tuple[str, str]:
    """(block colour, bowl colour) of an instruction. Raises ValueError when `text` is not of the grammar."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise InputError(f"instruction: got {text!r}, expected 'put the {{colour}} block in the {{colour}} bowl'")
    return check_colour(match[1], what="block colour"), check_colour(match[2], what="bowl colour")


def all_instructions() -> list[str]:
    """Every sentence of the grammar (36)."""
    return [instruction(block, bowl) for block, bowl in product(COLOURS, COLOURS)]
