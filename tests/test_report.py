"""The report: one file, offline, honest about what is missing, and safe with any text."""

import base64
import dataclasses
import html.parser
import io
import math
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from insula.batch import LossName
from insula.certificate.proof import Outcome
from insula.certificate.stored import stored_certificate
from insula.certificate.table import Scheme
from insula.evaluate.closed_loop import ClosedLoop
from insula.evaluate.episodes import EpisodeResult, Recording
from insula.page.html import Html, as_html, tag
from insula.report import Report, charts, machine, read_metrics, render_report, versions, write_report

EVIL = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br", "source"}


def recording(index: int, success: bool, task: str = "put the red block in the blue bowl", size: int = 64) -> Recording:
    """A disc that wanders, on a table in two shades."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:size, :size] / size
    frames = np.empty((25, size, 2 * size, 3), np.uint8)
    for t, frame in enumerate(frames):
        for camera in range(2):
            disc = (x - 0.2 - 0.025 * t) ** 2 + (y - 0.4 - 0.1 * camera) ** 2 < 0.02
            frame[:, camera * size : (camera + 1) * size] = np.where(disc[..., None], (200, 40, 40), (180, 185, 190))
    frames += rng.integers(0, 8, frames.shape, np.uint8)
    return Recording(EpisodeResult(1_000_000 + index, index % 2 == 1, success, not success, 24, task), frames)


def norms(flow: float, flow_joint: float, fast: float, fast_joint: float) -> dict[str, dict[str, float]]:
    """A row of a certificate's table, as its file has it."""
    return {"flow": {"insulated": flow, "joint": flow_joint}, "fast": {"insulated": fast, "joint": fast_joint}}


def full(recordings: int = 6, **changes: Any) -> Report:
    """A report with every part, in the numbers of a middling run."""
    shown = tuple(recording(i, i % 3 != 2) for i in range(recordings))
    rng = np.random.default_rng(0)
    rows = [(i, s) for i in range(100) for s in (False, True)]
    won = rng.random(200) < 0.8
    episodes = tuple(
        EpisodeResult(
            1_000_000 + i, s, bool(w), not w and bool(i % 2), 31 if w else 100, "put the red block in the blue bowl"
        )
        for (i, s), w in zip(rows, won, strict=True)
    )
    loop = ClosedLoop(episodes, {"p50": 6.1, "p90": 6.9, "p99": 9.4}, 2, 61.0)
    steps = range(20, 3001, 20)
    training = [{"step": s, "flow": 0.1 + 20 / s, "fast": 1 + 90 / s, "token_accuracy": 1 - 9 / (s + 9)} for s in steps]
    held = [{"step": t["step"]} | {f"held_out/{k}": 0.9 * v for k, v in t.items()} for t in training[24::25]]
    kinds = ("block", "bowl", "colors", "count", "gripper", "holding", "side")
    known = {
        "before": {"accuracy": dict.fromkeys(kinds, 0.97), "location_error": 1.2, "answered": 1600},
        "after": {"accuracy": dict.fromkeys(kinds, 0.88) | {"count": 0.99}, "location_error": 2.9, "answered": 1600},
    }
    parts = ("vision", "embedding", "backbone layer 0", "final norm", "expert")
    gradient = {part: norms(0.0, 0.31, 1.25, 1.25) for part in parts} | {"expert": norms(0.6, 0.6, 0.0, 0.0)}
    report = Report(
        closed_loop=loop.to_json(),
        recordings=shown,
        metrics=(*training, *held),
        knowledge=known,
        insulation={"outcome": "holds", "findings": [], "table": gradient},
        fast={"tokens per chunk, mean": 11.25, "tokens per chunk, longest": 22, "reconstruction error, RMS": 0.0123},
        demonstrations=1500,
        seconds={"collect": 62.0, "train": 841.0, "closed_loop": 61.0},
        settings={"model": {"name": "tiny", "cameras": ["front", "wrist"]}, "steps": 3000, "tensorboard": None},
        seed=0,
        machine="A processor, 2 cores, Linux",
        versions=versions(),
    )
    return dataclasses.replace(report, **changes)


