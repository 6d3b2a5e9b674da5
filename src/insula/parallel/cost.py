"""What a program costs, read off the program: its products before it is compiled, its messages after.

XLA's own cost analysis counts the body of a loop once, however often it runs.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax

# --- products --------------------------------------------------------------------------------------------------------


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Floating point operations of all matrix products in one call, two for each multiply and add; what a backward pass
    computes again is counted again. Arguments may be shapes. All devices of a mesh together."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_count(part) for part in _parts(equation.params)]
        match name:
            case "dot_general":
                total += _product(equation)
            case "scan":
                total += equation.params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "while" if sum(inner):
                raise NotImplementedError("a loop of unknown length with products in it")
            case _:
                total += sum(inner)

    return total


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _parts(value: Any) -> Iterator[Any]:
    """The programs among an operation's parameters."""
    match value:
        case dict():
            for part in value.values():
                yield from _parts(part)
        case tuple() | list():
            for part in value:
                yield from _parts(part)
        case _ if hasattr(value, "eqns"):
            yield value
        case _ if hasattr(value, "jaxpr"):
            yield from _parts(value.jaxpr)


# --- messages --------------------------------------------------------------------------------------------------------

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_WIDTHS |= {"f64": 8, "s64": 8, "u64": 8}
_SHAPE = re.compile(rf"\b({'|'.join(_WIDTHS)})\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{\s*$")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Messages:
    """Of one kind of collective: how many a step, and the bytes one device sends for them, by rings."""

    count: int
    sent: float


def count_messages(program: str) -> dict[str, Messages]:
    """By kind, from a compiled program's own text; what is in a loop counts as often as the loop runs."""
    lines = defaultdict[str, list[str]](list)
    entry = current = ""
    for line in program.splitlines():
        if found := _COMPUTATION.match(line):
            current = found.group(1)
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            lines[current].append(line)

    counts: Counter[str] = Counter()
    sent: Counter[str] = Counter()

    def walk(name: str, times: int) -> None:
        for line in lines[name]:
            if found := _OPERATION.search(line):
                kind = found.group(2)
                counts[kind] += times
                sent[kind] += round(times * _sent(kind, _bytes(found.group(1)), _group(line)))
            trips = int(found.group(1)) if (found := _TRIPS.search(line)) else 1
            for called in _CALLED.findall(line):
                walk(called, times * trips)

    walk(entry, 1)
    return {kind: Messages(counts[kind], sent[kind]) for kind in COLLECTIVES if counts[kind]}


def _bytes(shapes: str) -> int:
    """Of a result, or of the several of one operation."""
    return sum(
        _WIDTHS[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in _SHAPE.findall(shapes)
    )


def _group(line: str) -> int:
    """How many devices one message is among. XLA writes groups in three ways: how many of how many, one by one, or axes
    of a mesh of its own."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('[^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    if "source_target_pairs" in line:
        return 2

    raise NotImplementedError(f"no groups in: {line.strip()[:200]}")


def _sent(kind: str, result: int, group: int) -> float:
    """Bytes that each device of a ring sends for a result of so many bytes."""
    others = (group - 1) / group
    match kind:
        case "all-reduce":
            return 2 * others * result  # scattered sums, then gathered
        case "reduce-scatter":
            return others * result * group  # the result is one piece of what went in
        case "collective-permute":
            return result
        case _:
            return others * result
