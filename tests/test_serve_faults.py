"""What can go wrong between robots and a server, and that each of it stays one robot's own trouble."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import HOST, OBSERVATION, Live, Scripted, get, live, small_policy
from test_convert import STATS, folder_of_run
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import insula.serve.policy_backend
from insula.client import Client
from insula.client.protocol import pack, unpack
from insula.errors import InsulaError, NonFiniteError, ObservationError, ProtocolError, ServerError
from insula.evaluate.served import ServedPolicy
from insula.policy import Policy
from insula.serve.observations import Request, read_request
from insula.serve.policy_backend import PolicyBackend

CHUNK = np.ones((4, 3))


def observation(number: float, **more: Any) -> dict[str, Any]:
    """One that can be told from others by its state."""
    return OBSERVATION | {"state": np.array([number, 0], np.float32)} | more


def number_of(request: Request) -> float:
    return float(request.observation["state"][0])


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for it; the time allowed is only there so that a failure ends."""
    for _ in range(2000):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")


class Gated(Scripted):
    """Holds every batch until the gate is open."""

    def __init__(self) -> None:
        super().__init__(lambda request: CHUNK * number_of(request))
        self.gate = threading.Event()

    def answer(self, requests, size):
        answers = super().answer(requests, size)
        assert self.gate.wait(60)
        return answers


@pytest.fixture
def gated() -> Iterator[tuple[Gated, Live]]:
    backend = Gated()
    with live(backend) as running:
        yield backend, running
        backend.gate.set()


def robot(url: str) -> ClientConnection:
    connection = connect(url, max_size=None, compression=None).__enter__()
    connection.recv(timeout=30)
    return connection


def answer_of(connection: ClientConnection) -> Any:
    """The first number of a chunk, or the kind of a refusal."""
    reply = connection.recv(timeout=30)
    return json.loads(reply)["error"] if isinstance(reply, str) else float(unpack(reply)["actions"][0, 0])


