"""A server's three modes, with sockets: what is acted on, what is said beside it, and what is refused."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_server import OBSERVATION, Live, Scripted, get, live, small_policy
from test_serve_faults import CHUNK, cut, number_of, observation, robot, until
from websockets.sync.client import ClientConnection

from insula.client import Client, Loop, Recorder, RuntimeConfig
from insula.client.protocol import pack, unpack
from insula.client.record import LOG_FILE
from insula.errors import DecodeError, InputError, InsulaError, ProtocolError
from insula.evaluate.command import EvaluateConfig, load_policy
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.evaluate.served import ServedPolicy
from insula.policy import Policy
from insula.policy.modes import Mode, SubtaskPolicy, TokenPolicy
from insula.report.replay import read_log, render_replay
from insula.serve.config import ServeConfig
from insula.serve.observations import Request
from insula.serve.policy_backend import PolicyBackend, describe
from insula.serve.worded import BACKENDS, SubtaskBackend, TokenBackend

SEED = [7, 0]
NEVER = 1e6
"""Seconds: what was said is not said again."""
KNOWN = ("go left", "go right", "lift")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return small_policy(tmp_path_factory.mktemp("modes"))


def speaking(policy: Policy) -> SubtaskBackend:
    """Random weights never come to an end by themselves: theirs is the likeliest of three."""
    backend = SubtaskBackend(policy, "small", "none")
    backend.speaker.words = backend.speaker.choose_from(KNOWN)
    return backend


# --- the modes -------------------------------------------------------------------------------------------------------


def test_flow_is_what_it_was(policy: Policy) -> None:
    """To the bit, on the wire: it tells of no mode, reads no subtask, and has no other words in its replies. The
    controls are the other two modes."""
    expected = policy.act(OBSERVATION, seed=SEED)
    request = OBSERVATION | {"seed": SEED, "subtask": "go left"}
    metadata, replies = {}, {}
    for mode, backend in BACKENDS.items():
        made = speaking(policy) if backend is SubtaskBackend else backend(policy, "small", "none")
        with live(made) as running, robot(running.url) as connection, Client(running.url) as client:
            metadata[mode] = pack(client.metadata)
            connection.send(pack(request))
            replies[mode] = unpack(connection.recv(timeout=60.0))
            assert str(mode) in get(running.http)[1]

    assert metadata[Mode.FLOW] == pack(describe(policy))
    assert list(replies[Mode.FLOW]) == ["actions", "policy_timing", "server_timing"]
    assert replies[Mode.FLOW]["actions"].tobytes() == expected.tobytes()
    for other in (Mode.TOKENS, Mode.SUBTASK):
        assert metadata[other] != metadata[Mode.FLOW]
        assert np.abs(replies[other]["actions"] - expected).max() > 1e-3


def test_tokens_are_those_of_the_policy_itself(policy: Policy) -> None:
    expected = TokenPolicy(policy).act(OBSERVATION)
    with (
        live(TokenBackend(policy, "small", "none"), sizes=(1, 2)) as running,
        Client(running.url, timeout=60.0) as client,
    ):
        reply = client.infer(OBSERVATION)
        np.testing.assert_array_equal(reply.actions, expected)
        assert (reply.subtask, reply.subtask_age, client.metadata["mode"]) == (None, None, "tokens")

        previous = {"actions": np.zeros((2, 3), np.float32), "delay": 1}
        with pytest.raises(ProtocolError, match="cannot go on from the last one") as caught:
            client.infer(OBSERVATION | {"previous": previous})
        assert (caught.value.kind, caught.value.field) == ("invalid", "previous")
        assert client.metadata["rtc_max_delay"] == 0  # so that a robot's loop does not ask for it


def undecoded(policy: Policy) -> TokenBackend:
    """Anything may be said, and random weights say no chunk."""
    backend = TokenBackend(policy, "small", "none")
    backend.actor = TokenPolicy(policy, bound=False)
    return backend


class Still:
    """A robot that sees one thing, and counts."""

    def __init__(self) -> None:
        self.acted = self.held = 0

    def observe(self) -> dict[str, Any]:
        return {"images": OBSERVATION["images"], "state": OBSERVATION["state"]}

    def act(self, action: np.ndarray) -> None:
        self.acted += 1

    def hold(self) -> None:
        self.held += 1


@pytest.mark.parametrize("mode", [Mode.TOKENS, Mode.SUBTASK])
def test_what_was_never_said_is_refused_by_kind_and_the_robot_holds(policy: Policy, mode: Mode) -> None:
    """From its first observation on, and asks again: other pictures may have other words. The control moves."""
    backend = undecoded(policy) if mode is Mode.TOKENS else SubtaskBackend(policy, "small", "none")
    with live(backend) as running:
        with Client(running.url, timeout=60.0) as client, pytest.raises(ProtocolError, match=r"no chunk|end") as caught:
            client.infer(OBSERVATION)
        assert caught.value.kind == "undecoded"

        held = Still()
        loop = Loop(Client(running.url), held, "put it there", RuntimeConfig(hz=50))
        summary = loop.run(steps=2000, should_stop=lambda: loop._refused > 2)
        assert (held.acted, summary.replies, summary.lost) == (0, 0, 0) and held.held > summary.refused > 2

    good = speaking(policy) if mode is Mode.SUBTASK else TokenBackend(policy, "small", "none")
    with live(good) as running:
        moving = Still()
        loop = Loop(Client(running.url), moving, "put it there", RuntimeConfig(hz=50))
        assert loop.run(steps=2000, should_stop=lambda: moving.acted > 2).refused == 0 < moving.acted


def test_a_subtask_that_is_told_is_acted_on_as_it_is(policy: Policy) -> None:
    with live(speaking(policy)) as running, Client(running.url, timeout=60.0) as client:
        for told in ("go left", "hold it"):
            reply = client.infer(OBSERVATION | {"subtask": told, "seed": SEED})
            np.testing.assert_array_equal(reply.actions, policy.act(OBSERVATION | {"subtask": told}, seed=SEED))
            assert (reply.subtask, reply.subtask_age) == (told, 0)
        assert np.abs(reply.actions - policy.act(OBSERVATION, seed=SEED)).max() > 1e-3
        assert thoughts(running) == {}

        with pytest.raises(ProtocolError, match="expected a string") as caught:
            client.infer(OBSERVATION | {"subtask": 3})
        assert (caught.value.kind, caught.value.field) == ("invalid", "subtask")


def test_a_seed_says_it_anew_whatever_was_asked_before(policy: Policy) -> None:
    """As in process; and a connection's own subtask is neither used nor changed by it."""
    backend = speaking(policy)
    thinker = SubtaskPolicy(policy, known=KNOWN)
    (expected,) = thinker.act_batch([OBSERVATION], [(*SEED, 0)])
    request = OBSERVATION | {"seed": [*SEED, 0]}
    with live(backend, subtask_every=NEVER) as running, Client(running.url, timeout=60.0) as client:
        first = client.infer(request)
        own = client.infer(OBSERVATION | {"task": "another one"})
        again = client.infer(request)
        until(lambda: thoughts(running)["said"] == 3, "all three were said")
        assert client.infer(OBSERVATION | {"task": "another one"}).subtask_age == 2
    assert own.subtask_age == first.subtask_age == again.subtask_age == 0
    np.testing.assert_array_equal(first.actions, expected)
    np.testing.assert_array_equal(again.actions, expected)


