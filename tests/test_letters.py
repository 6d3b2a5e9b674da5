"""One letter, one meaning: whatever an annotation, an einsum or a weight table uses is in the legend of `shapes.py`."""

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from small import SMALL, transformer

from insula import shapes
from insula.model.config import LoraConfig, VisionConfig
from insula.model.params import weight_table
from insula.model.weights import Weight, is_weight

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "insula"
LEGEND = dict(re.findall(r"^([A-Z])     (.+)$", shapes.__doc__ or "", flags=re.MULTILINE))
LOWER = {"h", "w", "r", "i", "o", "n"}
KINDS = {"Bool", "Float", "Int", "Shaped", "UInt8"}


def annotated(source: str) -> Iterator[str]:
    """Every axis named in a jaxtyping annotation, "*name" and "M+A" taken apart."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Name(id=kind), slice=ast.Tuple(elts=[_, ast.Constant(value=str(axes))])) if (
                kind in KINDS
            ):
                for axis in axes.split():
                    if not axis.startswith(("*", "...", "_")):
                        yield from re.split(r"[+*]", axis)


def summed(source: str) -> Iterator[str]:
    """Every letter of an einsum."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="einsum"), args=[ast.Constant(value=str(rule)), *_]):
                yield from re.sub(r"[\W\d_]", "", rule).upper()


def unknown(source: str) -> set[str]:
    """What is used and explained nowhere. A whole word, such as "words", explains itself."""
    axes = {axis for axis in annotated(source) if not axis.isdigit() and not (len(axis) > 1 and axis.islower())}
    return (axes - LEGEND.keys() - LOWER) | (set(summed(source)) - LEGEND.keys())


def test_the_legend_is_read() -> None:
    assert len(LEGEND) >= 20 and LEGEND["D"] == "action dimensions" and "depth" in LEGEND["X"]
    lines = re.findall(r"^([A-Z])     ", shapes.__doc__ or "", flags=re.MULTILINE)
    assert len(lines) == len(set(lines)), "a letter is explained twice"
    assert len(set(LEGEND.values())) == len(LEGEND), "two letters mean the same"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_letter_is_in_the_legend(path: Path) -> None:
    assert unknown(path.read_text(encoding="utf-8")) == set()


def test_every_letter_of_the_legend_is_used() -> None:
    used = set("".join(weight.axes for weight in weights(DISTINCT)))
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        used |= {*annotated(source), *summed(source)}
    assert LEGEND.keys() - used - {"C", "R"} == set()  # these two appear in products alone: B·C, A·R


@pytest.mark.parametrize(
    "source", ['def f(x: Float[Array, "B Ω"]): ...', 'def f(x: Int[Array, "q"]): ...', 'jnp.einsum("bö,cö->bc", x, y)']
)
def test_an_unknown_letter_is_found(source: str) -> None:
    assert unknown(source)


VISION = VisionConfig(image_size=16, patch_sizes=(8,), stem_widths=(), width=20, depth=1, mlp_dim=28, num_heads=2)
DISTINCT = dataclasses.replace(
    SMALL,
    vision=VISION,
    backbone=dataclasses.replace(transformer(16, 2), head_dim=6),
    expert=dataclasses.replace(transformer(12, 2), head_dim=6),
    vocab_size=47,
    action_dim=9,
    state_dim=11,
    state_input="token",
    lora=LoraConfig(rank=5, parts=("backbone", "expert")),
)
"""A model in which no two axes of a part have the same size."""


def weights(config) -> list[Weight]:
    return jax.tree.leaves(weight_table(config), is_leaf=is_weight)


def test_a_letter_has_one_size_within_a_part() -> None:
    table = weight_table(DISTINCT)
    for part in ("vision", "backbone", "expert"):
        sizes: dict[str, set[int]] = defaultdict(set)
        for weight in jax.tree.leaves(getattr(table, part), is_leaf=is_weight):
            for letter, size in zip(weight.axes, weight.shape, strict=True):
                assert letter in LEGEND or letter in LOWER, weight
                sizes[letter].add(size)
        assert all(len(found) == 1 for found in sizes.values()), (part, dict(sizes))

        meant = {letter: found.pop() for letter, found in sizes.items()}
        named = {"D": 9, "S": 11, "V": 47, "r": 5, "E": 10 if part == "vision" else 6}
        assert all(meant[letter] == size for letter, size in named.items() if letter in meant)
