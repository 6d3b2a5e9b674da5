"""The page of `insula inspect` in a real browser: what is drawn is what the model has, cell by cell."""

import contextlib
import dataclasses
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from chromium import browser, needs_chromium
from mixtures import SMALL, record, write_mixture
from playwright.sync_api import Browser, Page, expect
from starlette.applications import Starlette
from subtask_files import STEPS, subtask_inspector

from insula.data.config import DataConfig
from insula.errors import FileError, InputError
from insula.inspection.config import InspectConfig
from insula.inspection.findings import Findings, Inspector
from insula.inspection.sample_page import render_sample
from insula.inspection.sample_server import HOST, make_app
from insula.inspection.subject import open_subject
from insula.inspection.token_columns import ColumnKind
from insula.inspection.variants import IS_ON, REASONS, Cell, draw_variants, model_mask
from insula.page import write_page
from insula.ports import listen

__all__ = ["browser"]

pytestmark = needs_chromium
MASKS = ("token_mask", "ar_mask", "loss_mask", "visible")


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    data = write_mixture(tmp_path_factory.mktemp("mixture")) / "data.toml"
    subject = open_subject(InspectConfig(data=data, model=SMALL))
    return Inspector(dataclasses.replace(subject, trained=True))


@pytest.fixture(scope="module")
def found(inspector: Inspector) -> Findings:
    return inspector.look(3, "arm")


@pytest.fixture(scope="module")
def file(found: Findings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "inspect.html", render_sample(found))


