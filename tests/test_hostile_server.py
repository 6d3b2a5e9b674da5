"""A server that lies, or misbehaves: the robot holds, says why, and executes nothing that was not meant for it."""

import base64
import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import OBSERVATION, Scripted, serving
from websockets.sync.server import ServerConnection, serve

from insula.cli import execute
from insula.client import Client, Loop, Recorder, RuntimeConfig, Stitching, Summary
from insula.client.connection import read_reply
from insula.client.protocol import pack, unpack
from insula.errors import InputError, ProtocolError, ServerError

TOLD = {"server": "insula", "robot": "arm", "cameras": ["front", "wrist"], "image_size": 8}
TOLD |= {"state_dim": 2, "action_dim": 3, "horizon": 4, "rtc_max_delay": None}


@contextlib.contextmanager
def lying(talk: Callable[[ServerConnection], None], told: Any = TOLD) -> Iterator[str]:
    """A server that says `told`, and then talks as it is told."""

    over = threading.Event()

    def handle(connection: ServerConnection) -> None:
        connection.over = over
        with contextlib.suppress(Exception):
            if told is not None:
                connection.send(pack(told))
            talk(connection)

    with serve(handle, "127.0.0.1", 0, max_size=None, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        over.set()
        server.shutdown()


def replies(*chunks: Any) -> Callable[[ServerConnection], None]:
    """One after another, and again."""

    def talk(connection: ServerConnection) -> None:
        number = 0
        while True:
            connection.recv()
            connection.send(pack({"actions": chunks[number % len(chunks)]}))
            number += 1

    return talk


class Arm:
    """Remembers all it was told; None is holding."""

    def __init__(self, picture: int = 8) -> None:
        self.told: list[np.ndarray | None] = []
        self.images = dict.fromkeys(("front", "wrist"), np.zeros((picture, picture, 3), np.uint8))

    def observe(self) -> dict[str, Any]:
        return {"images": self.images, "state": OBSERVATION["state"]}

    def act(self, action: np.ndarray) -> None:
        self.told.append(action)

    def hold(self) -> None:
        self.told.append(None)


def drive(
    url: str, steps: int = 20, arm: Arm | None = None, key: str | None = None, **settings: Any
) -> tuple[Arm, Summary]:
    arm = arm or Arm()
    loop = Loop(Client(url, key, timeout=1.0), arm, "go", RuntimeConfig(hz=50.0, **settings))
    return arm, loop.run(steps)


def executed(arm: Arm) -> list[np.ndarray]:
    return [action for action in arm.told if action is not None]


GOOD = np.ones((8, 3), np.float32)


def test_the_control_a_good_server_is_followed() -> None:
    with lying(replies(GOOD)) as url:
        arm, summary = drive(url)
    assert len(executed(arm)) > 10 and summary.refused == 0


def test_a_server_that_stops_reading_cannot_keep_the_robot_from_holding() -> None:
    """A picture too large for the buffers on the way: sending blocks. The loop ends, and its last word is to hold."""

    def talk(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(pack({"actions": np.ones((100, 3), np.float32)}))
        connection.over.wait(20)

    arm = Arm(picture=1100)
    with lying(talk) as url:
        started = time.monotonic()
        drive(url, steps=30, arm=arm, max_age_s=0.2)
        assert time.monotonic() - started < 10
    assert arm.told[-1] is None
    assert 0 < len(executed(arm)) <= 11  # as old as they may be


def test_a_send_that_blocks_ends_in_time() -> None:
    """Nobody reads at the other end, and nothing is ever acknowledged."""

    stop = threading.Event()
    huge = {"images": {str(i): np.zeros((1100, 1100, 3), np.uint8) for i in range(30)}}
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=shake_hands_and_stop, args=(listening, stop), daemon=True).start()
        client = Client(f"ws://127.0.0.1:{listening.getsockname()[1]}", timeout=1.0)
        client.connect()
        with pytest.raises(ServerError, match="connection lost"):
            client.infer(huge)
        stop.set()


def shake_hands_and_stop(listening: socket.socket, stop: threading.Event) -> None:
    """By hand: the library would read on."""
    raw, _ = listening.accept()
    hello = raw.recv(65536).decode()
    key = next(line.split(": ")[1] for line in hello.split("\r\n") if line.lower().startswith("sec-websocket-key"))
    accept = base64.b64encode(hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
    lines = (
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {accept}",
    )
    told = pack(TOLD)
    assert len(told) < 65536
    raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + b"\x82\x7e" + len(told).to_bytes(2, "big") + told)
    stop.wait(30)
    raw.close()


@pytest.mark.parametrize(
    "chunk",
    [
        np.ones((8, 9), np.float32),
        np.ones((8, 0), np.float32),
        np.full((8, 3), 1e308),
        np.full((8, 3), np.nan),
        np.ones((8, 3), np.int32),
        np.ones((2, 8, 3), np.float32),
        np.ones((0, 3), np.float32),
        [[1.0, 2.0, 3.0]],
        "forward",
    ],
    ids=str,
)
def test_what_are_no_actions_of_this_robot_is_not_executed(chunk: Any) -> None:
    with lying(replies(chunk)) as url, pytest.raises(ProtocolError, match="actions"):
        drive(url)  # of the first observation: every other one would be refused, too

    arm = Arm()
    with lying(replies(GOOD, chunk)) as url:
        _, summary = drive(url, arm=arm)
    assert summary.refused > 0
    assert all(action.shape == (3,) and (action == 1).all() for action in executed(arm))


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"subtask": "lift it", "subtask_age": 2}, ("lift it", 2)),
        ({"subtask": "a\n\x1b[2J" + "b" * 9000, "subtask_age": -1}, ("a  [2J" + "b" * 1994, None)),
        ({"subtask": ["lift"], "subtask_age": True}, (None, None)),
        ({"subtask": None, "subtask_age": "old"}, (None, None)),
        ({}, (None, None)),
    ],
    ids=str,
)
def test_a_subtask_is_a_line_of_text_or_none(said: dict[str, Any], read: tuple[str | None, int | None]) -> None:
    reply = read_reply({"actions": GOOD} | said, 1.0)
    assert (reply.subtask, reply.subtask_age) == read


