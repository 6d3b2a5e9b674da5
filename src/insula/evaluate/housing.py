"""Environments side by side. The tabletop's are shared out to a few threads: physics and drawing leave Python's lock
alone.

Each stays in its thread for as long as it lives. An OpenGL context is that of the thread that drew with it last, and no
other may draw with it, nor close it. Somebody else's may bear less: they live in the thread that asks for them.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium

MakeEnvironment = Callable[[], gymnasium.Env]


class Housed(NamedTuple):
    """An environment, and the thread that does whatever is done with it."""

    env: gymnasium.Env
    home: Executor


class Here(Executor):
    """The thread that asks: work is done when it is handed over. Ctrl-C interrupts it as it would any other."""

    def submit(self, work: Callable, /, *arguments: Any, **options: Any) -> Future:  # type: ignore[override]
        """Do it, and return what came of it. An Exception is raised by `result()`, all else at once."""
        done: Future = Future()
        try:
            done.set_result(work(*arguments, **options))
        except Exception as error:
            done.set_exception(error)
        return done


@contextlib.contextmanager
def housed(make: MakeEnvironment, count: int, threads: int = 0) -> Iterator[list[Housed]]:
    """This many environments, each closed at the end, also where a later one cannot be made. `threads`: besides the one
    that asks, which is their home where there is no other."""
    with contextlib.ExitStack() as stack:
        homes: list[Executor] = [
            stack.enter_context(ThreadPoolExecutor(1, f"worlds-{number}")) for number in range(min(count, threads))
        ] or [Here()]
        found = []
        for number in range(count):
            home = homes[number % len(homes)]
            env = home.submit(make).result()
            stack.callback(lambda home, env: home.submit(env.close).result(), home, env)
            found.append(Housed(env, home))
        yield found
