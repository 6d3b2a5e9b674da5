"""Demonstrations of the tabletop's scripted expert, written as a LeRobot v3.0 data set, and questions about scenes."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from insula.collect.scenes import DEFAULT_NOISE, render_scenes
from insula.data.images import EncodedImages, encode_png, encode_pngs
from insula.data.lerobot.info import Feature, image_feature
from insula.data.lerobot.writer import LeRobotWriter
from insula.errors import DatasetError, InputError
from insula.files import write_json
from insula.worlds.seeds import DEMONSTRATIONS, PRETRAINING
from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.demonstrator import rollout
from insula.worlds.tabletop.environment import ACTION_DIM, ACTION_NAMES, STATE_DIM, STATE_NAMES
from insula.worlds.tabletop.scene import CAMERAS
from insula.worlds.tabletop.tasks import UNSEEN_PAIRS, named_tasks
from insula.worlds.tabletop.tasks.unseen_pairs import HELD_OUT_PAIRS, asks_held_out

CONTROL_HZ = 10  # of the environment: frames a second in the data set
BLOCK = 8  # episodes a worker makes at a time; those begun when there are enough are made in vain
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """What was written: the successful episodes' `seeds`, those discarded, and the number of frames."""

    root: Path
    seeds: tuple[int, ...]
    discarded: tuple[int, ...]
    frames: int


@dataclass(frozen=True)
class _Demonstration:
    """`values` as the writer takes them; empty when the expert failed."""

    seed: int
    task: str  # of the tabletop, by name
    instruction: str
    subtasks: list[str]
    values: dict[str, np.ndarray | EncodedImages]


def tabletop_features(image_size: int = 64) -> dict[str, Feature]:
    """The data set's columns: both cameras, the state [5] and the action [7]."""
    images = {f"observation.images.{camera}": image_feature(image_size, image_size) for camera in CAMERAS}
    return images | {
        "observation.state": Feature("float32", (STATE_DIM,), STATE_NAMES),
        "action": Feature("float32", (ACTION_DIM,), ACTION_NAMES),
    }


