"""Pictures of a report: loss curves and intervals as inline SVG, rollouts as inline PNG and WebP."""

import contextlib
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from insula.page.html import Html, data_uri, tag

THEME = {"#010101": "var(--ink)", "#020202": "var(--line)", "#030303": "var(--train)", "#040404": "var(--held)"}
"""Stand-ins drawn by matplotlib, and the page's colors they become, light or dark."""
INK, LINE, TRAIN, HELD = THEME
KEY_FRAMES = 6
LONGEST_SIDE = 64
"""Pixels of a camera's picture on the page."""
Curve = tuple[list[float], list[float]]


def curve(metrics: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Steps and values of the metric `name`, where it was logged and is a number."""
    # Rows hold different metrics: held-out ones are measured only now and then.
    found = [(row["step"], row[name]) for row in metrics if isinstance(row.get(name), int | float)]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def loss_chart(title: str, train: Curve, held_out: Curve, log: bool = True) -> Html | None:
    """Training (thin) and held-out (dotted ends) curve over steps; None where nothing was logged."""
    if not train[0] and not held_out[0]:
        return None

    with _drawing(title):
        # Without pyplot: it would keep every figure, and choose a window system.
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()

        # A run that logged only a few times would show as nothing without its points.
        axes.plot(*train, color=TRAIN, lw=1.4, marker="o" if len(train[0]) < 8 else None, ms=3, label="training")
        axes.plot(*held_out, color=HELD, lw=1.8, marker="o", ms=3.5, label="held-out")

        # A loss can reach 0 (a sample without tokens), which has no logarithm.
        if log and min(train[1] + held_out[1]) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())

        axes.set_title(title, loc="left", fontsize=12, color=INK)
        axes.set_xlabel("update", color=INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=10)
        return _finished(figure, title)


def strip_chart(title: str, rows: Mapping[str, Curve], xlabel: str) -> Html | None:
    """Curves one above the other, each on a scale of its own; NaN is a gap. None where there is nothing to draw."""
    if not any(np.isfinite(values).any() for _, values in rows.values()):
        return None

    with _drawing(title):
        figure = Figure(figsize=(9.4, 0.5 + 0.95 * len(rows)), layout="constrained")
        strips = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
        for axes, (name, points) in zip(strips, rows.items(), strict=True):
            axes.plot(*points, color=TRAIN, lw=1.2, marker="o" if len(points[0]) < 8 else None, ms=3)
            axes.set_ylabel(name, color=INK, rotation=0, ha="right", va="center")

        strips[0].set_title(title, loc="left", fontsize=12, color=INK)
        strips[-1].set_xlabel(xlabel, color=INK)
        return _finished(figure, title)


def interval_chart(title: str, lines: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]], xlabel: str) -> Html:
    """A line for each name, of (x, {"mean", "low", "high"}), with its intervals; means are shares, 0 to 1."""
    with _drawing(title):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, points), color in zip(lines.items(), itertools.cycle(matplotlib.color_sequences["tab10"])):
            x = [at for at, _ in points]
            mean, low, high = ([100 * found[key] for _, found in points] for key in ("mean", "low", "high"))
            axes.plot(x, mean, color=color, lw=1.6, marker="o", ms=3.5, label=name)
            axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)

        axes.set_ylim(0, 100)
        axes.set_title(title, loc="left", fontsize=12, color=INK)
        axes.set_xlabel(xlabel, color=INK)
        axes.set_ylabel("%", color=INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        return _finished(figure, title)


def _drawing(title: str) -> contextlib.AbstractContextManager[None]:
    # Text stays text, in the page's font; the salt makes ids, and so the whole page, the same every time.
    return matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": title})


def _finished(figure: Figure, title: str) -> Html:
    for axes in figure.axes:
        axes.tick_params(colors=INK, which="both", length=0)
        axes.grid(color=LINE, lw=0.7)
        axes.spines[:].set_visible(False)

    buffer = io.StringIO()
    # No date in it: the same run gives the same bytes.
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    return _inline(buffer.getvalue(), title)


def _inline(svg: str, title: str) -> Html:
    """The drawing alone: no prologue, ids of its own, the page's colors and font."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)

    # Several drawings share one page, so every id carries its drawing's name.
    name = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)

    # The page's font, and no fixed size: the drawing fills its column, and its name is read out.
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    label = f'role="img" aria-label="{name.replace("-", " ")}"'
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', label, svg, count=1)

    # matplotlib takes no CSS variables, so it drew in colors that nothing else would have.
    for stand_in, color in THEME.items():
        svg = svg.replace(stand_in, color)

    return tag("figure", Html(svg), class_="chart")


def interval_bar(rate: float, low: float, high: float, bad: bool = False) -> Html:
    """A rate from 0 to 1 as a bar, its interval as a whisker."""
    color = "var(--bad)" if bad else "var(--good)"
    width = max(100 * (high - low), 0.6)  # a narrow interval stays visible
    return Html(
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect width="100" height="10" fill="var(--line)" opacity=".6"/>'
        f'<rect width="{100 * rate:.2f}" height="10" fill="{color}" opacity=".75"/>'
        f'<rect x="{100 * low:.2f}" y="4" width="{width:.2f}" height="2" fill="var(--ink)"/></svg>'
    )


def key_frames(frames: np.ndarray, count: int = KEY_FRAMES) -> str:
    """`count` evenly spread frames side by side, the last among them, cameras one above the other, as a PNG URI."""
    # `unique`, for an episode shorter than the number of frames asked for.
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    views = [np.concatenate(list(view), axis=1) for view in _views(chosen)]
    return _png(np.concatenate(views))


def first_frame(frames: np.ndarray) -> str:
    """The first frame, both cameras side by side, as a PNG URI."""
    return _png(np.concatenate([view[0] for view in _views(frames[:1])], axis=1))


def animation(frames: np.ndarray, milliseconds: int = 100) -> str:
    """All frames, both cameras side by side, as a looping WebP URI; the end stays for a second."""
    sequence = np.concatenate(_views(frames), axis=2)
    images = [Image.fromarray(frame) for frame in sequence]

    buffer = io.BytesIO()
    duration = [milliseconds] * (len(images) - 1) + [1000]
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], duration=duration, loop=0, quality=80)
    return data_uri("image/webp", buffer.getvalue())


def _views(frames: np.ndarray) -> list[np.ndarray]:
    """Frames [T, h, cameras·w, 3] of square cameras, one array for each camera, no side longer than LONGEST_SIDE."""
    # Every nth pixel, not an average: the page shows pixels as the policy got them.
    step = -(-frames.shape[1] // LONGEST_SIDE)
    return [view[:, ::step, ::step] for view in np.split(frames, frames.shape[2] // frames.shape[1], axis=2)]


def _png(image: np.ndarray) -> str:
    # Without loss: a still is looked at pixel by pixel.
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())
