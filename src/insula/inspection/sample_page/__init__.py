"""The page of one sample: one file, offline, drawn in the browser from `sample_view`.

The scripts run in this order: uPlot (the only library, in vendor/), dom.js (elements, packed arrays, charts),
patches.js (images with their patches), then one file for each section, and main.js, which calls them.
"""

import json
from pathlib import Path
from typing import Any

from insula.inspection.findings import Findings
from insula.inspection.view import sample_view
from insula.page import render_page
from insula.page.html import Html, tag

SCRIPTS_FOLDER = Path(__file__).parent
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "dom.js",
    "patches.js",
    "sequence.js",
    "attention.js",
    "losses.js",
    "speech.js",
    "gradients.js",
    "look.js",
    "main.js",
)
STYLES = ("vendor/uPlot.min.css", "inspect.css")


def render_sample(found: Findings, sources: dict[str, int] | None = None) -> str:
    """The page. `sources`, with how many samples each has, where a server is there to pick from them."""
    # The data is a block of JSON and no script, so the page's policy, which names scripts by their hash, need not list
    # it.
    seen = sample_view(found, sources)
    body = [
        tag("script", _embedded(seen), type="application/json", id="data"),
        tag("main", tag("noscript", tag("p", "This page is drawn by a script in it; nothing is fetched.")), id="page"),
    ]

    return render_page(
        f"insula inspect: {seen['about']['sample']}",
        Html("".join(body)),
        "".join(_page_file(name) for name in STYLES),
        [_page_file(name) for name in SCRIPTS],
    )


def _embedded(seen: dict[str, Any]) -> Html:
    """JSON that no text in it can end."""
    # Only "</script" or "<!--" could, and both need a "<". allow_nan=False: browsers do not parse NaN.
    return Html(json.dumps(seen, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _page_file(name: str) -> str:
    return (SCRIPTS_FOLDER / name).read_text(encoding="utf-8")
