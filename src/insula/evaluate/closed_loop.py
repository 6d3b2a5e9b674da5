"""Closed loop: the policy acts in scenes it has never seen, each twice, with its instruction and with another one.

    lanes   1 ▏scene 0 ──────────▏scene 1 swapped ──▏ …      every lane is one environment; one that finishes takes the
            2 ▏scene 0 swapped ─────▏scene 2 ───────▏ …      next episode. All lanes re-plan together, in one batched
            3 ▏scene 1 ───▏scene 2 swapped ─────────▏ …      call, then execute the first steps of their chunks.

Noise is drawn by (scene, swapped, step), never by lane or call, and every call has the same number of rows: a scene
evaluated alone is the episode it was among others.

The swapped instruction names another block and the other bowl of the same scene. A policy that only looks, and does not
listen, never succeeds there and moves a wrong object instead: success under swap is what language following means here.
"""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from rich.table import Table

from insula.errors import InputError, NonFiniteError
from insula.evaluate.intervals import Rate, wilson
from insula.terminal import as_text
from insula.worlds.seeds import EVALUATION, RANGES, refuse_seen
from insula.worlds.tabletop import make_tabletop

NUM_ENVS = 16
LATENCY_CALLS = 100  # of which the 99th percentile is almost the slowest
LATENCY_WARM_UP = 5  # the first compiles: single calls are a batch of one, which no lane has run
PERCENTILES = (50, 90, 99)
Progress = Callable[[int, int], None]
MakeEnvironment = Callable[[], gymnasium.Env]


@runtime_checkable
class Acts(Protocol):
    """What is evaluated. Observations are {"images", "state", "task"}; chunks are in the robot's units."""

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """One chunk [H, D]. Used for latency alone, so its noise may be any."""
        ...

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        """[B, H, D]; all randomness of a row comes from its `seeds`."""
        ...


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended. `wrong_object`: at any time, a block lay in a bowl that was not asked for."""

    seed: int
    swapped: bool
    success: bool
    wrong_object: bool
    steps: int
    task: str


@dataclasses.dataclass(frozen=True)
class Recording:
    """What the cameras saw of an episode, side by side: `frames` uint8 [T + 1, h, cameras·w, 3]."""

    episode: EpisodeResult
    frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """The result. Rates are over scenes, with 95 % Wilson intervals; the swapped ones are None where not tried.

    `latency_ms`: percentiles of single `act` calls, with nothing else running in this process.
    """

    episodes: tuple[EpisodeResult, ...]
    latency_ms: dict[str, float]
    replan_steps: int
    seconds: float
    recordings: tuple[Recording, ...] = ()

    def rate(self, outcome: str, swapped: bool = False) -> Rate | None:
        """Of `outcome`, "success" or "wrong_object"."""
        rows = [getattr(e, outcome) for e in self.episodes if e.swapped == swapped]
        return wilson(sum(rows), len(rows)) if rows else None

    @property
    def success(self) -> Rate | None:
        """Of episodes with their own instruction."""
        return self.rate("success")

    @property
    def wrong_object(self) -> Rate | None:
        """Of episodes with their own instruction; an episode may count here and as a success."""
        return self.rate("wrong_object")

    @property
    def swapped_success(self) -> Rate | None:
        """Language following; None where nothing was swapped."""
        return self.rate("success", swapped=True)

    @property
    def swapped_wrong_object(self) -> Rate | None:
        """What a policy that does not listen does; None where nothing was swapped."""
        return self.rate("wrong_object", swapped=True)

    @property
    def mean_steps(self) -> float:
        """Of all episodes with their own instruction; failures count with all the steps they were given."""
        return float(np.mean([e.steps for e in self.episodes if not e.swapped]))

    @property
    def mean_steps_of_successes(self) -> float | None:
        """Of the successes with their own instruction; None where there is none, which has no mean."""
        steps = [e.steps for e in self.episodes if e.success and not e.swapped]
        return float(np.mean(steps)) if steps else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the rates, the latency, and every episode."""
        names = ("success", "wrong_object", "swapped_success", "swapped_wrong_object")
        rates: dict[str, Rate | None] = {name: getattr(self, name) for name in names}

        # "episodes" last: it is nearly all of the file, and a person reads the figures above it.
        return {name: rate and rate.to_json() for name, rate in rates.items()} | {
            "mean_steps": self.mean_steps,
            "mean_steps_of_successes": self.mean_steps_of_successes,
            "scenes": sum(not e.swapped for e in self.episodes),
            "first_seed": self.episodes[0].seed,
            "replan_steps": self.replan_steps,
            "seconds": self.seconds,
            "latency_ms": self.latency_ms,
            "episodes": [dataclasses.asdict(e) for e in self.episodes],
        }

    def summary(self) -> str:
        """A small table, as plain text."""
        table = Table(
            "instruction", "success", "wrong object", title="closed loop, 95 % intervals", title_justify="left"
        )
        table.add_row("of the scene", str(self.success), str(self.wrong_object))
        if self.swapped_success is not None:
            table.add_row("swapped", str(self.swapped_success), str(self.swapped_wrong_object))

        latency = ", ".join(f"{name} {value:.1f} ms" for name, value in self.latency_ms.items())
        scenes = sum(not e.swapped for e in self.episodes)
        return as_text(table, f"{scenes} scenes, {self.mean_steps:.1f} steps on average; one act: {latency}", width=80)


