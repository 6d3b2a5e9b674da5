"""From a message to an observation of this policy: names, and what a request may hold besides.

    images / image  {camera: uint8 [h, w, 3]}      state  [S]      task or prompt  text
    max_age_ms      milliseconds after which the answer would be of no use; it is not worked on then
    seed            integers that the noise is drawn by: the same chunk again, wherever and whenever
    subtask         text: the step of the task to do now, where the server acts on subtasks
    previous        {"actions": [n, D], "delay": steps}: what is left of the last chunk, for real-time chunking

Maps may be nested or flat, with dots or slashes, behind "observation" or not: `observation/image/front`,
`observation.images.front` and {"images": {"front"}} are one. Other names are renamed by `--rename NAME=images.front`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.client.protocol import ErrorKind
from insula.errors import InputError, ProtocolError

_ALIASES = {"image": "images", "prompt": "task"}
_PREFIXES = ("observation", "observations")
_WHOLE = ("previous",)
"""Maps that are values, not places of names."""


@dataclass(frozen=True, eq=False)
class Request:
    """What `Policy.act` takes, and how it is to be answered. `subtask` is beside the observation, as it came: a server
    that acts on none does not look at it."""

    observation: dict[str, Any]
    seed: tuple[int, ...] | None = None
    max_age_ms: float | None = None
    subtask: Any = None


Renames = Mapping[str, str]


def parse_renames(given: Sequence[str]) -> Renames:
    """NAME=PLACE of the command line, by name. Several names of "state" are joined in this order.

    Raises InputError for what is no such pair, or no place of an observation.
    """
    renames = {}
    for pair in given:
        name, equals, place = pair.partition("=")
        known = place in ("state", "task") or (place.startswith("images.") and len(place) > len("images."))
        if not equals or not name or not known:
            raise InputError(
                f"--rename {pair}: expected NAME=state, NAME=task or NAME=images.CAMERA, such as "
                "observation/exterior_image_1_left=images.front"
            )
        renames[_spelled(name)] = place

    return renames


def read_request(message: Mapping[str, Any], renames: Renames) -> Request:
    """Raises ProtocolError naming the field. What the policy itself checks (cameras, sizes) is left to it."""
    found = dict(_leaves(message))

    # Robots report their state in parts; which and in which order is the command line's to say.
    parts = [found.pop(name) for name, place in renames.items() if place == "state" and name in found]
    for name, place in renames.items():
        if name in found:
            found[place] = found.pop(name)

    observation: dict[str, Any] = {"images": {}}
    subtask = None
    for name, value in found.items():
        place = _canonical(name)
        if place.startswith("images."):
            observation["images"][place.removeprefix("images.")] = value
        elif place in ("state", "task", "previous"):
            observation[place] = value
        elif place == "subtask":
            subtask = value

    if parts:
        arrays = [np.atleast_1d(_numbers(part, "state")) for part in parts]
        if any(array.ndim > 1 for array in arrays):
            raise ProtocolError(ErrorKind.INVALID, "state", "its parts are rows and tables, expected numbers or rows")
        observation["state"] = np.concatenate(arrays)
    elif "state" in observation:
        observation["state"] = _numbers(observation["state"], "state")

    return Request(observation, _seed(found.get("seed")), _max_age(found.get("max_age_ms")), subtask)


def _leaves(message: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of everything that is no map."""
    for key, value in message.items():
        name = f"{inside}.{_spelled(key)}" if inside else _spelled(key)
        if isinstance(value, Mapping) and name not in _WHOLE:
            yield from _leaves(value, name)
        else:
            yield name, value


def _spelled(name: str) -> str:
    return name.replace("/", ".")


def _canonical(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in _PREFIXES and rest:
        first, _, rest = rest.partition(".")

    first = _ALIASES.get(first, first)
    return f"{first}.{rest}" if rest else first


def _numbers(value: Any, field: str) -> np.ndarray:
    """An array of numbers as it is; a list or a number as float32."""
    if isinstance(value, np.ndarray):
        return value

    try:
        with np.errstate(over="ignore"):  # it becomes infinity, which the policy refuses by name
            array = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ProtocolError(ErrorKind.INVALID, field, "expected numbers") from None
    if isinstance(value, str):  # NumPy reads "1" as a number
        raise ProtocolError(ErrorKind.INVALID, field, "is text, expected numbers")

    return array


def _seed(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None

    numbers = value.tolist() if isinstance(value, np.ndarray) else value
    numbers = [numbers] if isinstance(numbers, int) else numbers
    good = isinstance(numbers, list) and 0 < len(numbers) <= 8
    if not good or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise ProtocolError(ErrorKind.INVALID, "seed", "expected 1 to 8 integers")

    return tuple(numbers)


def _max_age(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ProtocolError(ErrorKind.INVALID, "max_age_ms", "expected milliseconds > 0")

    return float(value)
