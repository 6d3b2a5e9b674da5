"""Episodes as a result keeps them: a row of numbers for each thing that is known of them, scene after scene.

    "own": {"scene": "1000000 1000001", "success": "1 0", "wrong_object": "0 1", "credit": "1 0.5", "steps": "31 250"}

Ten times smaller than an object for each, and as easy to read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Asked = str
"""What episodes ask: a key of `ASKED`."""
ASKED: dict[Asked, tuple[bool, bool]] = {"own": (False, False), "swapped": (True, False), "held_out": (False, True)}
"""Whether the goal is another one of the scene, and whether words or pairs are those that no demonstration has."""
KNOWN = ("success", "wrong_object", "credit", "steps")


def in_rows(episodes: Sequence[dict[str, Any]]) -> dict[Asked, dict[str, str]]:
    """Of `EpisodeResult`s as plain values; what was not asked is left out."""
    found = {}
    for asked, how in ASKED.items():
        kept = sorted((e for e in episodes if (e["swapped"], e["held_out"]) == how), key=lambda e: e["seed"])
        if kept:
            rows = {"scene": [e["seed"] for e in kept]} | {name: [e[name] for e in kept] for name in KNOWN}
            found[asked] = {name: " ".join(f"{float(value):.12g}" for value in row) for name, row in rows.items()}

    return found


def numbers(episodes: dict[str, str], name: str) -> np.ndarray:
    """One of the rows, as numbers, float64 [scenes]."""
    return np.array(episodes[name].split(), np.float64)