@pytest.mark.parametrize("stitching", list(Stitching))
def test_other_widths_one_after_another_crash_nothing(stitching: Stitching) -> None:
    told = {name: value for name, value in TOLD.items() if name != "action_dim"}
    arm = Arm()
    with lying(replies(GOOD, np.ones((8, 4), np.float32)), told) as url:
        _, summary = drive(url, arm=arm, stitching=stitching)
    assert summary.refused > 0 and {action.shape for action in executed(arm)} == {(3,)}


def test_replies_that_nobody_asked_for_are_not_taken_for_new_ones() -> None:
    """Three hundred chunks for the first observation, and never a word again."""

    def talk(connection: ServerConnection) -> None:
        connection.recv()
        for _ in range(300):
            connection.send(pack({"actions": GOOD}))
        connection.over.wait(20)

    with lying(talk) as url:
        arm, summary = drive(url, steps=60, max_age_s=0.1)
    assert summary.replies <= 5 and summary.lost >= 1
    assert len(executed(arm)) < 40

    with lying(talk) as url, Client(url) as client:
        client.infer(OBSERVATION)
        time.sleep(0.2)
        with pytest.raises(ServerError, match="nobody asked for"):
            client.infer(OBSERVATION)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"rtc_max_delay": value} for value in ("3", [1], {}, -1, 1.5, True, np.ones(3))),
        *({"image_size": value} for value in ("x", -1, 10**9)),
        *({"cameras": value} for value in (5, "front", [1], ["x"] * 100)),
        {"action_dim": "3"},
    ],
    ids=str,
)
def test_metadata_that_are_none(wrong: dict[str, Any]) -> None:
    with lying(replies(GOOD), TOLD | wrong) as url:
        with pytest.raises(ProtocolError, match=next(iter(wrong))):
            Client(url).connect()
        with pytest.raises(ProtocolError, match=next(iter(wrong))):
            drive(url, stitching=Stitching.RTC)


