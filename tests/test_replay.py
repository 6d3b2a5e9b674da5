"""The page of a robot's log: what it says is what was logged, whatever is in there."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import OBSERVATION, Scripted, serving

from insula.cli import execute
from insula.client import Client, Loop, Recorder, RuntimeConfig
from insula.client.record import LOG_FILE, Tick
from insula.errors import FileError, InputError, MissingFileError
from insula.report.replay import read_log, render_replay

STEP = {"step": 0, "time": 0.0, "state": [0.5], "action": [1.0, 2.0], "origin": 0, "connected": True}
REPLY = {"step": 2, "of": 0, "chunk": [[1.0, 2.0]], "round_trip_ms": 20.0, "infer_ms": 10.0, "server_ms": 12.0}


def write(folder: Path, *rows: Any, end: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / LOG_FILE).write_text("\n".join(lines) + end)
    return folder / LOG_FILE


class Still:
    """A robot that sees one thing and does not move."""

    def observe(self) -> dict[str, Any]:
        return {"images": OBSERVATION["images"], "state": OBSERVATION["state"]}

    def act(self, action: np.ndarray) -> None:
        """Nothing moves."""

    def hold(self) -> None:
        """Nor now."""


def test_a_log_of_the_loop_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "log"
    with serving(Scripted()) as url, Recorder(folder, every=5) as recorder:
        summary = Loop(Client(url), Still(), "go", RuntimeConfig(hz=50.0), recorder).run(steps=60)

    log = read_log(folder / LOG_FILE)
    assert len(log.steps) == summary.steps
    assert sum(row["action"] is None for row in log.steps) == summary.held
    assert 0 <= summary.replies - len(log.replies) <= 1

    assert execute(["replay", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "replay.html")
    page = (folder / "replay.html").read_text()
    assert f"{summary.steps:,} in " in page and "Replies, milliseconds" in page
    assert page.count("data:image/png") >= 2 and "<h3>wrist</h3>" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_figures(tmp_path: Path) -> None:
    """Ten steps at 10 Hz, of which two are missing and three held."""
    steps = [
        STEP | {"step": i, "time": i / 10, "action": None if i < 3 else [1.0, 2.0], "origin": None if i < 3 else i - 2}
        for i in (0, 1, 2, 3, 4, 7, 8, 9)
    ]
    errors = [{"step": 5, "error": "connection lost"}, {"step": 6, "error": "connection lost"}]
    path = write(tmp_path, *steps, REPLY, REPLY | {"step": 4, "of": 2, "round_trip_ms": 40.0}, *errors)

    page = render_replay(tmp_path, read_log(path))
    for said in ("8 in 0.9 s", "3 (37.5%)", "all within 40 ms", "all within 2 steps", "connection lost</th><td>2"):
        assert said in page, said
    assert "left out, too late</th><td>2</td>" in page


def test_text_of_others_does_not_run(tmp_path: Path) -> None:
    page = render_replay(tmp_path, read_log(write(tmp_path, STEP, {"step": 1, "error": "<script>alert(1)</script>"})))
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_log_that_ends_in_the_middle_of_a_row(tmp_path: Path) -> None:
    log = read_log(write(tmp_path, STEP, '{"step": 1, "ti', end=""))
    assert log.torn and len(log.steps) == 1
    assert "was not finished" in render_replay(tmp_path, log)
    assert "was not finished" not in render_replay(tmp_path, read_log(write(tmp_path, STEP)))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{half", "line 2 is no JSON"),
        ("[1]", "line 2: \\[1\\], expected a JSON object"),
        (STEP | {"time": "now"}, "line 2: time is 'now'"),
        (STEP | {"time": float("nan")}, "line 2: time is nan"),
        (STEP | {"state": ["a"]}, "line 2: state is no list of numbers"),
        (REPLY | {"of": None}, "line 2: of is None"),
        (STEP | {"step": 10**400}, "line 2: step is 1000"),
        (STEP | {"state": [1.7e308]}, "line 2: state is no list"),
        (STEP | {"origin": "0"}, "line 2: origin is '0'"),
        (REPLY | {"infer_ms": []}, r"line 2: infer_ms is \[\]"),
    ],
)
def test_a_row_that_is_not_of_such_a_log(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_log(write(tmp_path, STEP, row))


def test_pictures_are_pictures_of_this_log(tmp_path: Path) -> None:
    """The page is handed on: what a link leads to is not put into it, nor what is no picture."""
    path, pictures = write(tmp_path, STEP), tmp_path / "pictures"
    pictures.mkdir()
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    (pictures / "000000_front.png").symlink_to(tmp_path / "secret.png")
    assert "data:image/png" not in render_replay(tmp_path, read_log(path))

    (pictures / "000001_front.png").write_bytes(b"root:x:0:0")
    with pytest.raises(InputError, match="no PNG"):
        render_replay(tmp_path, read_log(path))


def test_a_page_is_not_written_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, STEP)
    os.mkfifo(tmp_path / "page.html")
    assert execute(["replay", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 1
    assert "is no file" in capsys.readouterr().err


def test_an_empty_log_and_none(tmp_path: Path) -> None:
    assert "nothing was logged" in render_replay(tmp_path, read_log(write(tmp_path, end="")))
    with pytest.raises(MissingFileError, match="no such file"):
        read_log(tmp_path / "nowhere" / LOG_FILE)


def test_a_log_of_days_is_thinned_out(tmp_path: Path) -> None:
    steps = [STEP | {"step": i, "time": i / 10} for i in range(20_000)]
    assert len(render_replay(tmp_path, read_log(write(tmp_path, *steps)))) < 2_000_000


def test_a_picture_that_cannot_be_kept_stops_no_robot(tmp_path: Path) -> None:
    """It is a row of the log, and the next camera's is kept, under a name that leads nowhere else."""
    images = {"depth": np.zeros((4, 4), np.float32), "../wrist/left": np.zeros((4, 4, 3), np.uint8)}
    with Recorder(tmp_path / "log", every=1) as recorder:
        recorder.step(Tick(0, 0.0, {"state": np.zeros(2), "images": images}, None, None, True))

    log = read_log(tmp_path / "log" / LOG_FILE)
    assert [row["error"] for row in log.errors] == [
        "images.depth: float32[4, 4] is not kept, expected uint8[height, width, 3]"
    ]
    (kept,) = tmp_path.rglob("*.png")
    assert kept == tmp_path / "log" / "pictures" / "000000_.._wrist_left.png"


def test_a_log_is_not_written_over(tmp_path: Path) -> None:
    with Recorder(tmp_path / "log"):
        pass
    with pytest.raises(FileError, match="is there already"):
        Recorder(tmp_path / "log")