def evaluate(
    policy: Acts,
    episodes: int = 100,
    first_seed: int = EVALUATION.start,
    replan_steps: int = 2,
    swap: bool = True,
    record: int = 3,
    image_size: int = 64,
    progress: Progress | None = None,
    *,
    num_envs: int = NUM_ENVS,
    allow_any_seed: bool = False,
    used_seeds: Iterable[int] = (),
    environment: MakeEnvironment | None = None,
) -> ClosedLoop:
    """Run `policy` in the scenes `first_seed .. first_seed + episodes - 1`, executing `replan_steps` of each chunk.

    `record`: keep the frames of this many scenes, the first ones. `progress(done, total)` follows every episode.
    `num_envs`: environments side by side at most, and the batch size of every `act_batch` call (rows are repeated to
    fill it, whatever the number of episodes: other sizes round differently).
    `used_seeds`: seeds of the demonstrations; `allow_any_seed` lifts the check of the range, never this one.
    `environment`: makes one environment; the tabletop unless given.

    Raises InputError for seeds kept for another purpose and for chunks of the wrong shape, NonFiniteError for a chunk
    with NaN or infinity.
    """
    seeds = check_seeds(episodes, first_seed, allow_any_seed, used_seeds)
    if replan_steps < 1 or num_envs < 1:
        raise InputError(f"replan_steps is {replan_steps} and num_envs is {num_envs}, expected at least 1 of each")

    jobs = [(seed, swapped) for seed in seeds for swapped in ((False, True) if swap else (False,))]
    make = environment or (lambda: make_tabletop(image_size=image_size))

    started = time.perf_counter()
    with _environments(make, min(num_envs, len(jobs))) as envs:
        tell = progress or (lambda done, total: None)
        done, seen = _run(policy, jobs, envs, num_envs, replan_steps, set(seeds[:record]), tell)
    seconds = time.perf_counter() - started  # compiling included, latency not

    # Short episodes end first. In the order of scenes two policies can be compared line by line.
    order = {job: i for i, job in enumerate(jobs)}
    done.sort(key=lambda recording: order[recording.episode.seed, recording.episode.swapped])

    # Latency last: the environments are closed, so nothing shares the cores with the policy.
    return ClosedLoop(
        episodes=tuple(recording.episode for recording in done),
        latency_ms=measure_latency(policy, seen),
        replan_steps=replan_steps,
        seconds=seconds,
        recordings=tuple(recording for recording in done if len(recording.frames)),
    )


def check_seeds(episodes: int, first_seed: int, allow_any_seed: bool, used: Iterable[int]) -> range:
    """The seeds to evaluate on. Raises InputError where they were meant, or used, for something else."""
    if episodes < 1:
        raise InputError(f"episodes: got {episodes}, expected at least 1")

    seeds = range(first_seed, first_seed + episodes)
    if not allow_any_seed and not (seeds[0] in EVALUATION and seeds[-1] in EVALUATION):
        kept = [r.name for r in RANGES if r is not EVALUATION and (seeds[0] in r or seeds[-1] in r)]
        raise InputError(
            f"first_seed: got {first_seed} for {episodes} episodes, expected seeds from {EVALUATION.start} to "
            f"{EVALUATION.stop - 1}" + (f"; these are kept for {' and '.join(kept)}" if kept else "")
        )

    refuse_seen(seeds, used, "evaluation")
    return seeds


