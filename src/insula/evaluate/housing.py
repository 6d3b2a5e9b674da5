"""Environments side by side, shared out to a few threads: physics and drawing leave Python's lock alone.

Each stays in its thread for as long as it lives. An OpenGL context is that of the thread that drew with it last, and no
other may draw with it, nor close it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple

import gymnasium

MakeEnvironment = Callable[[], gymnasium.Env]


class Housed(NamedTuple):
    """An environment, and the thread that does whatever is done with it."""

    env: gymnasium.Env
    home: Executor


@contextlib.contextmanager
def housed(make: MakeEnvironment, count: int, threads: int | None = None) -> Iterator[list[Housed]]:
    """This many environments, each closed at the end, also where a later one cannot be made. `threads`: at most; as
    many as there are cores unless given."""
    threads = min(count, threads or os.cpu_count() or 1)
    with contextlib.ExitStack() as stack:
        homes = [stack.enter_context(ThreadPoolExecutor(1, f"worlds-{number}")) for number in range(threads)]
        found = []
        for number in range(count):
            home = homes[number % threads]
            env = home.submit(make).result()
            stack.callback(lambda home, env: home.submit(env.close).result(), home, env)
            found.append(Housed(env, home))
        yield found
