"""The page at /: what is served, to whom, how fast. It fetches nothing, runs no script, and reloads itself."""

import time
from typing import TYPE_CHECKING, Any

from insula.errors import printable
from insula.page import render_page
from insula.page.html import Html, html_table, tag
from insula.serve.backend import Thinks

if TYPE_CHECKING:
    from insula.serve.server import PolicyServer

RELOAD_S = 5
_STYLE = """
.bar { background: var(--held); height: .8em; min-width: 1px; }
.ready { color: var(--good); } .waiting { color: var(--bad); }
td:has(.bar) { width: 60%; }
"""


def render_status(server: "PolicyServer") -> str:
    """The whole page."""
    state = tag("strong", "ready", class_="ready") if server.is_ready else tag("strong", "not ready", class_="waiting")
    body = [
        tag("h1", "insula serve"),
        tag("p", "This server is ", state, f", started {_ago(server.started)} ago."),
        tag("h2", "Policy"),
        _policy(server.backend.about | server.backend.metadata if server.backend else {}),
        tag("h2", "Robots"),
        _robots(server),
        tag("h2", "Latency of replies"),
        _latency(server.metrics.latencies()),
        tag("h2", "Requests"),
        html_table(["outcome", "requests"], [[name, n] for name, n in sorted(server.metrics.outcomes().items())]),
    ]
    return render_page("insula serve", tag("main", body), _STYLE)


def _policy(metadata: dict[str, Any]) -> Html:
    if not metadata:
        return tag("p", "It is being loaded.")

    rows: list[list[Any]] = [[name.replace("_", " "), _as_text(value)] for name, value in metadata.items()]
    return html_table([], rows, class_="plain")


def _robots(server: "PolicyServer") -> Html:
    if not server.robots:
        return tag("p", "No robot is connected.")

    robots = server.robots.values()
    head = ["robot", "connected for", "answered", "refused", "last reply"]
    rows = [[one.address, _ago(one.since), one.answered, one.refused, _milliseconds(one.last_ms)] for one in robots]
    if isinstance(server.backend, Thinks):
        head.append("subtask, and its age in requests")
        for row, one in zip(rows, robots, strict=True):
            row.append("none yet" if one.subtask is None else f"{printable(one.subtask.text, 200)} ({one.subtask.age})")

    return html_table(head, rows)


def _latency(buckets: list[tuple[float, int]]) -> Html:
    """One bar for each bucket that has a reply, and those between them."""
    if not any(count for _, count in buckets):
        return tag("p", "No reply was sent yet.")

    filled = [i for i, (_, count) in enumerate(buckets) if count]
    most = max(count for _, count in buckets)
    rows = []
    for bound, count in buckets[filled[0] : filled[-1] + 1]:
        name = f"≤ {bound * 1000:g} ms" if bound < float("inf") else "longer"
        rows.append([name, count, tag("div", class_="bar", style=f"width: {100 * count / most:.1f}%")])

    return html_table(["time", "replies", ""], rows)


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {one}" for name, one in value.items())

    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _milliseconds(value: float | None) -> str:
    return "none yet" if value is None else f"{value:.1f} ms"


def _ago(moment: float) -> str:
    seconds = int(time.time() - moment)
    minutes, hours = seconds // 60, seconds // 3600
    return f"{seconds} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{hours} h"