def test_nothing_is_compiled_while_robots_wait(policy: Policy) -> None:
    backend = speaking(policy)
    for size in (1, 2):
        backend.warm(size)
    compiled = backend.speaker._say._cache_size(), policy._chunk._cache_size()
    for number in (1, 2):
        assert len(backend.think([Request(OBSERVATION)] * number, 2)) == number
        backend.answer([Request(OBSERVATION | {"subtask": "lift"})] * number, 2)
    assert (backend.speaker._say._cache_size(), policy._chunk._cache_size()) == compiled
    backend.think([Request(OBSERVATION)] * 3, 3)  # the control
    assert backend.speaker._say._cache_size() == compiled[0] + 1


def test_thoughts_fail_alone(policy: Policy) -> None:
    backend = speaking(policy)
    wrong = OBSERVATION | {"state": np.zeros(9, np.float32)}
    first, second, third = backend.think([Request(wrong), Request(OBSERVATION), Request(wrong)], 4)
    assert second in KNOWN and "2 numbers" in str(first) == str(third)

    backend.speaker.words = backend.speaker.choose_from(["lift it, and " * 6])
    (long,) = backend.think([Request(OBSERVATION)], 1)
    assert isinstance(long, DecodeError) and "leaves no room: the prompt takes" in str(long)


