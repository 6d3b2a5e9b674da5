"""What is known of an episode, drawn into its frames: what was asked, what is planned, where the expert looks.

┌──────────┬──────────┐
│ front    │ wrist    │   every pixel a square, as the policy was given it
│  ╲___    │   ▒▒     │   the way of the gripper (open or closed), the patches that are looked at
├──────────┴──────────┤
│ instruction         │
│ subtask       holds │
└─────────────────────┘
"""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from insula.evaluate.episodes import WAY_CAMERA, Planned
from insula.letterbox import fit_box
from insula.shapes import Bool, Float, UInt8

Color = tuple[int, int, int]
SCALE = 4
"""How often a pixel is repeated, either way."""
LINE_HEIGHT, MARGIN, FONT_SIZE = 22, 6, 15
"""Of the caption, pixels."""
BACKGROUND, TEXT, SUBTASK, WARNING = (22, 22, 26), (240, 240, 240), (140, 200, 255), (255, 190, 60)
OPEN, CLOSED, EDGE = (0, 225, 255), (255, 0, 170), (0, 0, 0)
"""Of the way."""
GLOW, STRONGEST, DIM = (255, 240, 120), 0.4, 0.65
"""What is looked at most is blended with this color by `STRONGEST`; what is not looked at at all keeps `DIM` of its
light."""


def draw_frame(
    frame: UInt8[np.ndarray, "h width 3"], task: str, plan: Planned | None = None, holds: bool = False
) -> UInt8[np.ndarray, "_ _ 3"]:
    """A frame of a recording, enlarged, with all that is known of it: the instruction, and what `plan` holds. `holds`:
    whether the robot holds in this step, as no chunk is due."""
    shown = enlarge(frame)
    if plan is None:
        return add_caption(shown, task)

    left = 0
    most = max((float(weights.max()) for weights in (plan.look or {}).values()), default=1.0)
    for camera, picture in plan.observation["images"].items():
        view = shown[:, SCALE * left : SCALE * (left + picture.shape[1])]
        left += picture.shape[1]

        # One scale for all cameras: which of them is looked at more can be seen, too.
        if plan.look is not None and camera in plan.look:
            view[:] = add_look(view, plan.look[camera] / most)
        if plan.pixels is not None and camera == WAY_CAMERA:
            view[:] = add_way(view, SCALE * plan.pixels, closes=plan.chunk[:, -1] > 0)

    mark = "no chunk: it holds" if holds else ""
    return add_caption(shown, task, _subtask(plan), mark)


def enlarge(frame: UInt8[np.ndarray, "h width 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """`SCALE` times, as a copy."""
    # By repeating, not by a filter: what is looked at are the very pixels the policy was given.
    return frame.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def add_look(
    picture: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The patches of a picture, each the brighter the larger its weight from 0 to 1."""
    # The model saw the picture in the middle of a square, and its patches are the square's.
    side, grid = max(picture.shape[:2]), len(weights)
    box = fit_box(picture.shape[:2], (side, side))
    row = (box.above + np.arange(picture.shape[0])) * grid // side
    column = (box.left + np.arange(picture.shape[1])) * grid // side

    # Mostly light and shade, and little tint: the colors are what instructions speak of.
    weight = weights[row[:, None], column[None], None]
    lit = picture * (DIM + (1 - DIM) * weight)
    return np.rint(lit + STRONGEST * weight * (np.array(GLOW) - lit)).astype(np.uint8)


def add_way(
    picture: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "_ 2"], closes: Bool[np.ndarray, "n"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A line through `points` (x, y), in the color of what the gripper is told on the way to each; a dot where it ends.
    Points that are NaN, behind the camera, are left out."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    colors = [CLOSED if closed else OPEN for closed in closes]
    steps = [
        ([(x, y) for x, y in points[i : i + 2].tolist()], color)
        for i, color in enumerate(colors)
        if np.isfinite(points[i : i + 2]).all()
    ]

    # A dark edge first, below all of the line: on a block of the same color it would be lost.
    for ends, _ in steps:
        draw.line(ends, fill=EDGE, width=5)
    for ends, color in steps:
        draw.line(ends, fill=color, width=3)
    if steps:
        ends, color = steps[-1]
        draw.circle(ends[-1], 5, fill=color, outline=EDGE)

    return np.asarray(image)


def add_caption(
    picture: UInt8[np.ndarray, "h w 3"], task: str, second: str = "", mark: str = ""
) -> UInt8[np.ndarray, "_ w 3"]:
    """Two lines of text below a picture, and a `mark` at the right end of the second. What is too long is written
    smaller."""
    width = picture.shape[1]
    strip = Image.new("RGB", (width, 2 * LINE_HEIGHT + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    right = width - MARGIN

    if mark:
        right -= _write(draw, mark, LINE_HEIGHT, width // 3, WARNING, right) + MARGIN
    _write(draw, task, 0, width - 2 * MARGIN, TEXT)
    _write(draw, second, LINE_HEIGHT, right - MARGIN, SUBTASK)
    return np.concatenate([picture, np.asarray(strip)])


def _write(draw: ImageDraw.ImageDraw, text: str, top: int, room: int, color: Color, right: int | None = None) -> int:
    """One line, from the left, or up to `right`. Returns how wide it came out."""
    text = " ".join(text.split())
    size = FONT_SIZE
    while size > 1 and _font(size).getlength(text) > room:
        size -= 1

    wide = int(np.ceil(_font(size).getlength(text)))
    left = MARGIN if right is None else right - wide
    draw.text((left, top + MARGIN / 2 + LINE_HEIGHT / 2), text, fill=color, font=_font(size), anchor="lm")
    return wide


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _subtask(plan: Planned) -> str:
    if "subtask" in plan.observation:
        return f"told: {plan.observation['subtask']}"
    if plan.said is None:
        return ""

    text = f"{plan.said.text}  ({plan.said.probability:.0%})"
    return text if plan.said.ended else f"never ended: {text}"
