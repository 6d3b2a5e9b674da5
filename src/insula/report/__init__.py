"""One page that shows what a run did: `report.html`, self-contained, readable offline, on a phone, in the dark.

write_report("report.html", Report(closed_loop=result.to_json(), recordings=result.recordings, ...))
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from insula.errors import InputError
from insula.evaluate.closed_loop import Recording
from insula.page import render_page, write_page
from insula.page.html import Html, tag
from insula.report import sections

STYLE_FILE = Path(__file__).with_name("report.css")
REPORTED_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "mujoco", "gymnasium", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Report:
    """Plain data; whatever is left out is shown as "not measured"."""

    title: str = "insula: a knowledge-insulated policy, from demonstrations to closed loop"
    closed_loop: Mapping[str, Any] | None = None
    """`ClosedLoop.to_json()`."""
    by_task: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """The same for each task, where there are several."""
    recordings: tuple[Recording, ...] = ()
    metrics: tuple[Mapping[str, Any], ...] = ()
    """Rows of `metrics.jsonl`: `read_metrics(path)`."""
    knowledge: Mapping[str, Mapping[str, Any]] | None = None
    """"before" and "after" robot training: `dataclasses.asdict(Knowledge)` of each."""
    question_share: float | None = None
    """How much of the training data were questions, 0 to 1."""
    insulation: Mapping[str, Any] | None = None
    """`Proof.to_json()`, or `stored_certificate(path)`, which also says that a checkpoint has none."""
    fast: Mapping[str, Any] | None = None
    """Name and value of each FAST statistic: tokens of a chunk, reconstruction error."""
    demonstrations: int | None = None
    """How many there are."""
    seconds: Mapping[str, float] | None = None
    """Of each stage; "train" is shown on top."""
    settings: Mapping[str, Any] | None = None
    """Nested plain values."""
    seed: int | None = None
    machine: str | None = None
    versions: Mapping[str, str] | None = None


def write_report(path: str | Path, report: Report) -> Path:
    """Write the page, whole or not at all. Returns its path."""
    return write_page(path, render_report(report))


def render_report(report: Report) -> str:
    """The page, as the text of one HTML file."""
    body = tag(
        "main",
        tag("h1", report.title),
        sections.show_statement(report.demonstrations),
        sections.show_headline(report.closed_loop, report.knowledge, report.insulation, report.seconds, report.machine),
        _section("Closed loop on unseen scenes", sections.show_closed_loop(report.closed_loop)),
        *([_section("By task", sections.show_tasks(report.by_task))] if len(report.by_task) > 1 else []),
        _section("Rollouts", sections.show_rollouts(report.recordings)),
        _section("Is the backbone insulated?", sections.show_insulation(report.insulation)),
        _section("What the backbone still knows", sections.show_knowledge(report.knowledge, report.question_share)),
        _section("Training", sections.show_curves(report.metrics)),
        _section("FAST action tokens", sections.show_fast(report.fast)),
        _section("How it was made", sections.show_provenance(_facts(report), report.settings)),
    )
    return render_page(report.title, body, STYLE_FILE.read_text(encoding="utf-8"))


def _facts(report: Report) -> dict[str, Any]:
    stages = {f"{stage}, seconds": f"{seconds:.1f}" for stage, seconds in (report.seconds or {}).items()}
    named = {"machine": report.machine, "seed": report.seed, "demonstrations": report.demonstrations}
    return named | stages | dict(report.versions or {})


def _section(title: str, content: Html | None) -> Html:
    # A section that was not measured stays on the page: left out, nobody would miss it.
    missing = tag("p", "not measured", class_="missing")
    return tag("section", tag("h2", title), missing if content is None else content)


def read_metrics(path: str | Path) -> tuple[dict[str, Any], ...]:
    """The rows of a run's `metrics.jsonl`. Raises InputError naming a line that is no JSON."""
    # Line by line, so that an error names its line: a run that was killed may end in half of one.
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from None

    return tuple(rows)


def machine() -> str:
    """Processor, cores and system in a few words."""
    # Linux names the processor; elsewhere its architecture has to do.
    found = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]

    # Cores this process may use, which in a container are fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[0] if found else platform.machine()}, {cores} cores, {platform.system()}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def versions() -> dict[str, str]:
    """Of Python and the packages that the numbers depend on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}