# --- thinking beside acting ------------------------------------------------------------------------------------------


class Thinking(Scripted):
    """Says `word(request)`, once the gate is open; `jobs` are what its thread did, in their order."""

    def __init__(self, word: Callable[[Request], str | InsulaError] | None = None) -> None:
        super().__init__(lambda request: CHUNK * number_of(request))
        self.word = word or (lambda request: f"of {number_of(request):g}")
        self.thought: list[list[float]] = []
        self.jobs: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def answer(self, requests, size):
        self.jobs.append("act")
        return super().answer(requests, size)

    def think(self, requests: Sequence[Request], size: int) -> list[str | InsulaError]:
        self.jobs.append("think")
        self.thought.append([number_of(request) for request in requests])
        self.begun.release()
        assert self.gate.wait(60)
        return [self.word(request) for request in requests]


def thoughts(running: Live) -> dict[str, float]:
    lines = running.server.metrics.text().decode().splitlines()
    found = [line for line in lines if line.startswith("insula_thoughts_total{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in found}


def ask(client: Client, number: float, **more: Any) -> tuple[str | None, int | None]:
    reply = client.infer(observation(number, **more))
    assert reply.actions[0, 0] == number
    return reply.subtask, reply.subtask_age


def told(connection: ClientConnection) -> tuple[float, str, int]:
    reply = unpack(connection.recv(timeout=30))
    return float(reply["actions"][0, 0]), reply["subtask"], reply["subtask_age"]


def test_the_first_waits_and_the_others_act_on_what_was_said_last() -> None:
    backend = Thinking()
    with live(backend, subtask_every=0.0) as running, Client(running.url, timeout=60.0) as client:
        assert ask(client, 1) == ("of 1", 0)
        backend.gate.clear()
        assert ask(client, 2) == ("of 1", 1)  # answered at once: what it made due has only begun
        assert backend.begun.acquire(timeout=30) and backend.begun.acquire(timeout=30)

        backend.gate.set()
        until(lambda: thoughts(running)["said"] == 2, "the second is said")
        assert ask(client, 3) == ("of 2", 1)
    assert all(request.observation["subtask"].startswith("of ") for request in backend.asked)


def test_it_is_said_again_when_its_time_has_come() -> None:
    backend = Thinking()
    with live(backend, subtask_every=0.3) as running, Client(running.url) as client:
        assert [ask(client, number) for number in (1, 2, 3)] == [("of 1", 0), ("of 1", 1), ("of 1", 2)]
        assert backend.thought == [[1.0]]  # the control
        time.sleep(0.35)
        assert ask(client, 4) == ("of 1", 3)
        until(lambda: thoughts(running)["said"] == 2, "it is said again")
        assert ask(client, 5) == ("of 4", 1)
        assert backend.thought == [[1.0], [4.0]]


def test_another_task_is_thought_about_before_it_is_acted_on() -> None:
    backend = Thinking(lambda request: f"{request.observation['task']}, {number_of(request):g}")
    with live(backend, subtask_every=NEVER) as running, Client(running.url) as client:
        assert ask(client, 1, task="cups") == ("cups, 1", 0)
        assert ask(client, 2, task="plates") == ("plates, 2", 0)
        assert ask(client, 3, task="plates") == ("plates, 2", 1)
        assert ask(client, 4, task="plates", subtask="told") == ("told", 0)
        assert ask(client, 5, task="plates") == ("plates, 2", 3)
        assert thoughts(running) == {"said": 2.0, "failed": 0.0}


def test_a_task_that_changes_while_it_thinks_does_not_act_on_the_old_one() -> None:
    backend = Thinking(lambda request: request.observation["task"])
    with live(backend, subtask_every=NEVER) as running, robot(running.url) as connection:
        backend.gate.clear()
        connection.send(pack(observation(1, task="cups")))
        assert backend.begun.acquire(timeout=30)
        connection.send(pack(observation(2, task="plates")))
        connection.send(pack(observation(3, task="bowls")))  # nobody acts on plates any more
        until(lambda: next(iter(running.server.robots.values())).mind.requests == 3, "all three are in line")
        backend.gate.set()
        refusals = [connection.recv(timeout=30) for _ in range(2)]
        assert all("superseded" in one for one in refusals)
        assert told(connection) == (3.0, "bowls", 0)
    assert backend.thought == [[1.0], [3.0]]


def test_what_was_said_of_a_task_that_is_left_again_is_forgotten() -> None:
    """A thought about it was under way, and must not become what the old task is acted on by."""
    backend = Thinking(lambda request: request.observation["task"])
    with live(backend, subtask_every=NEVER) as running, robot(running.url) as connection:
        connection.send(pack(observation(1, task="cups")))
        assert told(connection) == (1.0, "cups", 0) and backend.begun.acquire(timeout=30)
        backend.gate.clear()
        connection.send(pack(observation(2, task="plates")))
        assert backend.begun.acquire(timeout=30)
        connection.send(pack(observation(3, task="cups")))
        assert b"superseded" in connection.recv(timeout=30, decode=False)
        backend.gate.set()
        assert told(connection) == (3.0, "cups", 2)

        connection.send(pack(observation(4, task="plates")))  # the control: one that stays is thought about
        assert told(connection) == (4.0, "plates", 0)
    assert backend.thought == [[1.0], [2.0], [4.0]]


def test_no_action_waits_for_two_batches_of_thoughts() -> None:
    """While one robot is thought for, others come: some must be thought for as well, some know what to do. These are
    all answered before the next thought, and no thought is left out in the end."""
    backend = Thinking()
    with live(backend, subtask_every=NEVER) as running, contextlib.ExitStack() as stack:
        known, new = ([stack.enter_context(robot(running.url)) for _ in range(3)] for _ in range(2))
        for number, connection in enumerate(known):
            connection.send(pack(observation(number)))
            told(connection)

        backend.jobs.clear()
        backend.gate.clear()
        for number, connection in enumerate(new):
            connection.send(pack(observation(10 + number)))
            until(lambda n=number: running.server._batcher._held == n + 1, "it waits")
        for number, connection in enumerate(known):
            connection.send(pack(observation(20 + number)))
            until(lambda n=number: len(running.server._batcher._waiting) == n + 1, "it is in line")
        backend.gate.set()
        answers = [told(connection)[:2] for connection in (*known, *new)]

    assert answers == [(20.0 + n, f"of {n}") for n in range(3)] + [(10.0 + n, f"of {10 + n}") for n in range(3)]
    assert backend.jobs == ["think", *["act"] * 4, "think", "act", "think", "act"]


def test_robots_act_together_each_on_its_own_subtask_and_none_on_another_s() -> None:
    backend = Thinking()
    with live(backend, subtask_every=NEVER, sizes=(1, 2, 4), max_wait=1.0) as running:
        robots = [robot(running.url) for _ in range(3)]
        for number, connection in enumerate(robots):
            connection.send(pack(observation(number)))
        assert [told(connection) for connection in robots] == [(n, f"of {n}", 0) for n in range(3)]

        backend.batches.clear()
        for number, connection in enumerate(robots):
            connection.send(pack(observation(10 + number)))
        assert [told(connection) for connection in robots] == [(10 + n, f"of {n}", 1) for n in range(3)]
        assert backend.batches == [3]
        page = get(running.http)[1]
        assert all(f"of {n} (1)" in page for n in range(3))

        # Its place is taken by another robot, which knows nothing of it.
        robots[0].close()
        until(lambda: len(running.server.robots) == 2, "it is gone")
        assert len(backend.thought) < 4
        with robot(running.url) as new:
            new.send(pack(observation(20)))
            assert told(new) == (20.0, "of 20", 0)
        for connection in robots[1:]:
            connection.close()


def test_who_vanished_is_not_thought_for() -> None:
    backend = Thinking()
    with live(backend, subtask_every=NEVER) as running:
        backend.gate.clear()
        first, second, third = (robot(running.url) for _ in range(3))
        for number, connection in enumerate((first, second, third)):
            connection.send(pack(observation(number)))
            until(lambda n=number: running.server._batcher._held == n + 1, "it waits")
        assert backend.begun.acquire(timeout=30)
        cut(second)
        until(lambda: len(running.server.robots) == 2, "the server noticed")
        backend.gate.set()
        assert [told(connection)[0] for connection in (first, third)] == [0.0, 2.0]
        assert backend.thought == [[0.0], [2.0]]
        first.close()
        third.close()


@pytest.fixture
def failing() -> Iterator[tuple[Thinking, Live]]:
    """Says something of 1 and 5, and nothing that ends of anything else."""

    def word(request: Request) -> str | InsulaError:
        good = number_of(request) in (1, 5)
        return f"of {number_of(request):g}" if good else DecodeError("the subtask did not end within 8 tokens")

    backend = Thinking(word)
    with live(backend, subtask_every=0.0) as running:
        yield backend, running


def test_where_none_ends_the_old_one_goes_on_and_is_counted(failing: tuple[Thinking, Live]) -> None:
    _, running = failing
    with Client(running.url) as client:
        with pytest.raises(ProtocolError, match="did not end within 8 tokens") as caught:
            ask(client, 2)
        assert caught.value.kind == "undecoded"

        assert ask(client, 1) == ("of 1", 0)
        assert ask(client, 3) == ("of 1", 1)
        until(lambda: thoughts(running)["failed"] == 2, "the second failed, too")
        assert ask(client, 4) == ("of 1", 2)
        until(lambda: thoughts(running) == {"said": 1.0, "failed": 3.0}, "and the third")
        assert ask(client, 5) == ("of 1", 3)
        until(lambda: thoughts(running)["said"] == 2, "this one ended")
        assert ask(client, 6) == ("of 5", 1)
        until(lambda: "insula_think_seconds_count 6.0" in get(running.http + "/metrics")[1], "all six are counted")


def test_a_fault_of_ours_while_thinking_says_so_and_nothing_of_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    def word(request: Request) -> str:
        if number_of(request) == 2:
            raise RuntimeError("/home/somebody/policy.py broke")
        return "go"

    with live(Thinking(word), subtask_every=NEVER) as running, Client(running.url) as client:
        with pytest.raises(ProtocolError, match="the policy failed; the server's log says how") as caught:
            ask(client, 2)
        assert (caught.value.kind, "/home" in str(caught.value)) == ("failed", False)
        assert ask(client, 1) == ("go", 0)
    assert "/home/somebody/policy.py broke" in caplog.text


def test_stopping_answers_those_who_wait_for_a_thought() -> None:
    backend = Thinking()
    with live(backend, subtask_every=NEVER) as running, robot(running.url) as connection:
        backend.gate.clear()
        connection.send(pack(observation(1)))
        assert backend.begun.acquire(timeout=30)
        running.loop.call_soon_threadsafe(running.server.stop)
        until(lambda: running.server._batcher._stopping, "it takes nothing new")
        backend.gate.set()
        assert told(connection) == (1.0, "of 1", 0)


@pytest.mark.parametrize("task", [5, None, np.zeros(2, np.float32), [1]])
def test_a_task_that_is_no_text_is_refused_by_name(policy: Policy, task: Any) -> None:
    with live(speaking(policy)) as running, Client(running.url, timeout=60.0) as client:
        for _ in range(2):
            with pytest.raises(ProtocolError) as caught:
                client.infer(OBSERVATION | {"task": task})
            assert (caught.value.kind, caught.value.field) == ("invalid", "task")
        assert client.infer(OBSERVATION).subtask in KNOWN


# --- who asks --------------------------------------------------------------------------------------------------------


def test_the_log_of_a_loop_and_its_page_have_the_subtasks(tmp_path: Path) -> None:
    backend = Thinking(lambda request: "<b>open</b> the drawer")
    with live(backend, subtask_every=NEVER) as running, Recorder(tmp_path) as recorder:
        loop = Loop(Client(running.url), Still(), "tidy up", RuntimeConfig(hz=50), recorder)
        loop.run(steps=2000, should_stop=lambda: loop._replies > 2)

    log = read_log(tmp_path / LOG_FILE)
    assert [row["subtask_age"] for row in log.replies] == list(range(len(log.replies))) and len(log.replies) > 2
    page = render_replay(tmp_path, log)
    assert "What it was to do" in page and "&lt;b&gt;open&lt;/b&gt; the drawer" in page and "<b>open" not in page

    # The control: a server without subtasks.
    with live(Scripted()) as running, Recorder(tmp_path / "flow") as recorder:
        loop = Loop(Client(running.url), Still(), "tidy up", RuntimeConfig(hz=50), recorder)
        loop.run(steps=2000, should_stop=lambda: loop._replies > 0)
    log = read_log(tmp_path / "flow" / LOG_FILE)
    assert log.replies and not any("subtask" in row for row in log.replies)
    assert "What it was to do" not in render_replay(tmp_path, log)


@pytest.mark.parametrize("said", [{"subtask": 3}, {"subtask": "lift", "subtask_age": "old"}])
def test_a_log_whose_subtask_is_none_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    row = '{"step": 2, "of": 0, "chunk": [[1.0]], "round_trip_ms": 20.0, %s}\n'
    (tmp_path / LOG_FILE).write_text(
        row % ", ".join(f'"{name}": {value!r}' for name, value in said.items()).replace("'", '"')
    )
    with pytest.raises(InputError, match="line 1: subtask"):
        read_log(tmp_path / LOG_FILE)


def test_an_evaluation_through_the_wire_is_the_one_in_process(policy: Policy) -> None:
    """In each mode, also where nothing is said: that is counted, and the robot goes on."""
    others = OBSERVATION | {"state": np.array([-0.5, 0.5], np.float32), "task": "lift it"}
    rows, seeds = [OBSERVATION, others], [(7, 0, 0), (8, 1, 0)]
    pairs: list[tuple[PolicyBackend, Any]] = [
        (TokenBackend(policy, "small", "none"), TokenPolicy(policy)),
        (undecoded(policy), TokenPolicy(policy, bound=False)),
        (speaking(policy), SubtaskPolicy(policy, known=KNOWN)),
        (SubtaskBackend(policy, "small", "none"), SubtaskPolicy(policy)),
    ]
    for number, (backend, alone) in enumerate(pairs):
        expected = alone.act_batch(rows, seeds)
        with live(backend) as running, Client(running.url, timeout=60.0) as client:
            served = ServedPolicy(client)
            chunks = served.act_batch(rows, seeds)
            delayed = DelayedPolicy(served, Delay(), 2, np.zeros(3))
            delayed.act_batch(rows, seeds)
        failed = [isinstance(chunk, DecodeError) for chunk in chunks]
        assert failed == [number % 2 == 1] * 2 and sum(delayed.failures.values()) == 2 * (number % 2)
        for chunk, one in zip(chunks, expected, strict=True):
            if isinstance(chunk, DecodeError):
                assert str(chunk) == str(one)
            else:
                np.testing.assert_allclose(chunk, one, atol=2e-5)


def test_only_a_server_that_reads_subtasks_is_told_them(policy: Policy) -> None:
    with live(speaking(policy)) as running:
        assert isinstance(load_policy(EvaluateConfig(server=running.url, told=True)), ServedPolicy)
    with live(PolicyBackend(policy, "small", "none")) as running:
        assert isinstance(load_policy(EvaluateConfig(server=running.url)), ServedPolicy)
        with pytest.raises(InputError, match="reads no subtask; start it with --mode subtask"):
            load_policy(EvaluateConfig(server=running.url, told=True))


def test_settings_that_cannot_be() -> None:
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="subtask_every_s"):
            ServeConfig(Path("run"), mode=Mode.SUBTASK, subtask_every_s=wrong)
    with pytest.raises(InputError, match="is for --mode subtask"):
        ServeConfig(Path("run"), subtask_every_s=0.0)
    assert ServeConfig(Path("run"), mode=Mode.SUBTASK, subtask_every_s=0.0).subtask_every_s == 0