def dropped(running: Live) -> dict[str, float]:
    """Requests that nobody waited for any more, by where they were."""
    lines = running.server.metrics.text().decode().splitlines()
    found = [line for line in lines if line.startswith("insula_dropped_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}


# --- batches ---------------------------------------------------------------------------------------------------------


def ask_together(url: str, observations: list[dict[str, Any]]) -> list[Any]:
    """As many robots at once: a chunk, or an error."""

    def ask(number: int) -> Any:
        with Client(url) as client:
            client.connect()
            ready.wait(30)
            try:
                return client.infer(observations[number]).actions
            except ProtocolError as error:
                return error

    ready = threading.Barrier(len(observations))
    with ThreadPoolExecutor(len(observations)) as pool:
        return list(pool.map(ask, range(len(observations))))


def test_robots_are_answered_by_one_call_each_with_its_own() -> None:
    backend = Scripted(lambda request: CHUNK * number_of(request))
    with live(backend, sizes=(1, 2, 4), max_wait=1.0) as running:
        answers = ask_together(running.url, [observation(n) for n in (1, 2, 3, 4)])
    assert [chunk[0, 0] for chunk in answers] == [1, 2, 3, 4]
    assert backend.batches == [4]


def test_one_bad_request_fails_alone() -> None:
    def script(request: Request):
        wrong = ObservationError("state: wrong in some way", "state")
        return wrong if number_of(request) == 2 else CHUNK * number_of(request)

    backend = Scripted(script)
    with live(backend, sizes=(1, 2, 4), max_wait=1.0) as running:
        first, second, third = ask_together(running.url, [observation(n) for n in (1, 2, 3)])
    assert backend.batches == [3]
    assert (first[0, 0], third[0, 0]) == (1, 3)
    assert (second.kind, second.field) == ("invalid", "state")


def test_a_policy_that_breaks_says_so_without_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    def script(request: Request):
        if number_of(request) == 2:
            raise RuntimeError("/home/somebody/policy.py broke")
        return CHUNK

    with live(Scripted(script)) as running, Client(running.url) as client:
        with pytest.raises(ProtocolError, match="the policy failed; the server's log says how") as caught:
            client.infer(observation(2))
        assert "/home" not in str(caught.value)
        assert client.infer(observation(1)).actions.shape == (4, 3)
    assert "/home/somebody/policy.py broke" in caplog.text


def test_actions_that_are_not_finite_are_an_error_and_never_zeros() -> None:
    with live(Scripted(lambda request: NonFiniteError("NaN"))) as running, Client(running.url) as client:
        with pytest.raises(ProtocolError, match="not finite") as caught:
            client.infer(observation(1))
        assert (caught.value.kind, caught.value.field) == ("failed", "actions")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return small_policy(tmp_path_factory.mktemp("faults"))


def test_a_row_of_a_batch_is_the_row_alone(policy: Policy) -> None:
    """In float32, to its rounding; and filling a batch changes nothing at all."""
    backend = PolicyBackend(policy, "small", "none")
    rng = np.random.default_rng(0)
    requests = []
    for number in range(4):
        images = {name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in ("front", "wrist")}
        message = {"images": images, "state": rng.normal(size=2), "task": "put it away", "seed": [number, 5]}
        requests.append(read_request(unpack(pack(message)), {}))

    together = backend.answer(requests, 4)
    alone = [backend.answer([request], 1)[0] for request in requests]
    np.testing.assert_allclose(together, alone, atol=2e-5)
    np.testing.assert_array_equal(backend.answer(requests[:3], 4), together[:3])

    # The control: rows and seeds do matter.
    assert np.abs(np.subtract(together[0], together[1])).max() > 0.01


def test_evaluated_through_the_wire_it_acts_as_in_process(policy: Policy) -> None:
    """The same noise for the same scene and step; rows that fill a batch are asked for once."""
    backend = PolicyBackend(policy, "small", "none")
    seeds = [(7, False, 0), (8, True, 2), (7, False, 0)]
    with live(backend) as running, Client(running.url) as client:
        served = ServedPolicy(client).act_batch([OBSERVATION] * 3, seeds)
        until(lambda: running.count("answered") == 2, "both are counted")
    np.testing.assert_allclose(served, policy.act_batch([OBSERVATION] * 3, seeds), atol=2e-5)
    assert np.abs(served[0] - served[1]).max() > 0.01


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"images": OBSERVATION["images"] | {"front": [[1], [1, 2]]}}, "images.front"),
        ({"state": np.array([np.inf, 0], np.float32)}, "state"),
        ({"previous": {"actions": [[1.0], [1.0, 2.0]], "delay": 0}}, "previous.actions"),
    ],
)
def test_what_no_array_can_hold_is_refused_by_name(policy: Policy, wrong: dict[str, Any], field: str) -> None:
    with live(PolicyBackend(policy, "small", "none")) as running, Client(running.url, timeout=60.0) as client:
        with pytest.raises(ProtocolError) as caught:
            client.infer(OBSERVATION | wrong)
        assert (caught.value.kind, caught.value.field) == ("invalid", field)
        assert client.infer(OBSERVATION).actions.shape == (4, 3)


