"""`insula replay`: the log of a robot's loop (`insula.client.record`) as one offline page."""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from insula.client.record import LOG_FILE, PICTURES_FOLDER
from insula.errors import InputError, printable
from insula.files import check_output_file, read_bytes, regular_size
from insula.page import render_page, write_page
from insula.page.html import Html, data_uri, html_table, tag
from insula.report.charts import Curve, strip_chart

MOST_POINTS = 2000
"""Of one curve: a log of days is thinned out to a page that opens at once."""
MOST_PICTURES = 12
"""Of one camera."""
MOST_ERRORS = 20
MOST_SUBTASKS = 200
LARGEST = 1e30
MOST_DIMENSIONS = 16
PNG = b"\x89PNG\r\n\x1a\n"
_STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: .5em; } .pictures figure { margin: 0; }
.pictures img { height: 7em; image-rendering: pixelated; } figcaption { font-size: .8em; }
"""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Show what a robot's loop saw, did and waited for: its log as one page. Raises MissingFileError where there is no
    log, InputError naming a line that is not of one."""

    log: tyro.conf.Positional[Path]
    """Folder that the loop's Recorder wrote."""
    out: Path | None = None
    """The page; replay.html in the folder unless given."""


@dataclasses.dataclass
class Log:
    """Rows by kind, as they were written; `torn`: the last one was not finished."""

    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    replies: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    torn: bool = False


def run_replay(config: ReplayConfig) -> None:
    """Write the page, and say where. Raises as `ReplayConfig` says, and FileError for a page that cannot be written."""
    out = config.out or config.log / "replay.html"
    log = read_log(config.log / LOG_FILE)
    check_output_file(out, (".html",), "out")
    print(write_page(out, render_replay(config.log, log)))


def read_log(path: Path) -> Log:
    """Raises MissingFileError or FileError, or InputError naming the first line that is not of such a log."""
    log = Log()
    for number, row in _rows(path, log):
        where = f"{path}: line {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where}: {row!r:.60}, expected a JSON object")
        if "chunk" in row:
            _check_numbers(row, where, "step", "of", "round_trip_ms")
            log.replies.append({name: value for name, value in row.items() if name != "chunk"})
        elif "error" in row:
            _check_numbers(row, where, "step")
            log.errors.append(row)
        else:
            _check_numbers(row, where, "step", "time")
            log.steps.append(row)

    return log


def _rows(path: Path, log: Log) -> Iterator[tuple[int, Any]]:
    regular_size(path)  # a pipe would never end
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith("\n"):  # the robot lost its power while it wrote
                    log.torn = True
                    return
                raise InputError(f"{path}: line {number} is no JSON") from None


def _check_numbers(row: dict[str, Any], where: str, *names: str) -> None:
    for name in names:
        value = row.get(name)
        if not _is_number(value):
            raise InputError(f"{where}: {name} is {value!r:.60}, expected a number")
    for name in ("origin", "infer_ms", "server_ms", "subtask_age"):
        if row.get(name) is not None and not _is_number(row[name]):
            raise InputError(f"{where}: {name} is {row[name]!r:.60}, expected a number or null")
    if not isinstance(row.get("subtask", ""), str):
        raise InputError(f"{where}: subtask is {row['subtask']!r:.60}, expected text")
    for name in ("state", "action"):
        values = row.get(name) or []
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise InputError(f"{where}: {name} is no list of numbers")


