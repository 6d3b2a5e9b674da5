"""Bounds of settings: one message for all of them, which names the setting, what was got and what is expected."""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from insula.errors import InputError, did_you_mean

LARGEST_INTEGER = 2**31 - 1
"""Of any setting. Beyond it the error would come from deep inside: arrays, generators and other languages count in 32
bits."""
SEED_LIMIT = LARGEST_INTEGER
"""Largest seed. Sources of a mixture count up from it, and random generators take seeds below 2³²."""


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises InputError unless `value` is an integer from `least` to `most`."""
    bounds = f"an integer ≥ {least}" if most is None else f"an integer from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):  # True is an int, and JSON has both
        raise InputError(f"{name} is {value!r}, expected {bounds}")

    if value < least or (most is not None and value > most):
        raise InputError(f"{name} is {value}, expected {bounds}")
    if value > LARGEST_INTEGER:
        raise InputError(f"{name} is {value}, expected an integer from {least} to {LARGEST_INTEGER}")


def check_number(name: str, value: object, expected: str, good: Callable[[float], bool]) -> None:
    """Raises InputError unless `value` is a finite number that is `good`; `expected` says what that means, such as
    "> 0"."""
    # Infinity first: it is ≥ 0, so `good` would let it pass.
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or not good(float(value)):  # type: ignore[arg-type]
        raise InputError(f"{name} is {value!r}, expected a number {expected}")


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises InputError with the nearest one unless `value` is one of `known`."""
    if value not in known:
        raise InputError(f"{name} is {value!r}, expected one of {known}{did_you_mean(str(value), known)}")


def check_seed(name: str, value: object) -> None:
    """Raises InputError unless `value` can seed every generator we use."""
    check_integer(name, value, 0, SEED_LIMIT)


def is_a(value: object, kind: Any) -> bool:
    """Whether a value is of the annotation of a field: plain types, `X | None`, `tuple[X, ...]`, `dict[str, Any]`,
    `Literal`."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(is_a(value, one) for one in inside)
    if origin is Literal:
        return isinstance(value, str) and value in inside
    if origin is tuple:
        return isinstance(value, tuple) and all(is_a(part, inside[0]) for part in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind in (int, float) and isinstance(value, bool):  # True is an int, and JSON has both
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)

    return isinstance(value, kind)


def name_of(kind: Any) -> str:
    """An annotation in the words of an error: "int", "tuple[str, ...]", "'prompt' or 'token'"."""
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, inside))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("none" if one is types.NoneType else name_of(one) for one in inside)
    if dataclasses.is_dataclass(kind) or get_origin(kind) is dict:
        return "an object"

    return str(kind) if inside else str(kind.__name__)