def test_a_fault_of_ours_in_one_row_is_that_row_s_alone(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = PolicyBackend(policy, "small", "none")
    good = read_request(unpack(pack(OBSERVATION)), {})
    bad = read_request(unpack(pack(OBSERVATION | {"task": "break it"})), {})

    check = insula.serve.policy_backend.check_raw

    def broken(observation: Any, robot: Any) -> None:
        if observation["task"] == "break it":
            raise ZeroDivisionError("ours")
        check(observation, robot)

    monkeypatch.setattr("insula.serve.policy_backend.check_raw", broken)
    first, second = backend.answer([bad, good], 2)
    assert isinstance(first, InsulaError) and "ours" not in str(first)
    assert isinstance(second, np.ndarray) and second.shape == (4, 3)


# --- dropped, and counted --------------------------------------------------------------------------------------------


def test_a_newer_observation_takes_the_place_of_one_that_waits(gated: tuple[Gated, Live]) -> None:
    backend, running = gated
    connection = robot(running.url)
    connection.send(pack(observation(1)))
    until(lambda: len(backend.asked) == 1, "the first is worked on")
    connection.send(pack(observation(2)))
    connection.send(pack(observation(3)))
    until(lambda: len(running.server._batcher._waiting) == 2, "both others are in line")
    backend.gate.set()

    assert [answer_of(connection) for _ in range(3)] == [1.0, "superseded", 3.0]
    assert [number_of(request) for request in backend.asked] == [1, 3]
    connection.close()


def test_an_observation_that_became_stale_in_line_is_not_worked_on(gated: tuple[Gated, Live]) -> None:
    backend, running = gated
    first, second, third = (robot(running.url) for _ in range(3))
    first.send(pack(observation(1)))
    until(lambda: len(backend.asked) == 1, "the first is worked on")
    second.send(pack(observation(2, max_age_ms=20)))
    third.send(pack(observation(3, max_age_ms=600_000)))  # the control
    until(lambda: len(running.server._batcher._waiting) == 2, "both others are in line")
    time.sleep(0.05)
    backend.gate.set()

    assert [answer_of(connection) for connection in (first, second, third)] == [1.0, "stale", 3.0]
    assert [number_of(request) for request in backend.asked] == [1, 3]
    for connection in (first, second, third):
        connection.close()


def test_who_vanished_in_line_is_not_worked_for(gated: tuple[Gated, Live]) -> None:
    backend, running = gated
    first, second = robot(running.url), robot(running.url)
    first.send(pack(observation(1)))
    until(lambda: len(backend.asked) == 1, "the first is worked on")
    second.send(pack(observation(2)))
    until(lambda: len(running.server._batcher._waiting) == 1, "the second is in line")
    cut(second)
    until(lambda: dropped(running).get("waiting") == 1, "the server noticed")
    backend.gate.set()

    assert answer_of(first) == 1.0
    assert [number_of(request) for request in backend.asked] == [1]
    first.close()


def test_who_vanished_while_its_chunk_is_made_is_counted(gated: tuple[Gated, Live]) -> None:
    backend, running = gated
    first = robot(running.url)
    first.send(pack(observation(1)))
    until(lambda: len(backend.asked) == 1, "it is worked on")
    cut(first)
    until(lambda: not running.server.robots, "the server noticed")
    backend.gate.set()
    until(lambda: dropped(running).get("running") == 1, "it is counted")

    with Client(running.url) as client:  # and the next robot is served
        assert client.infer(observation(2)).actions[0, 0] == 2


def cut(connection: ClientConnection) -> None:
    """As when a robot loses its power: no closing handshake, and the socket is reset."""
    linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.socket.shutdown(socket.SHUT_RDWR)
    connection.recv_events_thread.join(30)  # which closes it; from here it would wait for the next ping to notice


def test_a_flood_is_refused_and_not_kept() -> None:
    backend = Gated()
    with live(backend, max_connections=1) as running:
        connection = robot(running.url)
        connection.send(pack(observation(1)))
        until(lambda: len(backend.asked) == 1, "the first is worked on")
        for number in range(2, 5):
            connection.send(pack(observation(number)))
        until(lambda: len(running.server._batcher._waiting) == 2, "two are in line")
        time.sleep(0.1)
        backend.gate.set()

        answers = [answer_of(connection) for _ in range(4)]
        assert answers[0] == 1.0 and "overloaded" in answers, answers
        connection.close()


# --- connections -----------------------------------------------------------------------------------------------------


def test_one_robot_too_many_is_told() -> None:
    with live(Scripted(), max_connections=2) as running:
        robots = [robot(running.url) for _ in range(2)]
        with pytest.raises(InvalidStatus, match="503") as caught:
            robot(running.url)
        assert b"which is the limit" in caught.value.response.body

        robots[0].close()
        until(lambda: len(running.server.robots) == 1, "its place is free")
        robot(running.url).close()
        robots[1].close()


def test_who_says_nothing_is_closed() -> None:
    with live(Scripted(), idle=0.2) as running:
        connection = robot(running.url)
        with pytest.raises(ConnectionClosed, match=r"1000 \(OK\) no request for 0.2 s"):
            connection.recv(timeout=30)


def test_not_ready_until_all_is_compiled() -> None:
    """Alive, and a robot that came too early waits for the metadata."""
    warm = threading.Event()

    class Slow(Scripted):
        def warm(self, size):
            assert warm.wait(60)

    with live(Slow(), sizes=(1, 2)) as running:
        assert get(running.http + "/healthz") == (200, "OK\n")
        assert get(running.http + "/readyz") == (503, "not ready\n")
        assert "not ready" in get(running.http)[1]
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(robot, running.url)
            time.sleep(0.1)
            assert not early.done()
            warm.set()
            early.result(30).close()
        assert get(running.http + "/readyz") == (200, "ready\n")


def test_healthy_while_the_policy_is_busy(gated: tuple[Gated, Live]) -> None:
    backend, running = gated
    connection = robot(running.url)
    connection.send(pack(observation(1)))
    until(lambda: len(backend.asked) == 1, "it is worked on")
    assert get(running.http + "/healthz") == (200, "OK\n")
    assert "insula_connections 1.0" in get(running.http + "/metrics")[1]
    backend.gate.set()
    assert answer_of(connection) == 1.0
    connection.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here to count descriptors in")
def test_nothing_is_left_of_those_who_went_badly() -> None:
    """Half a handshake, a reset in mid-request, half a frame, bytes that are no HTTP. Neither a task nor a descriptor
    of the server stays, and a robot beside them is answered all the while."""
    with live(Scripted()) as running:
        port = running.port
        good = robot(running.url)
        before = running.tasks(), descriptors()

        for _ in range(10):
            for bad in (reset_in_request, slow_reader, half_a_handshake, half_a_frame, no_http):
                bad(running.url, port)
                good.send(pack(observation(1)))
                assert unpack(good.recv(timeout=30))["actions"].shape == (4, 3)

        until(lambda: running.tasks() <= before[0] and descriptors() <= before[1], "tasks and descriptors are back")
        until(lambda: next(iter(running.server.robots.values())).answered == 50, "all its requests are counted")
        good.close()


def test_who_does_not_read_is_given_up_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replies fill every buffer on the way. Neither the task that writes to it stays, nor the one that reads."""
    monkeypatch.setattr("insula.serve.server.SEND_S", 0.2)
    large = np.zeros((1000, 1000))
    with live(Scripted(lambda request: large)) as running:
        until(lambda: running.server.is_ready, "it is ready")
        before = running.tasks()
        with socket.create_connection((HOST, running.port)) as raw:
            raw.sendall(HELLO)
            raw.recv(65536)
            payload = pack(observation(1))
            raw.sendall((b"\x82\xff" + len(payload).to_bytes(8, "big") + bytes(4) + payload) * 12)
            until(lambda: len(running.server.robots) == 1, "it is connected")
            until(lambda: not running.server.robots, "it is given up")
            until(lambda: running.tasks() <= before, "its tasks are gone")


def test_who_pings_and_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library answers pings without waiting for anybody to read the answers: nothing else would end this one."""
    monkeypatch.setattr("insula.serve.server.MOST_UNREAD", 100_000)
    ping = b"\x89\xfd" + bytes(4) + b"x" * 125
    with live(Scripted()) as running, socket.create_connection((HOST, running.port)) as raw:
        raw.sendall(HELLO)
        raw.recv(65536)
        raw.settimeout(30)
        with pytest.raises(OSError, match=r"reset|[Bb]roken"):
            while True:
                raw.sendall(ping * 1000)
        until(lambda: not running.server.robots, "it is given up")

        # The control: one that reads its answers stays.
        with connect(running.url) as good:
            good.recv(timeout=10)
            for _ in range(50):
                assert good.ping().wait(10)
            assert len(running.server.robots) == 1


def test_those_at_their_handshake_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("insula.serve.server.SPARE_SOCKETS", 8)
    with live(Scripted(), max_connections=2) as running:
        until(lambda: running.server.is_ready, "it is ready")
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection((HOST, running.port)))
            until(lambda: len(running.server._sockets) == 10, "the limit")
        until(lambda: not running.server._sockets, "their places are free")
        robot(running.url).close()