def _is_number(value: Any) -> bool:
    """One that can be drawn: a chart of 10³⁰⁸ has no scale."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def render_replay(folder: Path, log: Log) -> str:
    """The page, as the text of one HTML file."""
    title = f"insula replay: {folder.resolve().name}"
    torn = tag("p", "The last row was not finished: the loop was ended from outside.") if log.torn else None
    return render_page(
        title,
        tag(
            "main",
            tag("h1", title),
            torn,
            _section("What happened", _facts(log)),
            _section("How long the robot waited", _waits(log)),
            _subtasks(log),
            _section("What it was told", _numbers(log, "action", "Actions; gaps are steps in which it held")),
            _section("What it felt", _numbers(log, "state", "State")),
            _section("What it saw", _pictures(folder / PICTURES_FOLDER)),
            _section("Errors", _errors(log)),
        ),
        _STYLE,
    )


def _section(title: str, content: Html | None) -> Html:
    return tag("section", tag("h2", title), content or tag("p", "nothing was logged", class_="missing"))


def _facts(log: Log) -> Html | None:
    if not log.steps:
        return None

    taken = len(log.steps)
    held = sum(row.get("action") is None for row in log.steps)
    seconds = log.steps[-1]["time"] - log.steps[0]["time"]
    ages = [row["step"] - row["origin"] for row in log.steps if isinstance(row.get("origin"), int)]
    waits = [row["round_trip_ms"] for row in log.replies]
    said = collections.Counter(bool(row.get("connected")) for row in log.steps)
    rows = [
        ["control steps", f"{taken:,} in {seconds:.1f} s"],
        ["left out, too late", f"{log.steps[-1]['step'] + 1 - taken:,}"],
        ["held, nothing was due", f"{held:,} ({held / taken:.1%})"],
        ["without a connection", f"{said[False]:,}"],
        ["replies", f"{len(waits):,}"],
        ["round trip", _percentiles(waits, "ms")],
        ["age of what was executed", _percentiles(ages, "steps")],
        ["errors", f"{len(log.errors):,}"],
    ]
    return html_table([], rows, class_="plain")


def _percentiles(values: Sequence[int | float], unit: str) -> str:
    if not values:
        return "none"
    p50, p95, most = np.percentile(values, (50, 95, 100))
    return f"half within {p50:.4g}, 95 % within {p95:.4g}, all within {most:.4g} {unit}"


def _waits(log: Log) -> Html | None:
    if not log.replies:
        return None

    def of_replies(name: str) -> Curve:
        found = [(row["step"], row.get(name)) for row in log.replies]
        return _thinned([(step, math.nan if value is None else value) for step, value in found])

    rows = {name.removesuffix("_ms"): of_replies(name) for name in ("round_trip_ms", "server_ms", "infer_ms")}
    rows["delay, steps"] = _thinned([(row["step"], row["step"] - row["of"]) for row in log.replies])
    shown = {name: points for name, points in rows.items() if np.isfinite(points[1]).any()}
    return strip_chart("Replies, milliseconds", shown, "control step")


def _subtasks(log: Log) -> Html | None:
    """A row for each stretch of replies with the same one; nothing of a server that acts on none."""
    told = [(printable(row["subtask"], 300), row) for row in log.replies if "subtask" in row]
    stretches = [list(rows) for _, rows in itertools.groupby(told, key=lambda one: one[0])]
    if not stretches:
        return None

    shown: list[list[Any]] = []
    for stretch in stretches[:MOST_SUBTASKS]:
        (subtask, first), ages = stretch[0], [row.get("subtask_age") or 0 for _, row in stretch]
        shown.append([subtask, f"{first['of']:,}", f"{len(stretch):,}", f"{max(ages):,}"])
    more = len(stretches) - len(shown)
    rest = tag("p", f"The first {len(shown):,}; {more:,} more followed.") if more else ""
    table = html_table(["subtask", "from step", "replies", "oldest, requests"], shown)
    return _section("What it was to do", Html(table + rest))


def _numbers(log: Log, part: str, title: str) -> Html | None:
    """A strip for each dimension."""
    dims = max((len(row.get(part) or []) for row in log.steps), default=0)
    rows = {}
    for i in range(min(dims, MOST_DIMENSIONS)):
        values = [(row[part][i] if row.get(part) and i < len(row[part]) else math.nan) for row in log.steps]
        rows[str(i)] = _thinned([(row["time"], value) for row, value in zip(log.steps, values, strict=True)])

    chart = strip_chart(title, rows, "seconds")
    more = tag("p", f"The first {MOST_DIMENSIONS} of {dims} dimensions.") if dims > MOST_DIMENSIONS else None
    return chart and Html(chart + (more or ""))


def _thinned(points: list[tuple[int | float, int | float]]) -> Curve:
    kept = points[:: max(1, -(-len(points) // MOST_POINTS))]
    return [float(x) for x, _ in kept], [float(y) for _, y in kept]


def _pictures(folder: Path) -> Html | None:
    """Some of each camera's, evenly spread. A name is STEP_CAMERA.png."""
    cameras = collections.defaultdict[str, list[Path]](list)
    for path in sorted(folder.glob("*_*.png")) if folder.is_dir() else []:
        # The page is handed on: a link may lead to what is nobody else's.
        if path.is_file() and not path.is_symlink():
            cameras[printable(path.stem.partition("_")[2], 80)].append(path)

    strips = []
    for camera, paths in cameras.items():
        chosen = np.unique(np.linspace(0, len(paths) - 1, MOST_PICTURES).round().astype(int))
        views = []
        for path in (paths[i] for i in chosen):
            step = path.stem.partition("_")[0].lstrip("0") or "0"
            raw = read_bytes(path, 2**22)
            if not raw.startswith(PNG):
                raise InputError(f"{path}: no PNG file")
            picture = tag("img", src=data_uri("image/png", raw), alt=f"{camera}, step {step}")
            views.append(tag("figure", picture, tag("figcaption", step)))
        strips += [tag("h3", camera), tag("div", views, class_="pictures")]

    return Html("".join(strips)) if strips else None


def _errors(log: Log) -> Html | None:
    if not log.errors:
        return None

    counted = collections.Counter(printable(str(row["error"]), 300) for row in log.errors)
    rows: list[list[Any]] = [[message, times] for message, times in counted.most_common(MOST_ERRORS)]
    return html_table(["error", "times"], rows)