@contextlib.contextmanager
def _environments(make: MakeEnvironment, count: int) -> Iterator[list[gymnasium.Env]]:
    """This many environments, each closed at the end, also where a later one cannot be made."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(make())) for _ in range(count)]


class _Lane:
    """One environment and the episode it is in."""

    def __init__(self, env: gymnasium.Env):
        self.env = env
        self.busy = False

    def start(self, seed: int, swapped: bool, taped: bool) -> None:
        self.seed = seed
        self.swapped = swapped
        self.taped = taped
        self.busy = True

        # The same scene either way: swapping changes what is asked for, not what is drawn from the seed.
        observation, info = self.env.reset(seed=seed, options={"swap": True} if swapped else None)
        self.observation = observation
        self.info = info
        self.task = observation["task"]
        self.steps = 0

        self.frames: list[np.ndarray] = []
        self._tape()

    def play(self, actions: np.ndarray) -> None:
        """Execute [n, D], or fewer where the episode ends."""
        for action in actions:
            observation, _, terminated, truncated, info = self.env.step(action)
            self.observation = observation
            self.info = info
            self.steps += 1
            self._tape()

            # What is left of the chunk was planned for a scene that is over.
            if terminated or truncated:
                self.busy = False
                return

    def result(self) -> Recording:
        # As of the last step: the environment remembers a wrong object until its reset.
        success, wrong = bool(self.info["success"]), bool(self.info["wrong_object"])
        episode = EpisodeResult(self.seed, self.swapped, success, wrong, self.steps, self.task)

        # No frames says "not recorded"; `evaluate` drops these from its recordings.
        return Recording(episode, np.stack(self.frames) if self.frames else np.empty((0, 0, 0, 3), np.uint8))

    def _tape(self) -> None:
        if self.taped:
            self.frames.append(np.concatenate(list(self.observation["images"].values()), axis=1))


def _run(
    policy: Acts,
    jobs: list[tuple[int, bool]],
    envs: list[gymnasium.Env],
    rows: int,
    replan_steps: int,
    taped: set[int],
    tell: Progress,
) -> tuple[list[Recording], list[dict[str, Any]]]:
    """Every job once. Also returns some observations on the way, for measuring latency."""
    waiting, done, seen = deque(jobs), list[Recording](), list[dict[str, Any]]()
    lanes = [_Lane(env) for env in envs]

    while True:
        # Before every plan: a call costs the same however few of its rows are episodes.
        for lane in lanes:
            if not lane.busy and waiting:
                seed, swapped = waiting.popleft()
                lane.start(seed, swapped, seed in taped)

        active = [lane for lane in lanes if lane.busy]
        if not active:
            return done, seen

        # From another lane each time: prompts and scenes differ, and so may the time they take.
        if len(seen) < LATENCY_CALLS:
            seen.append(active[len(seen) % len(active)].observation)

        for lane, chunk in zip(active, _plan(policy, active, rows, replan_steps), strict=True):
            lane.play(chunk)
            if not lane.busy:
                done.append(lane.result())
                tell(len(done), len(jobs))


def _plan(policy: Acts, active: list[_Lane], rows: int, replan_steps: int) -> np.ndarray:
    """The next `replan_steps` actions of every active lane, [len(active), replan_steps, D]."""
    observations = [lane.observation for lane in active]
    # Noise of scene and step, as the module says: what runs beside an episode, or before it, cannot change it.
    seeds = [(lane.seed, lane.swapped, lane.steps) for lane in active]
    missing = rows - len(active)  # one batch size: one compiled program, and the same rounding in it
    chunks = np.asarray(policy.act_batch(observations + observations[:1] * missing, seeds + seeds[:1] * missing))

    action_space = active[0].env.action_space
    assert action_space.shape is not None
    (dim,) = action_space.shape
    if chunks.ndim != 3 or chunks.shape[0] != rows or chunks.shape[2] != dim:
        raise InputError(f"act_batch: got {list(chunks.shape)}, expected [{rows}, H, {dim}]")
    if chunks.shape[1] < replan_steps:
        raise InputError(
            f"replan_steps: got {replan_steps}, but chunks have only {chunks.shape[1]} steps; execute at most those"
        )

    # Not every world refuses NaN, and there a broken checkpoint would pass for a policy that fails.
    for lane, chunk in zip(active, chunks, strict=False):  # what fills the batch is not executed
        if not np.isfinite(chunk).all():
            row, column = np.argwhere(~np.isfinite(chunk))[0]
            raise NonFiniteError(
                f"act_batch: action[{row}][{column}] is {chunk[row, column]} at step {lane.steps} of seed {lane.seed} "
                f"({lane.task!r}), expected finite numbers; look at the weights of this checkpoint"
            )

    return chunks[: len(active), :replan_steps]


def measure_latency(policy: Acts, observations: list[dict[str, Any]], calls: int = LATENCY_CALLS) -> dict[str, float]:
    """Percentiles, in ms, of `calls` single `act` calls after a warm-up (which compiles).

    `observations` are taken in turn. Measured by the wall: checking, tokenizing and the copy to the host are part of
    what a robot waits for.
    """
    times = []
    for i in range(LATENCY_WARM_UP + calls):
        observation = observations[i % len(observations)]
        started = time.perf_counter()
        policy.act(observation)  # returns numpy, so the device is done
        times.append(1e3 * (time.perf_counter() - started))

    # Percentiles rather than a mean, which hides the one late call that a robot would stumble over.
    found = np.percentile(times[LATENCY_WARM_UP:], PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