HELLO = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def reset_in_request(url: str, port: int) -> None:
    connection = robot(url)
    connection.send(pack(observation(2)))
    cut(connection)


def slow_reader(url: str, port: int) -> None:
    """More requests than there are places for replies, and gone without having read one."""
    connection = robot(url)
    for number in range(10):
        connection.send(pack(observation(number)))
    cut(connection)


def half_a_handshake(url: str, port: int) -> None:
    with socket.create_connection((HOST, port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: webso")


def half_a_frame(url: str, port: int) -> None:
    connection = robot(url)
    connection.socket.sendall(b"\x82\xfe\xff\xff1234half of what was announced")
    cut(connection)


def no_http(url: str, port: int) -> None:
    with socket.create_connection((HOST, port)) as raw:
        raw.sendall(b"\x16\x03\x01\x02\x00\x01" * 100)


def test_stopping_answers_what_is_in_line_and_takes_nothing_new(gated: tuple[Gated, Live]) -> None:
    """What SIGTERM does."""
    backend, running = gated
    first, second = robot(running.url), robot(running.url)
    first.send(pack(observation(1)))
    until(lambda: len(backend.asked) == 1, "the first is worked on")
    second.send(pack(observation(2)))
    until(lambda: len(running.server._batcher._waiting) == 1, "the second is in line")

    running.loop.call_soon_threadsafe(running.server.stop)
    until(lambda: not running.server.is_ready, "it stops")
    until(lambda: running.server._batcher._stopping, "it takes nothing new")
    first.send(pack(observation(3)))
    with pytest.raises(OSError):
        connect(running.url)
    backend.gate.set()

    assert [answer_of(first), answer_of(first), answer_of(second)] == [1.0, "stopping", 2.0]
    for connection in (first, second):
        with pytest.raises(ConnectionClosed, match="1001"):
            connection.recv(timeout=30)


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """`insula serve` of a small run, and where it listens."""
    run = folder_of_run(tmp_path / "run", STATS)
    command = [sys.executable, "-m", "insula", "serve", str(run), "--port", "0", "--max-batch", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        url = child.stdout.readline().split()[0]
        yield child, url
    finally:
        child.kill()
        child.communicate()


def test_sigterm_exits_with_0(served: tuple[subprocess.Popen, str]) -> None:
    child, url = served
    with Client(url, timeout=120.0) as client:
        client.wait(120.0)
        assert get(url.replace("ws", "http") + "/readyz")[0] == 200
        assert client.infer(OBSERVATION).actions.shape == (4, 3)

        child.send_signal(signal.SIGTERM)
        with pytest.raises(ServerError, match="1001"):
            while True:
                client.infer(OBSERVATION)

    said, complained = child.communicate(timeout=30)
    assert (child.returncode, said.splitlines()[-1]) == (0, "stopped")
    assert "Traceback" not in complained


def test_after_a_kill_nothing_answers_there(served: tuple[subprocess.Popen, str]) -> None:
    """The control of the test above."""
    child, url = served
    child.kill()
    assert child.wait(30) == -signal.SIGKILL
    with pytest.raises(urllib.error.URLError):
        get(url.replace("ws", "http") + "/healthz")