def test_a_wrong_key_ends_the_loop_with_the_reason(tmp_path: Path) -> None:
    arm = Arm()
    with (
        serving(Scripted(), key="a-key-of-tests-0123456789") as url,
        pytest.raises(ProtocolError, match="an API key is needed"),
        Recorder(tmp_path / "log") as recorder,
    ):
        Loop(Client(url, "another-key"), arm, "go", RuntimeConfig(hz=50.0), recorder).run(500)
    assert set(arm.told) == {None}
    rows = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()]
    assert any("an API key is needed" in row.get("error", "") for row in rows)


def test_a_server_that_is_not_there_is_said_once(tmp_path: Path) -> None:
    """Rather than in every step, or never."""
    with Recorder(tmp_path / "log") as recorder:
        summary = Loop(Client("ws://127.0.0.1:1"), Arm(), "go", RuntimeConfig(hz=50.0), recorder).run(150)
    rows = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()]
    assert summary.held == summary.steps
    assert 1 <= len([row for row in rows if "cannot be reached" in row.get("error", "")]) <= 2


def test_what_a_server_says_cannot_steer_a_terminal() -> None:
    bad = json.dumps({"error": "invalid", "field": "\x1b[2J", "message": "\x1b]0;owned\x07 \ud800 " + "x" * 10_000})

    def talk(connection: ServerConnection) -> None:
        while True:
            connection.recv()
            connection.send(bad)

    with lying(talk) as url, Client(url) as client, pytest.raises(ProtocolError) as caught:
        client.infer(OBSERVATION)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 3000 and "owned" in said
    said.encode("utf-8")


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000",
        "foo",
        "ws://127.0.0.1:99999",
        "ws://127.0.0.1:abc",
        "ws://[::1",
        "ws://",
        "ws://127.0.0.1:1",
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_an_address_that_is_none_is_one_line(url: str, command: str, capsys: pytest.CaptureFixture) -> None:
    words = ["evaluate", "--server", url] if command == "evaluate" else ["bench-serve", url, "--seconds", "0.1"]
    assert execute(words) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "bug" not in said and len(said.strip().splitlines()) == 1, said


def test_a_benchmark_of_a_silent_server_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("insula.serve.bench.REPLY_S", 0.5)
    for told in (None, TOLD):
        with lying(lambda connection: connection.over.wait(20), told) as url:
            assert execute(["bench-serve", url, "--robots", "1", "--seconds", "0.1"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_benchmark_says_why_requests_were_refused(capsys: pytest.CaptureFixture) -> None:
    with serving(Scripted(metadata=TOLD)) as url:
        words = ["bench-serve", url, "--robots", "1", "--seconds", "0.3"]
        assert execute([*words, "--task", "x" * 9000]) == 1
        assert "the first:" in capsys.readouterr().out
        assert execute(words) == 0  # the control

        pipe = Path(os.path.realpath("/tmp")) / f"pipe-{os.getpid()}.json"
        os.mkfifo(pipe)
        try:
            assert execute([*words, "--json", str(pipe)]) == 1
            assert "is no file" in capsys.readouterr().err
        finally:
            pipe.unlink()


@pytest.mark.parametrize("wrong", [{"cameras": 5}, {"image_size": 4000}, {"state_dim": "x"}])
def test_a_benchmark_of_a_server_that_lies(wrong: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    with lying(replies(GOOD), TOLD | wrong) as url:
        assert execute(["bench-serve", url, "--robots", "1", "--seconds", "0.1"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and next(iter(wrong)).split("_")[0] in said.replace("pixels", "image"), said


def test_replies_without_times_are_replies(capsys: pytest.CaptureFixture) -> None:
    """As other servers of this protocol send them."""
    with lying(replies(GOOD)) as url:
        assert execute(["bench-serve", url, "--robots", "1", "--seconds", "0.3"]) == 0
        reply = Client(url).infer(OBSERVATION)
    assert (reply.infer_ms, reply.server_ms) == (None, None)
    assert unpack(pack({"actions": GOOD}))["actions"].shape == GOOD.shape


def test_a_certificate_that_is_none(tmp_path: Path) -> None:
    with pytest.raises((InputError, ServerError)):
        Client("wss://127.0.0.1:1", certificate=str(tmp_path / "none.pem")).connect()
