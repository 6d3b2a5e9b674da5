"""Questions about a scene with answers that are true of it, for training a backbone to see before it acts.

A place in an image is two location tokens, y then x (PaliGemma's order), each one of 128 bins over the image:
`<loc0064><loc0020>`. A place on the table relative to the gripper is three: y, x (each one of 128 bins over
`OFFSET` meters, increasing with the table's own axes) and the gripper's height above it (over `HEIGHT` meters).
No answer tells a robot action.

    kind          question                                              answer
    block         where is the red block                                <loc0064><loc0020> | not visible
    bowl          where is the blue bowl                                the same
    gripper       where is the gripper                                  the same
    scene         what is on the table                                  red block<loc..><loc..> blue bowl...
    view          what is in the wrist camera                           the same, or nothing
    wrist         where is the red block in the wrist camera            the same
    colors        which colours are the blocks                          red, green, blue
    count         how many blocks are red                               1 | 0
    side          is the red block left or right of the blue bowl       left | right
    holding       what is the gripper holding                           the red block | nothing
    inside        in which bowl is the red block                        the blue bowl | none
    offset        from the gripper to the red block                     <loc0070><loc0031><loc0090>
    offsets       from the gripper to the blocks                        red block<loc..><loc..><loc..> ...
    task          put the red block in the blue bowl: where are they    <loc0064><loc0020> and <loc0031><loc0077>
    reach         put the red block in the blue bowl: from the gripper  <loc0070><loc0031><loc0090> and ...

(`colors`, `holding` and `inside` have a second form each: of the bowls, and answered by yes or no. `offsets` are asked
of the bowls, too. `scene`, `view` and `offsets` name what is plainly in sight, from left to right: many places for one
look at the image, which is what a small backbone learns to look from.)

A question is asked only where its answer is plainly true: of two things nearly above each other neither is left. The
wording must not change, "colours" included: the embedded backbone was trained on it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from insula.errors import InputError
from insula.worlds.tabletop.facts import Facts
from insula.worlds.tabletop.instructions import COLORS, instruction

LOCATION_BINS = 128  # two to a pixel of a 64-pixel image
OFFSET = (-0.4, 0.4)  # meters, from the gripper to a thing, along x and y
HEIGHT = (-0.05, 0.20)  # meters, of the fingertips above a thing
SIDE_MARGIN = 0.03  # of the image's width; nearer than that, left and right are not asked
NOT_VISIBLE = "not visible"
Pairs = list[tuple[str, str]]


def location(fraction: float) -> str:
    """The location token of a fraction of a range; 0 to 1, beyond it the outermost bin. Raises ValueError for NaN."""
    return f"<loc{int(np.clip(fraction * LOCATION_BINS, 0, LOCATION_BINS - 1)):04d}>"


def place(facts: Facts, camera: str, name: str) -> str | None:
    """Two tokens for the thing's center, "not visible", or None where neither is plainly true (only its edge is in)."""
    pixel = facts.pixels[camera][name]
    if pixel.visible == 0:
        return NOT_VISIBLE
    if not pixel.in_frame:
        return None

    return location(pixel.y / facts.image_size) + location(pixel.x / facts.image_size)


def offset(facts: Facts, position: np.ndarray) -> str:
    """Three tokens: from the gripper to `position` (meters) along y and x, and the gripper's height above it."""
    dx, dy, dz = position - facts.table.gripper
    low, high = OFFSET
    bottom, top = HEIGHT

    along = [location((v - low) / (high - low)) for v in (dy, dx)]
    return "".join(along) + location((-dz - bottom) / (top - bottom))


def _things(facts: Facts) -> dict[str, np.ndarray]:
    table = facts.table
    blocks = {f"{b.color} block": b.position for b in table.blocks}
    return blocks | {f"{b.color} bowl": b.position for b in table.bowls}


def _present(facts: Facts) -> dict[str, list[str]]:
    return {"blocks": [b.color for b in facts.table.blocks], "bowls": [b.color for b in facts.table.bowls]}


def _named(facts: Facts, noun: str) -> list[str]:
    return [name for name in _things(facts) if name.endswith(noun)]


def _tasks(facts: Facts) -> list[tuple[str, str]]:
    return [(block.color, bowl.color) for block in facts.table.blocks for bowl in facts.table.bowls]


def _where(facts: Facts, camera: str, names: list[str], suffix: str = "") -> Pairs:
    found = [(name, place(facts, camera, name)) for name in names]
    return [(f"where is the {name}{suffix}", answer) for name, answer in found if answer is not None]


def _wrist(facts: Facts) -> Pairs:
    return _where(facts, "wrist", list(_things(facts)), " in the wrist camera")


def _list(facts: Facts, camera: str) -> str:
    """Everything in sight of a camera and where, from left to right. The gripper in its own camera is no news."""
    pixels = {name: p for name, p in facts.pixels[camera].items() if (camera, name) != ("wrist", "gripper")}
    seen = {name: p for name, p in pixels.items() if p.in_frame and p.visible > 0}

    # A fixed order, so that at each token there is one right answer to learn.
    places = ((name, place(facts, camera, name)) for name in sorted(seen, key=lambda name: seen[name].x))
    return " ".join(f"{name}{where}" for name, where in places) or "nothing"