def collect(
    root: str | Path,
    episodes: int = 400,
    first_seed: int = DEMONSTRATIONS.start,
    noise: float | int = DEFAULT_NOISE,
    *,
    task: str = "put",
    image_size: int = 64,
    processes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Collected:
    """Write `episodes` successful demonstrations of a task, or of "all" in turn, of the seeds from `first_seed` on.

    DART: the noisy action is executed, the clean one recorded; beside each, in words, what is to be done next. Pairs of
    colors that `unseen-pairs` holds out are in no data set that this task is part of, its own or "all".
    Failures are discarded, counted, logged, and listed in `meta/collected.json`. The result does not depend on
    `processes` (by default one per core, at most 4). `progress` is called with the number of episodes written so far.
    Workers are spawned: a script must call this under `if __name__ == "__main__":`. Raises InputError for an unknown
    task, when the seeds would leave the range kept for demonstrations and when most attempts fail, DatasetError when
    `root` is not empty and `overwrite` is not set.
    """
    workers = _workers(processes, episodes)
    DEMONSTRATIONS.take(episodes, first_seed - DEMONSTRATIONS.start)  # for what it raises
    tasks = named_tasks(task)

    kept: list[int] = []
    discarded: list[int] = []
    features = tabletop_features(image_size)
    with (
        LeRobotWriter(root, CONTROL_HZ, features, "insula_tabletop", overwrite=overwrite) as writer,
        contextlib.closing(_demonstrations(first_seed, noise, image_size, workers, tasks)) as made,
    ):
        for demonstration in _in_turn(made, tasks):
            if demonstration.values:
                writer.add_episode(demonstration.values, demonstration.instruction, demonstration.subtasks)
                kept.append(demonstration.seed)
            else:
                discarded.append(demonstration.seed)
            if progress:
                progress(len(kept))

            # A strong noise may leave nothing to keep: the range of seeds, a million, would be tried to its end.
            if len(discarded) > 20 + episodes:
                raise InputError(
                    f"noise is {noise}: {len(discarded)} attempts failed with it, {len(kept)} succeeded; lower it"
                )
            if len(kept) == episodes:
                break
        else:
            raise InputError(f"collect: the seeds for demonstrations ended after {len(kept)} of {episodes} episodes")
        frames = writer.frames

    if discarded:
        log.warning("%d of %d demonstrations failed and were discarded", len(discarded), len(kept) + len(discarded))

    # Which seeds were seen, for those who evaluate: they must not be asked again.
    seen = {"first_seed": first_seed, "last_seed": max(kept), "discarded_seeds": discarded, "noise": noise}
    write_json(Path(root) / "meta" / "collected.json", seen | _asked(tasks))
    return Collected(Path(root), tuple(kept), tuple(discarded), frames)


def _workers(processes: int | None, episodes: int) -> int:
    """As many as were asked for, or as there are cores and work for. Raises InputError for none of either."""
    if episodes < 1:
        raise InputError(f"episodes: got {episodes}, expected at least 1")
    if processes is not None and processes < 1:
        raise InputError(f"processes: got {processes}, expected at least 1")

    return processes or min(os.cpu_count() or 1, 4, -(-episodes // BLOCK))


def _asked(tasks: tuple[str, ...]) -> dict[str, Any]:
    """What the note of a data set says of its goals: what of them is left for evaluation."""
    withheld = {"held_out_pairs": HELD_OUT_PAIRS} if UNSEEN_PAIRS.name in tasks else {}
    return {"tasks": tasks, "split": "train"} | withheld


def _in_turn(made: Iterable[_Demonstration], tasks: tuple[str, ...]) -> Iterator[_Demonstration]:
    """Failures as they come, successes of one task after the other: however often the expert fails in one, a data set
    has as many episodes of each."""
    waiting = {task: deque[_Demonstration]() for task in tasks}
    turns = itertools.cycle(tasks)
    turn = next(turns)

    for demonstration in made:
        if not demonstration.values:
            yield demonstration
            continue

        waiting[demonstration.task].append(demonstration)
        while waiting[turn]:
            yield waiting[turn].popleft()
            turn = next(turns)


def _demonstrations(
    first_seed: int, noise: float | int, image_size: int, workers: int, tasks: tuple[str, ...]
) -> Generator[_Demonstration]:
    """Seed by seed, to the end of the range, the tasks in turn; at most two blocks per worker are in the making.

    Workers are processes: a scene is stepped and encoded in Python, which threads would take in turns, and a GL context
    belongs to one thread at a time.
    """
    starts = range(first_seed, DEMONSTRATIONS.stop, BLOCK)
    blocks = (range(start, min(start + BLOCK, DEMONSTRATIONS.stop)) for start in starts)

    if workers == 1:
        try:
            for seeds in blocks:
                yield from _demonstrate(seeds, noise, image_size, tasks)
        finally:
            for task in tasks:
                if env := _environments.pop((task, image_size), None):
                    env.close()
        return

    context = multiprocessing.get_context("spawn")  # a GL context does not survive a fork
    on_ctrl_c = (signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the workers leave it to the parent
    with ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=on_ctrl_c) as pool:
        ahead: deque[Future[list[_Demonstration]]] = deque()
        try:
            # The oldest is waited for, even where another is done first: data sets are in the order of their seeds.
            for seeds in blocks:
                ahead.append(pool.submit(_demonstrate, seeds, noise, image_size, tasks))
                if len(ahead) == 2 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:  # the caller stops reading once it has enough: blocks that nobody will take are not begun
            pool.shutdown(wait=False, cancel_futures=True)


# Of this process, by task and image size; kept, since each needs a GL context.
_environments: dict[tuple[str, int], gymnasium.Env] = {}


def _demonstrate(seeds: range, noise: float | int, image_size: int, tasks: tuple[str, ...]) -> list[_Demonstration]:
    made = []
    for seed in seeds:
        task = tasks[seed % len(tasks)]
        if (task, image_size) not in _environments:
            _environments[task, image_size] = make_tabletop(task, image_size)
        env = _environments[task, image_size]

        # Beside `unseen-pairs` no other task may show what shall be unseen; these seeds are left out.
        if UNSEEN_PAIRS.name in tasks:
            env.reset(seed=seed)
            truth: Any = env.unwrapped
            if asks_held_out(truth.goal):
                continue
        made.append(_demonstration(env, task, seed, noise))

    return made


def _demonstration(env: Any, task: str, seed: int, noise: float | int) -> _Demonstration:
    """One episode; scene and noise depend on its task and its seed alone."""
    # [seed, 1]: the scene itself is drawn from `seed`, and its noise must not repeat those numbers.
    episode = rollout(env, np.random.default_rng([seed, 1]), noise=noise, seed=seed)
    if not episode.success:
        return _Demonstration(seed, task, episode.task, episode.subtasks, {})

    # Compressed here, by a worker, so that the one process that writes has little to do.
    values: dict[str, np.ndarray | EncodedImages] = {
        f"observation.images.{camera}": encode_pngs([o["images"][camera] for o in episode.observations])
        for camera in CAMERAS
    }
    values["observation.state"] = np.stack([o["state"] for o in episode.observations])
    values["action"] = episode.labels  # DART: not what was executed, but what would have been right there
    return _Demonstration(seed, task, episode.task, episode.subtasks, values)


HELD_OUT_SCENES = 500
"""The first seeds of pretraining: questions about them are asked only when measuring what a model knows."""


def collect_questions(
    root: str | Path, scenes: int, each: int = 8, *, task: str = "put", image_size: int = 64, overwrite: bool = False
) -> int:
    """Write `each` questions about each of `scenes` scenes of a task, or of "all" in turn, whose answers the simulator
    knows, and the pictures: `questions.jsonl` and `images/`. Returns how many questions. Deterministic.

    Raises DatasetError when `root` is not empty and `overwrite` is not set, InputError for an unknown task and when the
    seeds end.
    """
    root = Path(root)
    tasks = named_tasks(task)
    if root.exists() and any(root.iterdir()) and not overwrite:
        raise DatasetError(f"{root} is not empty; choose another folder or overwrite it")

    # Past the held-out scenes, on which knowledge is measured before and after training on these.
    made = render_scenes(PRETRAINING.take(scenes, HELD_OUT_SCENES), each, image_size, tasks=tasks)

    shutil.rmtree(root / "images", ignore_errors=True)  # of more scenes, if it is overwritten
    (root / "images").mkdir(parents=True)
    with (root / "questions.jsonl").open("w", encoding="utf-8") as file:
        for n, asked in enumerate(made.questions):
            images = {camera: f"images/{n:06d}-{camera}.png" for camera in made.images}
            for camera, path in images.items():
                (root / path).write_bytes(encode_png(made.images[camera][n]))
            for _, question, answer in asked:
                file.write(json.dumps({"images": images, "question": question, "answer": answer}) + "\n")

    return sum(map(len, made.questions))
