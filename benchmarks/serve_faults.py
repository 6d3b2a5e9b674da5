"""A policy server that is killed, and a network that misbehaves: what a well-behaved robot notices of it.

python benchmarks/serve_faults.py --only kill       kill -9 in mid-request, twenty times, under a robot's loop
python benchmarks/serve_faults.py --only network    a hundred bad clients, and 200 that say hello byte by byte

The policy takes 50 ms. Exit code 1 where a promise is broken: an action older than its bound, a robot that comes back
later than two seconds after its server, a 99th percentile more than doubled, a task or descriptor that stays.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from serve import HOST, Stub, wait_until_ready

from insula.client import Client, Loop, RuntimeConfig
from insula.client.protocol import pack
from insula.ports import listen
from insula.serve.guard import make_guard
from insula.serve.server import PolicyServer

HZ, MAX_AGE_S = 50.0, 0.5
PICTURES = {"front": np.zeros((64, 64, 3), np.uint8), "wrist": np.zeros((64, 64, 3), np.uint8)}
OBSERVATION = {"images": PICTURES, "state": np.zeros(5, np.float32), "task": "put it away"}
SLOW_HELLOS = 200
REQUESTS = 200


class Echo(Stub):
    """Chunks of 40 steps, each of which says which step it was predicted at."""

    def answer(self, requests: Any, size: int) -> list[Any]:
        """Also says that a request is under way, to whoever wants to kill it there."""
        time.sleep(self.seconds)
        return [np.full((40, 7), request.observation["state"][0], np.float32) for request in requests]


def start(port: int, seconds: float = 0.05) -> int:
    """A server in a process of its own; returns its process number. SIGUSR1 makes it say how many tasks it has."""
    child = os.fork()
    if child:
        wait_until_ready(port)
        return child

    listening = listen(HOST, port)
    server = PolicyServer(lambda: Echo(seconds), make_guard(HOST, None), (1, 2, 4, 8), max_wait=0.005)

    async def run() -> None:
        count = lambda: os.write(TASKS[1], b"%d\n" % len(asyncio.all_tasks()))  # noqa: E731
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, count)
        await server.run(listening)

    asyncio.run(run())
    os._exit(0)


TASKS = os.pipe()


# --- kill -9 ---------------------------------------------------------------------------------------------------------


class Arm:
    """Notes when it was told something, and how old that was, in steps."""

    def __init__(self) -> None:
        self.step = -1
        self.told: list[tuple[float, int]] = []
        self.held = 0
        self.began = time.monotonic()

    def observe(self) -> dict[str, Any]:
        """Its state is the step by the clock."""
        self.step = int((time.monotonic() - self.began) * HZ)
        return OBSERVATION | {"state": np.full(5, self.step, np.float32)}

    def act(self, action: np.ndarray) -> None:
        """The action says where it came from."""
        self.told.append((time.monotonic(), int((time.monotonic() - self.began) * HZ) - int(action[0])))

    def hold(self) -> None:
        """Counted."""
        self.held += 1


def kill(times: int) -> bool:
    """Whether every promise was kept."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    server, arm, stop = start(port), Arm(), threading.Event()
    loop = Loop(
        Client(f"ws://{HOST}:{port}", timeout=2.0), arm, "put it away", RuntimeConfig(hz=HZ, max_age_s=MAX_AGE_S)
    )
    robot = threading.Thread(target=lambda: loop.run(should_stop=stop.is_set))
    robot.start()
    time.sleep(2)

    back, silent = [], []
    rng = np.random.default_rng(0)
    for _ in range(times):
        time.sleep(rng.uniform(0.5, 1.0))  # anywhere in a request, which takes 50 ms of each 55 or so
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        killed = time.monotonic()

        time.sleep(rng.uniform(MAX_AGE_S, 3.0))
        silent.append(max((at for at, _ in arm.told), default=0.0) - killed)
        server = start(port)
        returned = time.monotonic()
        while arm.told[-1][0] < returned:
            time.sleep(0.002)
        back.append(arm.told[-1][0] - returned)

    stop.set()
    robot.join()
    os.kill(server, signal.SIGTERM)
    os.waitpid(server, 0)

    oldest = max(age for _, age in arm.told) / HZ
    print(
        f"killed {times} times: acting again {max(back):.2f} s after the server at the latest (median "
        f"{np.median(back):.2f}); the last action {max(silent):.2f} s after the kill; oldest action executed "
        f"{oldest:.2f} s, bound {MAX_AGE_S} s; {len(arm.told)} actions, {arm.held} steps held"
    )
    return max(back) < 2 and oldest <= MAX_AGE_S + 1 / HZ and max(silent) <= MAX_AGE_S + 1 / HZ


# --- the network -----------------------------------------------------------------------------------------------------

