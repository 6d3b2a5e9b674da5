"""The report of a study: report.html, readable offline, and the same as data: tables.json, episodes.parquet, .csv."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np

from insula.files import write_json
from insula.page import render_page, write_page
from insula.page.html import Html, html_table, tag
from insula.report import STYLE_FILE
from insula.report.charts import interval_chart
from insula.report.sections import percent
from insula.study.design import Study
from insula.study.results import Results, episode_rows, read_results, write_episodes
from insula.study.tables import statement, tables

ASKED_TITLES = {
    "own": "the scene's own instruction",
    "swapped": "something else in the same scene: language following",
    "held_out": "words, or pairs, that no demonstration has",
}


def write_study(study: Study, out: Path, cells: Path) -> Path:
    """Everything that the finished cells say. Returns the page's path."""
    results = read_results(study, cells)
    shown = tables(results)
    write_json(out / "tables.json", shown)
    if rows := episode_rows(results):
        write_episodes(rows, out)

    return write_page(out / "report.html", render_study(results, shown))


def render_study(results: Results, shown: Mapping[str, Any]) -> str:
    """The page, as the text of one HTML file."""
    title = "insula: recipes compared"
    missing = f"; not finished: {', '.join(shown['missing'])}" if shown["missing"] else ""
    parts = [
        tag("h1", title),
        tag("p", f"{len(shown['cells'])} cells finished{missing}."),
        *(tag("p", line, class_="missing") for line in shown["unlike"]),
        tag(
            "p",
            "Success and wrong objects: means over training seeds, then 95 % intervals from drawing seeds and "
            "scenes again; of one seed, scenes alone.",
        ),
    ]
    for asked, about in ASKED_TITLES.items():
        parts.append(_section(f"Success: {about}", _rates(shown["success"][asked])))
    parts += [
        _section("Wrong object", _rates(shown["wrong_object"])),
        _section("Each policy by itself: success, Wilson's 95 % intervals over scenes", _cells(shown["by_cell"])),
        _section("What can be told apart", _statements(shown["comparisons"])),
        _section("Success against demonstrations", _curves(shown["by_data"], "episodes")),
        _section("Success against updates", _curves(shown["by_updates"], "updates")),
        _section(
            "What the backbone still knows: mean (least, most) over seeds", _before_after(shown["knowledge"], "kind")
        ),
        _section("Held-out questions of the data, likewise", _before_after(shown["answers"], "source")),
        _section("Held-out losses, over seeds", _held_out(shown["held_out"])),
        _section(
            "Recorded actions: mean absolute error, 95 % intervals over recordings", _open_loop(shown["open_loop"])
        ),
        _section("Gradients of both losses, were there no insulation", _gradients(shown["gradients"])),
        _section("Compute", _compute(shown["compute"])),
        _section("Machines that the cells were made on", _machines(results)),
    ]
    return render_page(title, tag("main", *parts), STYLE_FILE.read_text(encoding="utf-8"))


def _machines(results: Results) -> Html | None:
    names = sorted({found["machine"] for found in results.found.values()})
    return tag("p", "; ".join(names)) if names else None


def _section(title: str, content: Html | None) -> Html:
    missing = tag("p", "not measured", class_="missing")
    return tag("section", tag("h2", title), missing if content is None else content)