def _scene(facts: Facts) -> Pairs:
    return _listed(facts, "what is on the table", "front")


def _view(facts: Facts) -> Pairs:
    return _listed(facts, "what is in the wrist camera", "wrist")


def _listed(facts: Facts, question: str, camera: str) -> Pairs:
    # With distractors there is more than the token budget of the preset `tiny` has room for.
    return [] if facts.table.distractors else [(question, _list(facts, camera))]


def _colors(facts: Facts) -> Pairs:
    # In the order of `COLORS`: that of the scene is the order in which they were drawn, which no picture shows.
    return [
        (f"which colours are the {noun}", ", ".join(c for c in COLORS if c in present))
        for noun, present in _present(facts).items()
    ]


def _count(facts: Facts) -> Pairs:
    # All colors, also those that are not there: the answer would otherwise always be 1.
    return [
        (f"how many {noun} are {color}", str(present.count(color)))
        for noun, present in _present(facts).items()
        for color in COLORS
    ]


def _side(facts: Facts) -> Pairs:
    view = {name: p for name, p in facts.pixels["front"].items() if p.in_frame and p.visible > 0}
    margin = SIDE_MARGIN * facts.image_size

    return [
        (f"is the {one} left or right of the {other}", "left" if view[one].x < view[other].x else "right")
        for one in view
        for other in view
        if abs(view[one].x - view[other].x) > margin
    ]


def _holding(facts: Facts) -> Pairs:
    held = facts.table.held

    return [
        ("is the gripper holding something", "no" if held is None else "yes"),
        ("what is the gripper holding", "nothing" if held is None else f"the {held} block"),
    ]


def _inside(facts: Facts) -> Pairs:
    pairs = []
    for block in facts.table.blocks:
        bowl = facts.table.container(block.color)
        pairs.append((f"is the {block.color} block in a bowl", "no" if bowl is None else "yes"))
        pairs.append((f"in which bowl is the {block.color} block", "none" if bowl is None else f"the {bowl} bowl"))

    return pairs


def _offset(facts: Facts) -> Pairs:
    return [(f"from the gripper to the {name}", offset(facts, at)) for name, at in _things(facts).items()]


def _offsets(facts: Facts) -> Pairs:
    at = _things(facts)
    pairs = []

    for noun in ("block", "bowl"):
        names = sorted(_named(facts, noun), key=lambda name: at[name][0])  # by x, which grows to the right in `front`
        answer = " ".join(f"{name}{offset(facts, at[name])}" for name in names)
        pairs.append((f"from the gripper to the {noun}s", answer))

    return pairs


def _task(facts: Facts) -> Pairs:
    pairs = []
    for block, bowl in _tasks(facts):
        places = place(facts, "front", f"{block} block"), place(facts, "front", f"{bowl} bowl")
        if None not in places:
            pairs.append((f"{instruction(block, bowl)}: where are they", f"{places[0]} and {places[1]}"))

    return pairs


def _reach(facts: Facts) -> Pairs:
    at = _things(facts)

    # The nearest to acting that a question comes, yet no action: where the fingers have to go, not how.
    return [
        (
            f"{instruction(block, bowl)}: from the gripper",
            f"{offset(facts, at[f'{block} block'])} and {offset(facts, at[f'{bowl} bowl'])}",
        )
        for block, bowl in _tasks(facts)
    ]


_ASKERS: dict[str, Callable[[Facts], Pairs]] = {
    "block": lambda facts: _where(facts, "front", _named(facts, "block")),
    "bowl": lambda facts: _where(facts, "front", _named(facts, "bowl")),
    "gripper": lambda facts: _where(facts, "front", ["gripper"]),
    "scene": _scene,
    "view": _view,
    "wrist": _wrist,
    "colors": _colors,
    "count": _count,
    "side": _side,
    "holding": _holding,
    "inside": _inside,
    "offset": _offset,
    "offsets": _offsets,
    "task": _task,
    "reach": _reach,
}
KINDS = tuple(_ASKERS)


def questions(facts: Facts, kind: str) -> Pairs:
    """Every (question, answer) of one kind that has a plain answer here. Raises InputError for an unknown kind."""
    if kind not in _ASKERS:
        raise InputError(f"question kind: got {kind!r}, expected one of {', '.join(KINDS)}")

    return _ASKERS[kind](facts)


def all_questions(facts: Facts) -> list[tuple[str, str, str]]:
    """Every (kind, question, answer) with a plain answer in this scene."""
    return [(kind, question, answer) for kind in KINDS for question, answer in questions(facts, kind)]


def ask(facts: Facts, rng: np.random.Generator, kind: str | None = None) -> tuple[str, str]:
    """One (question, answer): a kind drawn evenly (or the named one), then a question of it drawn evenly.

    Raises InputError when `kind` is named but nothing of that kind has a plain answer in this scene.
    """
    kinds = list(rng.permutation(KINDS)) if kind is None else [kind]  # the next one where a kind has no answer here

    for candidate in kinds:
        pairs = questions(facts, str(candidate))
        if pairs:
            question, answer = pairs[rng.integers(len(pairs))]
            return question, answer

    raise InputError(f"question kind {kind!r}: nothing of it has a plain answer in this scene; leave `kind` to chance")