class Reader(html.parser.HTMLParser):
    """Checks that tags nest; keeps the words, the tags and their links."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.words, self.seen, self.links, self.ids = "", list[str](), list[str](), list[str]()
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(name)
        self.links += [v or "" for k, v in attributes if k in ("src", "srcset", "href", "xlink:href", "action")]
        self.ids += [v or "" for k, v in attributes if k == "id"]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += data


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(full())


def test_everything_is_on_the_page(page: str) -> None:
    words = Reader(page).words
    for expected in (
        "All 1,500 demonstrations come from a scripted expert in a simulated tabletop",
        "14.0 min",
        "Insulation holds",
        "0 exactly",
        "tokens per chunk, mean",
        "p99 9.4 ms",
        "model.cameras",
        "Token accuracy",
        "held-out",
        "not chosen",
        "88\u202f%",
        "-9.0",
        "backbone layer 0",
        "jaxlib",
    ):
        assert expected in words, expected
    assert words.count("✓ success") >= 4 and words.count("✗ failure") >= 2
    assert "not measured" not in words


def test_it_is_one_offline_file(page: str, tmp_path) -> None:
    reader = Reader(page)
    assert "script" not in reader.seen and "link" not in reader.seen and "iframe" not in reader.seen
    assert reader.links and all(link.startswith(("data:image/", "#")) for link in reader.links)
    assert not re.search(r"(?:url\(|@import\s+)['\"]?(?!#)", page)
    outside = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all(link.startswith("http://www.w3.org/") for link in outside)  # names of SVG, nothing to fetch
    path = write_report(tmp_path / "new" / "report.html", full(recordings=0))
    assert path.is_file() and [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_it_stays_small_whatever_is_recorded() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (101, 224, 448, 3), np.uint8)  # nothing compresses worse
    worst = tuple(dataclasses.replace(recording(i, True), frames=noise) for i in range(30))
    big = render_report(dataclasses.replace(full(0), recordings=worst))
    assert len(big.encode()) < 4_000_000
    assert "The first 8 episodes as they came, not chosen, of 30 that were recorded" in Reader(big).words


def test_light_dark_and_phone(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert not any(color in page for color in charts.THEME)  # every line of the charts follows the theme
    assert "var(--held)" in page and "prefers-reduced-motion" in page


def test_ids_are_unique(page: str) -> None:
    ids = Reader(page).ids
    assert ids and len(ids) == len(set(ids))


def test_nothing_measured_is_said_so() -> None:
    words = Reader(render_report(Report())).words
    assert words.count("not measured") >= 6 + 6  # cards and sections
    assert not re.search(r"\d\s?%", words)


def test_without_swapped_instructions() -> None:
    loop = dict(full(0).closed_loop or {}) | {"swapped_success": None, "swapped_wrong_object": None}
    assert Reader(render_report(full(0, closed_loop=loop))).words.count("not measured") >= 3


def test_all_text_is_escaped() -> None:
    report = full(
        recordings=0,
        title=EVIL,
        machine=EVIL,
        fast={EVIL: EVIL},
        settings={EVIL: {EVIL: EVIL}},
        versions={EVIL: EVIL},
        insulation={
            "outcome": "leaks",
            "findings": [EVIL],
            "table": {EVIL: norms(1.0, 1.0, 1.0, 1.0)},
        },
    )
    report = dataclasses.replace(report, recordings=(recording(0, True, task=EVIL),))
    page = render_report(report)
    assert "<script" not in page and page.count("&lt;script&gt;") >= 9
    reader = Reader(page)
    assert "script" not in reader.seen and reader.words.count(EVIL) >= 8


@pytest.mark.parametrize("outcome", ["leaks", "vacuous", "not finite"])
def test_a_failed_proof_is_not_dressed_up(outcome: str) -> None:
    proof = dict(full(0).insulation or {}) | {"outcome": outcome, "findings": ["flow reaches vision, norm 3"]}
    page = render_report(full(0, insulation=proof))
    words = Reader(page).words
    assert "Insulation holds" not in words and "flow reaches vision, norm 3" in words
    assert f'<b class="bad">{outcome}</b>' in page


def test_the_columns_of_a_proof_are_named(page: str) -> None:
    words = Reader(page).words
    for title in ("flow loss", "flow loss, not insulated", "token loss", "token loss, not insulated"):
        assert title in words
    assert norms(0, 0, 0, 0).keys() == set(LossName) and norms(0, 0, 0, 0)["flow"].keys() <= set(Scheme)


def test_a_checkpoint_without_a_certificate_is_said_so(tmp_path) -> None:
    missing = stored_certificate(tmp_path / "certificate.json")
    page = render_report(full(0, insulation=missing))
    words = Reader(page).words
    assert "Not certified" in words and "Insulation holds" not in words and "gradient norm on" not in words
    assert f'<b class="bad">{Outcome.MISSING}</b>' in page and "insula inspect --run RUN" in words


def test_pictures_read_back() -> None:
    shown = recording(0, True)

    def load(uri: str) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))

    frames = load(charts.key_frames(shown.frames))
    assert frames.size == (6 * 64, 2 * 64)
    picture = np.asarray(frames)
    assert np.array_equal(picture[:64, -64:], shown.frames[-1, :, :64])  # the last frame of the front camera
    assert np.array_equal(picture[64:, :64], shown.frames[0, :, 64:])  # the first of the wrist camera
    assert load(charts.animation(shown.frames)).n_frames == len(shown.frames)
    assert load(charts.key_frames(shown.frames[:1])).size == (64, 128)


def test_curves_take_what_is_a_number() -> None:
    rows = [{"step": 1, "flow": 2.0}, {"step": 2, "flow": "nan"}, {"step": 3, "flow": math.inf}, {"step": 4}]
    assert charts.curve(rows, "flow") == ([1.0], [2.0])
    assert charts.loss_chart("Flow loss", ([], []), ([], [])) is None
    assert charts.loss_chart("Flow loss", ([1.0], [2.0]), ([], [])) is not None


def test_metrics_are_read_and_a_broken_line_is_named(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20, "flow": 1.5}\n{"step": 40, "flow": "nan"}\n')
    assert read_metrics(path)[0] == {"step": 20, "flow": 1.5}
    path.write_text('{"step": 20}\n{"step": ')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not JSON"):
        read_metrics(path)


def test_html_escapes_what_is_not_html() -> None:
    assert as_html(["<", Html("<b>"), None, 3]) == "&lt;<b>3"
    assert tag("p", "a & b", class_="x", title='"', id=None) == '<p class="x" title="&quot;">a &amp; b</p>'
    assert tag("img", src="y") == '<img src="y">'


def test_machine_and_versions() -> None:
    assert "cores" in machine()
    assert {"python", "jax", "mujoco"} <= versions().keys()