HELLO = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
REQUEST = pack(OBSERVATION)


def frame(payload: bytes) -> bytes:
    """A masked binary frame of a client; the mask is zeros."""
    return b"\x82\xff" + len(payload).to_bytes(8, "big") + bytes(4) + payload


def shaken(port: int) -> socket.socket:
    """A raw connection that said hello."""
    raw = socket.create_connection((HOST, port))
    raw.sendall(HELLO)
    raw.recv(65536)
    return raw


def delayed(port: int, seconds: float) -> None:
    """A request that comes in pieces."""
    with shaken(port) as raw:
        whole = frame(REQUEST)
        pieces = 10
        for i in range(pieces):
            raw.sendall(whole[i * len(whole) // pieces : (i + 1) * len(whole) // pieces])
            time.sleep(seconds / pieces)


def half_open(port: int, seconds: float) -> None:
    """Its cable is pulled: nothing comes any more, not even an end."""
    with shaken(port) as raw:
        raw.sendall(frame(REQUEST))
        time.sleep(seconds)


def cut(port: int, seconds: float) -> None:
    """Gone in the middle of a frame, without a good-bye."""
    raw = shaken(port)
    raw.sendall(frame(REQUEST)[:5000])
    time.sleep(seconds / 10)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    raw.close()


def slow_reader(port: int, seconds: float) -> None:
    """Asks and asks, and never reads an answer."""
    with shaken(port) as raw:
        raw.settimeout(seconds)
        with contextlib.suppress(OSError):
            for _ in range(200):
                raw.sendall(frame(REQUEST))


def noise(port: int, seconds: float) -> None:
    """Bytes that are no frames."""
    with shaken(port) as raw, contextlib.suppress(OSError):
        raw.sendall(os.urandom(4096))
        time.sleep(seconds / 10)


FAULTS: tuple[Callable[[int, float], None], ...] = (delayed, half_open, cut, slow_reader, noise)


@contextlib.contextmanager
def slow_hellos(port: int) -> Iterator[None]:
    """Slow loris: a byte a second each, as long as the server lets them."""
    raws = [socket.create_connection((HOST, port)) for _ in range(SLOW_HELLOS)]
    stop = threading.Event()

    def drip() -> None:
        for i in range(len(HELLO) - 4):
            for raw in raws:
                with contextlib.suppress(OSError):
                    raw.sendall(HELLO[i : i + 1])
            if stop.wait(1.0):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        yield
    finally:
        stop.set()
        dripping.join()
        for raw in raws:
            raw.close()


def percentile(port: int) -> tuple[float, float]:
    """(p50, p99) of a well-behaved robot's round trips, in ms."""
    with Client(f"ws://{HOST}:{port}") as client:
        times = [client.infer(OBSERVATION).round_trip_ms for _ in range(REQUESTS)]
    p50, p99 = np.percentile(times[10:], (50, 99))
    return float(p50), float(p99)


def tasks_and_descriptors(server: int) -> tuple[int, int]:
    """Of the server's process."""
    os.kill(server, signal.SIGUSR1)
    return int(os.read(TASKS[0], 100)), len(os.listdir(f"/proc/{server}/fd"))


def network(faults: int, rounds: int) -> bool:
    """Whether every promise was kept."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    server = start(port)
    percentile(port)
    before = tasks_and_descriptors(server)

    ratios = []
    for number in range(rounds):
        quiet = percentile(port)
        with slow_hellos(port):
            bad = [threading.Thread(target=FAULTS[i % len(FAULTS)], args=(port, 3.0)) for i in range(faults // rounds)]
            for thread in bad:
                thread.start()
            busy = percentile(port)
            for thread in bad:
                thread.join()
        ratios.append(busy[1] / quiet[1])
        print(
            f"round {number + 1}: p50 {quiet[0]:.1f} ms, p99 {quiet[1]:.1f} alone; {busy[0]:.1f} and {busy[1]:.1f} "
            f"beside {len(bad)} faults and {SLOW_HELLOS} slow hellos ({busy[1] / quiet[1]:.2f} times)",
            flush=True,
        )

    for _ in range(600):  # pings notice a half-open connection within 40 s
        after = tasks_and_descriptors(server)
        if after[0] <= before[0] and after[1] <= before[1]:
            break
        time.sleep(0.1)
    print(f"tasks and descriptors: {before} before, {after} after; p99 {max(ratios):.2f} times at most")
    os.kill(server, signal.SIGTERM)
    os.waitpid(server, 0)
    return max(ratios) < 2 and after <= before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("kill", "network"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=100)
    given = parser.parse_args()

    kept = True
    if given.only != "network":
        kept &= kill(given.kills)
    if given.only != "kill":
        kept &= network(given.faults, rounds=4)
    sys.exit(not kept)


if __name__ == "__main__":
    main()
