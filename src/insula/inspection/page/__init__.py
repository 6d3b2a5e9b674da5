"""The page of one sample: one file, offline, drawn in the browser from `view`.

The scripts run in this order: uPlot (the only library, in vendor/), dom.js (elements, packed arrays, charts),
patches.js (images with their patches), then one file for each section, and main.js, which calls them.
"""

import json
from pathlib import Path
from typing import Any

from insula import page
from insula.inspection.findings import Findings
from insula.inspection.view import view
from insula.page.html import Html, tag

HERE = Path(__file__).parent
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "dom.js",
    "patches.js",
    "sequence.js",
    "attention.js",
    "losses.js",
    "gradients.js",
    "look.js",
    "main.js",
)
STYLES = ("vendor/uPlot.min.css", "inspect.css")


def render(found: Findings, sources: dict[str, int] | None = None) -> str:
    """The page. `sources`, with how many samples each has, where a server is there to pick from them."""
    seen = view(found, sources)
    body = [
        tag("script", _data(seen), type="application/json", id="data"),
        tag("main", tag("noscript", tag("p", "This page is drawn by a script in it; nothing is fetched.")), id="page"),
    ]
    return page.render(
        f"insula inspect: {seen['about']['sample']}",
        Html("".join(body)),
        "".join(_read(name) for name in STYLES),
        [_read(name) for name in SCRIPTS],
    )


def _data(seen: dict[str, Any]) -> Html:
    """JSON that no text in it can end."""
    return Html(json.dumps(seen, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