def _rates(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    if not rows:
        return None

    tasks = list(rows[0]["rates"])
    head = ["recipe", "data", "seeds", *tasks]
    body = [
        [row["recipe"], row["episodes"], row["seeds"], *(_interval(row["rates"].get(task)) for task in tasks)]
        for row in rows
    ]
    return html_table(head, body)


def _interval(rate: Mapping[str, float] | None) -> str:
    return "" if rate is None else f"{percent(rate['mean'])} ({percent(rate['low'])} to {percent(rate['high'])})"


def _cells(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    if not rows:
        return None

    tasks = list(rows[0]["rates"])
    body = [[row["cell"], row["asked"], *(_interval(row["rates"].get(task)) for task in tasks)] for row in rows]
    return html_table(["cell", "asked", *tasks], body)


def _statements(found: Sequence[Mapping[str, Any]]) -> Html | None:
    if not found:
        return None

    note = tag(
        "p",
        "Differences in points of success, with 95 % intervals: Welch's t over training seeds and the same scenes. One "
        "counts where its p, corrected by Holm for all pairs of a line, is below 0.05.",
    )
    rows = [[f"{one['task']}, {one['asked']}", one["episodes"], statement(dict(one))] for one in found]
    return tag("div", note, html_table(["asked", "data", "what can be said"], rows))


def _curves(rows: Sequence[Mapping[str, Any]], by: str) -> Html | None:
    if not rows:
        return None

    head = ["recipe", by, "scenes", "success, all tasks"]
    table = html_table(head, [[row["recipe"], row[by], row["scenes"], _interval(row["success"])] for row in rows])
    lines: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for row in rows:
        if isinstance(x := _number(row[by]), float):
            lines.setdefault(row["recipe"], []).append((x, row["success"]))
    return tag("div", interval_chart(f"success against {by}", lines, by), table)


def _number(value: Any) -> float | None:
    """Of "n200" or 200; None for "all", which is no number."""
    digits = str(value).removeprefix("n")
    return float(digits) if digits.isdigit() else None


def _before_after(rows: Sequence[Mapping[str, Any]], what: str) -> Html | None:
    """A row for each arm, a column for each kind: the share after training, its range over seeds where there are
    several; above them the share before any training, which is that of the backbone they all started from."""
    if not rows:
        return None

    kinds = sorted({row[what] for row in rows}, key=lambda kind: (not kind.startswith("mean"), kind))
    arms = list(dict.fromkeys((row["recipe"], row["episodes"]) for row in rows))
    by_kind = {(row["recipe"], row["episodes"], row[what]): row for row in rows}
    body = []
    for stage in ("before", "after"):
        for arm in arms:
            shown = [by_kind.get((*arm, kind)) for kind in kinds]
            body.append([*arm, stage, *("" if one is None else _range(one[stage]) for one in shown)])

    return html_table(["recipe", "data", "", *kinds], list(map(list, dict.fromkeys(map(tuple, body)))))


def _range(share: Mapping[str, float]) -> str:
    least, most = percent(share["least"]), percent(share["most"])
    return percent(share["mean"]) + (f" ({least}, {most})" if least != most else "")


def _held_out(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    body = [
        [
            row["recipe"],
            row["episodes"],
            row["metric"],
            *(f"{row['value'][key]:.4g}" for key in ("mean", "least", "most")),
        ]
        for row in rows
    ]
    return html_table(["recipe", "data", "metric", "mean", "least", "most"], body) if rows else None


def _open_loop(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    body = []
    for row in rows:
        for what in ("by_dimension", "by_step"):
            if what in row:
                entries = zip(*(row[what][key] for key in ("mean", "low", "high")), strict=True)
                whose = [row[key] for key in ("recipe", "episodes", "seed", "robot", "recordings", "failed")]
                body.append([*whose, what.replace("_", " "), ", ".join(starmap(_error, entries))])
        if "by_step" not in row:
            body.append([row["recipe"], row["episodes"], row["seed"], row["robot"], 0, row["failed"], "", "no chunk"])
    head = ["recipe", "data", "seed", "robot", "recordings", "failed chunks", "", "error, robot's units"]
    return html_table(head, body) if body else None


def _error(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return "none"
    return f"{mean:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def _gradients(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    """The cosine on each part, a mean over seeds, and how much larger the token loss's gradient is."""
    if not rows:
        return None

    parts = list(dict.fromkeys(row["part"] for row in rows))
    groups: dict[tuple[str, str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by_part = groups.setdefault((row["recipe"], row["episodes"], row["updates"]), {})
        by_part.setdefault(row["part"], []).append(row)

    body = []
    for key, by_part in groups.items():
        found = [by_part.get(part, []) for part in parts]
        cosines = [f"{_mean(one['cosine'] for one in each):.3f}" if each else "" for each in found]
        ratio = _mean(one["fast"] / one["flow"] for each in found for one in each if one["flow"] > 0)
        body.append([*key, *cosines, f"{ratio:.3g}"])

    return html_table(["recipe", "data", "updates", *parts, "norm of tokens / flow"], body)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _compute(rows: Sequence[Mapping[str, Any]]) -> Html | None:
    body = [[row["recipe"], row["episodes"], row["updates"], f"{row['seconds']['mean'] / 60:.1f}"] for row in rows]
    return html_table(["recipe", "data", "updates", "minutes of training"], body) if rows else None
