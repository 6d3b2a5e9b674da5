"""The server's own page, as a real browser shows it."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import browser, needs_chromium
from live_server import OBSERVATION, Live, Scripted, get, live, small_policy
from playwright.sync_api import Browser, Page

from insula.client import Client
from insula.errors import ProtocolError
from insula.serve.policy_backend import PolicyBackend
from insula.serve.status import RELOAD_S

__all__ = ["browser"]

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    policy = small_policy(tmp_path_factory.mktemp("status"))
    with live(PolicyBackend(policy, "<b>my run</b>", "not measured")) as running:
        with Client(running.url, timeout=60.0) as client:
            client.connect()  # the server says hello once it is ready
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Fails where the console holds an error, or anything but the page is fetched."""
    said: list[str] = []
    fetched: list[str] = []
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    yield page
    context.close()
    assert said == []
    assert all(url.endswith("/") or url.startswith("data:") or "favicon" in url for url in fetched), fetched


def table(page: Page, title: str) -> dict[str, list[str]]:
    """Rows of the table below a heading, by their first cell."""
    rows = page.locator(f"h2:text-is('{title}') + .scroll tbody tr")
    cells = [row.locator("th, td").all_inner_texts() for row in rows.all()]
    return {first: rest for first, *rest in cells}


def test_before_anybody_came(running: Live, page: Page) -> None:
    page.goto(running.http)
    assert page.title() == "insula serve"
    assert "is ready" in page.inner_text("main")
    assert "No robot is connected." in page.inner_text("main")

    told = table(page, "Policy")
    assert (told["policy"], told["robot"], told["certificate"]) == (["<b>my run</b>"], ["arm"], ["not measured"])
    assert told["cameras"] == ["front, wrist"] and told["horizon"] == ["4"]


def test_with_robots(running: Live, page: Page) -> None:
    """Who is there, what they were answered, and how fast: what was counted is what is shown."""
    with Client(running.url) as first, Client(running.url) as second:
        for _ in range(5):
            first.infer(OBSERVATION)
        second.infer(OBSERVATION)
        with pytest.raises(ProtocolError):
            second.infer(OBSERVATION | {"state": np.zeros(9, np.float32)})

        page.goto(running.http)
        robots = table(page, "Robots")
        assert sorted(row[1:3] for row in robots.values()) == [["1", "1"], ["5", "0"]]
        assert all(re.fullmatch(r"127\.0\.0\.1:\d+", name) for name in robots)
        assert all(re.fullmatch(r"[\d.]+ ms", row[3]) for row in robots.values())

        assert table(page, "Requests") == {"answered": ["6"], "invalid": ["1"]}
        bars = table(page, "Latency of replies")
        assert sum(int(row[0]) for row in bars.values()) == 6

        # The longest bar is that of the most replies, and none is wider than the page.
        widths = [bar.bounding_box()["width"] for bar in page.locator(".bar").all()]
        counts = [int(row[0]) for row in bars.values()]
        most = counts.index(max(counts))
        assert widths[most] == max(widths) and widths.count(0) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_it_reloads_itself(running: Live, page: Page) -> None:
    page.goto(running.http)
    with page.expect_navigation(timeout=1000 * (RELOAD_S + 20)):
        pass


def test_while_it_is_not_ready(page: Page) -> None:
    """The control of "ready"."""

    class Never(Scripted):
        def warm(self, size):
            time.sleep(3)

    with live(Never()) as running:
        page.goto(running.http)
        assert "is not ready" in page.inner_text("main")


def test_nothing_on_it_may_run(running: Live) -> None:
    status, text = get(running.http)
    assert status == 200 and "default-src 'none'" in text and "<script" not in text


def test_a_file_of_another_name_is_not_there(running: Live, tmp_path: Path) -> None:
    for path in ("/../../etc/passwd", "/%2e%2e/secret", "/index.html"):
        status, text = get(running.http + path)
        assert status == 404 and "no such page" in text
