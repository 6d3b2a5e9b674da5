"""A policy that takes 50 ms however many it answers: what the server makes of it with 1, 8 and 32 robots.

python benchmarks/serve.py                 throughput and percentiles; /healthz during an inference of 5 s
python benchmarks/serve.py --minutes 10    32 robots for ten minutes, and the server's resident memory
"""

import argparse
import asyncio
import os
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from insula.ports import listen
from insula.serve.backend import Answer
from insula.serve.bench import BenchConfig, measure, summary
from insula.serve.guard import make_guard
from insula.serve.observations import Request
from insula.serve.server import PolicyServer

HOST = "127.0.0.1"


class Stub:
    """Sleeps as a device would compute: without holding the interpreter."""

    def __init__(self, seconds: float) -> None:
        self.metadata: dict[str, Any] = {"cameras": ["front", "wrist"], "image_size": 64, "state_dim": 5}
        self.about: dict[str, Any] = {"policy": "stub"}
        self.seconds = seconds

    def warm(self, size: int) -> None:
        """Nothing to compile."""

    def answer(self, requests: Sequence[Request], size: int) -> list[Answer]:
        """The same time for any size."""
        time.sleep(self.seconds)
        return [np.zeros((6, 7), np.float32)] * len(requests)


@contextmanager
def serving(seconds: float, sizes: tuple[int, ...]) -> Iterator[str]:
    """A server in a process of its own; yields its address. The robots must not share its interpreter."""
    listening = listen(HOST, 0)
    port = listening.getsockname()[1]
    child = os.fork()
    if child == 0:
        server = PolicyServer(lambda: Stub(seconds), make_guard(HOST, None), sizes, max_wait=0.005)
        asyncio.run(server.run(listening))
        os._exit(0)

    listening.close()
    wait_until_ready(port)
    try:
        yield f"ws://{HOST}:{port}"
    finally:
        os.kill(child, 15)
        os.waitpid(child, 0)


def wait_until_ready(port: int) -> None:
    """Poll /readyz."""
    while True:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/readyz").read()
            return
        except OSError:
            time.sleep(0.05)


def throughput() -> None:
    """1, 8 and 32 robots."""
    with serving(0.05, (1, 2, 4, 8, 16, 32)) as url:
        figures = [asyncio.run(measure(BenchConfig(url, seconds=10), robots)) for robots in (1, 8, 32)]

    print(summary(figures))
    one, eight = figures[0], figures[1]
    print(f"8 robots: {eight.per_second / one.per_second:.2f} times the throughput of one, ", end="")
    print(f"p99 {eight.round_trip['p99'] / one.round_trip['p99']:.2f} times a single one's")


def health() -> None:
    """How long /healthz takes while the policy is busy for five seconds."""
    with serving(5.0, (1,)) as url:
        port = int(url.rsplit(":", 1)[1])
        asking = threading.Thread(target=lambda: asyncio.run(measure(BenchConfig(url, seconds=5), 1)))
        asking.start()
        time.sleep(1)

        times = []
        for _ in range(400):
            started = time.perf_counter()
            urllib.request.urlopen(f"http://{HOST}:{port}/healthz").read()
            times.append((time.perf_counter() - started) * 1000)
            time.sleep(0.01)
        asking.join()

    p50, p99 = np.percentile(times, (50, 99))
    print(f"/healthz during an inference of 5 s: p50 {p50:.1f}, p99 {p99:.1f} ms")


def endurance(minutes: float) -> None:
    """Resident memory of the server, after the first tenth of the time and at its end."""
    with serving(0.05, (1, 2, 4, 8, 16, 32)) as url:
        child = children()[0]
        sizes: list[int] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(minutes * 6):
                sizes.append(resident_kib(child))

        watcher = threading.Thread(target=watch)
        watcher.start()
        figures = asyncio.run(measure(BenchConfig(url, seconds=minutes * 60), 32))
        done.set()
        watcher.join()

    print(summary([figures]))
    growth = 100 * (sizes[-1] / sizes[0] - 1)
    first, last = sizes[0] / 1024, sizes[-1] / 1024
    print(f"resident memory: {first:.1f} MiB after a tenth, {last:.1f} MiB at the end ({growth:+.1f} %)")


def resident_kib(process: int) -> int:
    """VmRSS."""
    with open(f"/proc/{process}/status") as file:
        return int(next(line for line in file if line.startswith("VmRSS")).split()[1])


def children() -> list[int]:
    """Processes of this one."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(number) for number in file.read().split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float)
    given = parser.parse_args()
    if given.minutes:
        endurance(given.minutes)
    else:
        throughput()
        health()