@pytest.fixture
def show(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page and waits until it is drawn. Fails where the console holds an error or anything is fetched."""
    said: list[str] = []
    opened: list[Any] = []

    def open_page(url: str, **settings: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if _is_ours(request.url, url) else said.append(request.url))
        page.goto(url)
        page.wait_for_selector("#matrix[data-scale]")
        return page

    yield open_page
    for context in opened:
        context.close()
    assert said == []


def _is_ours(asked: str, page: str) -> bool:
    return asked.startswith(("data:", "blob:")) or asked.split("?")[0] == page.split("?")[0]


@contextlib.contextmanager
def serving(app: Starlette) -> Iterator[str]:
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    listening = socket.create_server((HOST, 0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://{HOST}:{listening.getsockname()[1]}/"
    finally:
        running.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture
def server(inspector: Inspector) -> Iterator[str]:
    with serving(make_app(inspector, "arm", 3)) as address:
        yield address


def drawn_mask(page: Page) -> np.ndarray:
    """What the canvas shows: True where the middle of a cell is painted through and through."""
    size, alpha = page.evaluate(
        """() => {
          const canvas = document.getElementById("matrix");
          const { scale, left, top, size } = canvas.dataset;
          const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const at = (first, n) => Math.floor(Number(first) + (n + 0.5) * Number(scale));
          const alpha = [];
          for (let q = 0; q < size; q += 1)
            for (let k = 0; k < size; k += 1) alpha.push(data[4 * (at(top, q) * width + at(left, k)) + 3]);
          return [Number(size), alpha];
        }"""
    )
    return np.array(alpha).reshape(size, size) == 255


def choose(page: Page, variant: str) -> None:
    page.locator(f"input[name=variant][value='{variant}']").check()
    page.wait_for_selector(f'#matrix[data-variant="{variant}"]')


def hover_cell(page: Page, query: int, key: int) -> str:
    canvas = page.locator("#matrix")
    canvas.scroll_into_view_if_needed()
    place = canvas.evaluate("(node) => ({...node.dataset})")
    scale, left, top, ratio = (float(place[name]) for name in ("scale", "left", "top", "ratio"))
    canvas.hover(position={"x": (left + (key + 0.5) * scale) / ratio, "y": (top + (query + 0.5) * scale) / ratio})
    return page.locator("#cell-readout").inner_text()


def test_the_masks_drawn_are_the_models_cell_by_cell(show: Callable[..., Page], file: Path, found: Findings) -> None:
    page, seen, config = show(file.as_uri()), found.seen, found.subject.assets.config
    ours = model_mask(config, seen.token_mask, seen.ar_mask, config.horizon)
    assert ours.any() and not ours.all()
    expect(page.get_by_label("insulated (this model)", exact=True)).to_be_checked()
    assert np.array_equal(drawn_mask(page), ours)
    for variant in draw_variants(config, seen.token_mask, seen.ar_mask, config.horizon):
        choose(page, variant.name)
        expect(page.locator("#variant-about")).to_have_text(variant.about)
        assert np.array_equal(drawn_mask(page), IS_ON[variant.cells]), variant.name
    assert not np.array_equal(drawn_mask(page), ours)  # the last one is leaky


def test_the_four_masks_of_every_token(show: Callable[..., Page], file: Path, found: Findings) -> None:
    page, seen, first = show(file.as_uri()), found.seen, found.subject.assets.config.num_image_tokens
    shown = page.locator(".token").evaluate_all(
        """(tokens) => tokens.map((token) => [Number(token.dataset.column), token.querySelector("small").textContent,
          ...[...token.querySelectorAll("i")].map((mask) => mask.className === "on")])"""
    )
    assert [row[0] for row in shown] == list(range(first, len(seen.id)))
    assert [int(row[1]) for row in shown] == seen.id[first:].tolist()
    for n, name in enumerate(MASKS, start=2):
        assert [row[n] for row in shown] == getattr(seen, name)[first:].tolist(), name


def test_hovering_says_why(show: Callable[..., Page], file: Path, found: Findings) -> None:
    page, seen = show(file.as_uri()), found.seen
    why = {cell: reason.why for cell, reason in REASONS.items()}
    fast, expert = int(seen.where(ColumnKind.FAST)[0]), len(seen.id)
    assert hover_cell(page, 0, 1).endswith(f"on, {why[Cell.BLOCK]}")
    assert hover_cell(page, 0, fast).endswith(f"off, {why[Cell.BLIND]}")
    assert hover_cell(page, fast, fast + 1).endswith(f"off, {why[Cell.FUTURE]}")
    assert hover_cell(page, expert, 0).endswith(f"on, {why[Cell.INSULATED]}")
    hidden = hover_cell(page, expert, fast)
    assert hidden.startswith("action 0 → column") and hidden.endswith(f"off, {why[Cell.HIDDEN]}")
    choose(page, "leaky")
    assert hover_cell(page, expert, fast).endswith(f"on, LEAK: {why[Cell.ANSWER]}")
    expect(page.locator("#cell-readout")).to_have_class(re.compile("bad"))


def test_a_token_tells_its_coefficients(show: Callable[..., Page], file: Path, found: Findings) -> None:
    page, seen = show(file.as_uri()), found.seen
    column = int(seen.where(ColumnKind.FAST)[0])
    page.locator(f'[data-column="{column}"]').hover()
    readout = page.locator("#token-readout")
    expect(readout).to_contain_text(f"column {column}")
    expect(readout).to_contain_text(re.compile(r"Carries \d+ DCT coefficients: frequency 0 of action\[0\]: -?\d+"))
    assert page.locator("#coefficients td.marked").count() > 0
    page.locator(f'[data-column="{int(seen.where(ColumnKind.BOS)[0])}"]').hover()
    expect(readout).to_contain_text("“<bos>” (BOS)")
    assert page.locator("#coefficients td.marked").count() == 0


def test_it_is_walked_with_the_keyboard(show: Callable[..., Page], file: Path, found: Findings) -> None:
    page = show(file.as_uri())
    page.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    first = found.subject.assets.config.num_image_tokens
    expect(page.locator("#token-readout")).to_contain_text(f"column {first + 1}:")
    matrix = page.locator("#matrix")
    matrix.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#cell-readout")).to_contain_text("column 0 (front, patch 0, 0) → column 2 (front, patch 1, 0)")
    before = float(matrix.get_attribute("data-scale") or 0)
    page.keyboard.press("+")
    assert float(matrix.get_attribute("data-scale") or 0) > before
    page.get_by_label("show all of it").click()
    assert float(matrix.get_attribute("data-scale") or 0) == pytest.approx(before)
    page.locator("#look canvas").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#look-readout")).to_contain_text("% of the attention")


def test_what_was_measured_is_shown(show: Callable[..., Page], file: Path, found: Findings) -> None:
    page = show(file.as_uri())
    assert found.proof is not None and found.measured is not None
    expect(page.locator("#verdict")).to_contain_text("Insulation holds")
    rows = page.locator("#gradients-table tbody tr")
    assert rows.count() == len(found.proof.table)
    shown = rows.filter(has_text="vision").inner_text()
    assert shown.split("\t")[1] == "0 exactly" and shown.split("\t")[2] != "0 exactly"
    assert page.locator("#scored tbody tr").count() == int(found.seen.loss_mask.sum())
    assert page.locator("#chunk .uplot").count() == 3
    split = page.locator("#look-split").inner_text()
    shares = [float(share) for share in re.findall(r"([\d.]+) %", split)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    look = np.asarray(found.measured.look)[0, 0].mean(0)
    assert shares[0] == pytest.approx(100 * look[: found.subject.assets.config.num_image_tokens].sum(), abs=0.1)
    page.get_by_label("time").select_option(index=2)
    expect(page.locator("#look-split")).not_to_have_text(split)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 800}, "device_scale_factor": 2, "has_touch": True}),
    ],
)
def test_light_dark_and_phone(
    name: str, settings: dict[str, Any], show: Callable[..., Page], file: Path, found: Findings, tmp_path: Path
) -> None:
    page, seen, config = show(file.as_uri(), **settings), found.seen, found.subject.assets.config
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # only tables scroll sideways
    assert np.array_equal(drawn_mask(page), model_mask(config, seen.token_mask, seen.ar_mask, config.horizon))
    ink, paper = page.evaluate(
        "(({ color, backgroundColor }) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ink, paper)]
    assert (light[0] > light[1]) == (name == "dark")
    page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
    assert (tmp_path / f"{name}.png").stat().st_size > 20_000


def test_the_server_serves_any_sample(show: Callable[..., Page], server: str, found: Findings) -> None:
    page, seen, config = show(server), found.seen, found.subject.assets.config
    assert np.array_equal(drawn_mask(page), model_mask(config, seen.token_mask, seen.ar_mask, config.horizon))
    expect(page.get_by_text("Sample 3 of", exact=False)).to_be_visible()
    page.get_by_role("link", name="next").click()
    page.wait_for_url("**/?source=arm&sample=4")
    page.get_by_label("source").select_option("scenes")
    page.get_by_role("button", name="look").click()
    page.wait_for_url("**/?source=scenes&sample=0")
    page.wait_for_selector("#matrix[data-scale]")
    expect(page.locator("#verdict")).to_contain_text("lacks a loss")
    expect(page.get_by_text("The answer is in words: it has no chunk of actions.")).to_be_visible()
    expect(page.get_by_text("Not measured: this sample has no actions.")).to_be_visible()


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return subtask_inspector(tmp_path_factory.mktemp("frames"), "subtask = 1, actions = 3")


@pytest.fixture(scope="module")
def frame_file(frames: Inspector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("frame") / "inspect.html", render_sample(frames.look(8, "arm:subtask")))


def test_both_sequences_of_a_frame(show: Callable[..., Page], frames: Inspector, frame_file: Path) -> None:
    page, found = show(frame_file.as_uri()), frames.look(8, "arm:subtask")
    frame = page.locator("#frame")
    expect(frame).to_contain_text(
        "task → subtask (arm:subtask, seen here), task + subtask → actions (--source arm:actions"
    )
    images = found.subject.assets.config.num_image_tokens
    for one in found.sequences:
        sequence = page.locator(f'#sequence [data-source="{one.sample.name}"]')
        ids = [int(text) for text in sequence.locator(".token small").all_inner_texts()]
        real = one.seen.token_mask[images:].tolist()
        shown = sequence.locator(".token").evaluate_all(
            "(tokens) => tokens.map((t) => [...t.querySelectorAll('i')].map((mask) => mask.className === 'on'))"
        )
        assert shown == np.stack([getattr(one.seen, name)[images:] for name in MASKS], axis=1).tolist()
        assert [i for i, there in zip(ids, real, strict=False) if there] == one.seen.id[images:][real].tolist()
        losses = page.locator(f'#losses [data-source="{one.sample.name}"]')
        assert losses.locator(".scored tbody tr").count() == int(one.seen.loss_mask.sum())
    names = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(names) == len(set(names)) and "chunk-1" in names  # no name is given twice
    expect(page.locator('#sequence [data-source="arm:subtask"]')).to_contain_text("has no chunk of actions")


def test_the_matrix_of_either_sequence(show: Callable[..., Page], frames: Inspector, frame_file: Path) -> None:
    page, found = show(frame_file.as_uri()), frames.look(8, "arm:subtask")
    drawn = []
    for one in found.sequences:
        page.locator(f"input[name=sequence][value='{one.sample.name}']").check()
        size = len(one.seen.id) + one.expert_positions
        page.wait_for_selector(f'#matrix[data-size="{size}"]')
        drawn.append(drawn_mask(page))
        ours = model_mask(found.subject.assets.config, one.seen.token_mask, one.seen.ar_mask, one.expert_positions)
        assert np.array_equal(drawn[-1], ours)
    assert drawn[0].shape != drawn[1].shape


def test_what_the_backbone_says_is_on_the_page(
    show: Callable[..., Page], frames: Inspector, frame_file: Path, file: Path
) -> None:
    page, found = show(frame_file.as_uri()), frames.look(8, "arm:subtask")
    said, acted = (one.speech for one in found.sequences)
    assert said is not None and acted is not None and acted.bound is not None and acted.free.chunk is not None
    expect(page.locator("#truth")).to_have_text(f"True: “{STEPS[0]}”")
    expect(page.locator("#right")).to_have_class("bad")
    ids = [int(text) for text in page.locator("#free-tokens tbody tr td:nth-child(2)").all_inner_texts()]
    assert ids == said.free.tokens and page.locator("#free-tokens .said").count() <= len(ids)
    assert page.locator("#free-tokens tbody tr").first.locator(".top span").count() == 5
    expect(page.locator("#free-chunk-1")).to_contain_text(f"no chunk, {acted.free.chunk.invalid}")
    expect(page.locator("#bound-chunk-1")).to_contain_text(f"{len(acted.bound.tokens)} tokens, a chunk.")
    page.locator("#speech summary").nth(2).click()
    shown = page.locator("#bound-tokens-1 tbody tr td:nth-child(2)").all_inner_texts()
    assert list(map(int, shown)) == acted.bound.tokens
    assert page.locator("#spoken-1 .uplot").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The control: a page of a robot without subtasks has one sequence, and says an action alone.
    plain = show(file.as_uri())
    assert plain.locator("#frame").count() == plain.locator("article").count() == plain.locator("#truth").count() == 0
    assert plain.locator("#bound-chunk").count() == 1 and plain.locator("input[name=sequence]").count() == 0


def test_the_server_goes_from_one_sequence_to_the_other(show: Callable[..., Page], frames: Inspector) -> None:
    with serving(make_app(frames)) as address:
        page = show(address)
        expect(page.get_by_text("Sample 0 of", exact=False)).to_contain_text("arm:actions")  # has both losses
        page.get_by_label("source").select_option("arm:subtask")
        page.get_by_label("sample", exact=True).fill("9")
        page.get_by_role("button", name="look").click()
        page.wait_for_url("**/?source=arm%3Asubtask&sample=9")
        expect(page.locator("#verdict")).to_contain_text("lacks a loss")
        page.locator("#frame a", has_text="arm:actions").click()
        page.wait_for_url("**/?source=arm%3Aactions&sample=9")
        page.wait_for_selector("#matrix[data-scale]")
        expect(page.locator("#verdict")).to_contain_text("Insulation holds")


def test_a_port_that_cannot_be_used() -> None:
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(FileError, match=rf"port {port} of 127.0.0.1: .*; --port 0 takes a free one"):
            listen(HOST, port)
    for wrong in (-1, 65536):
        with pytest.raises(InputError, match=rf"--port {wrong}: expected 0 to 65535"):
            listen(HOST, wrong)
    listen(HOST, 0).close()  # the control


@pytest.mark.parametrize(
    ("query", "host", "status", "line"),
    [
        ("?sample=9999", None, 404, "insula: sample 9999 of 'arm' does not exist; it has 0 to"),
        ("?sample=two", None, 404, "insula: sample is 'two', expected a whole number"),
        ("?source=amr", None, 404, "insula: no source 'amr' (did you mean 'arm'"),
        ("nowhere", None, 404, "Not Found"),
        ("", "evil.example", 400, "Invalid host header"),
    ],
)
def test_the_server_refuses_in_one_line(server: str, query: str, host: str | None, status: int, line: str) -> None:
    request = urllib.request.Request(server + query, headers={"Host": host} if host else {})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    said = refused.value.read().decode().strip()
    assert refused.value.code == status and said.startswith(line) and "\n" not in said


@pytest.mark.slow  # a table of a quarter of a million words
def test_a_page_of_224_pixels_and_paligemmas_vocabulary(show: Callable[..., Page], tmp_path: Path) -> None:
    record(tmp_path / "data", {"front": 224, "wrist": 224}, state=5, actions=4, seed=0)
    vision = dataclasses.replace(SMALL.vision, image_size=224, patch_sizes=(14,))
    model = dataclasses.replace(SMALL, vision=vision, vocab_size=257_152)
    subject = open_subject(InspectConfig(data=tmp_path / "data", model=model, reading=DataConfig(fast_last_id=257_023)))
    found = Inspector(dataclasses.replace(subject, trained=True)).look(0)
    assert found.outcome == "holds" and max(found.seen.id) > 256_000
    file = write_page(tmp_path / "inspect.html", render_sample(found))
    assert 300_000 < file.stat().st_size < 3_000_000  # pictures of noise: nothing compresses worse
    page = show(file.as_uri())
    seen = found.seen
    ours = model_mask(model, seen.token_mask, seen.ar_mask, model.horizon)
    assert ours.shape == (512 + 60 + 6,) * 2 and np.array_equal(drawn_mask(page), ours)
