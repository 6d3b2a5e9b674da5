"""Episodes of a policy, side by side: lanes that take one after another, and plan together in one batched call.

    lanes   1 ▏scene 0 ──────────▏scene 1 swapped ──▏ …      every lane is one environment; one that finishes takes the
            2 ▏scene 0 swapped ─────▏scene 2 ───────▏ …      next episode. All lanes re-plan together, in one batched
            3 ▏scene 1 ───▏scene 2 swapped ─────────▏ …      call, then execute the first steps of their chunks.

Noise is drawn by (scene, what is asked, step), never by lane or call, and every call has the same number of rows: a
scene evaluated alone is the episode it was among others. Pictures are drawn of what somebody looks at: the policy, or
the reader of a recording.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from insula.errors import InputError, InsulaError, NonFiniteError
from insula.evaluate.housing import Housed
from insula.policy.modes import Chunk
from insula.policy.speaking import Said
from insula.shapes import Float, UInt8

LATENCY_CALLS = 100  # of which the 99th percentile is almost the slowest
Progress = Callable[[int, int], None]
Look = Mapping[str, np.ndarray]
"""How much of the expert's attention each patch of a camera's picture gets: float32 [rows, columns] by camera."""
WAY_CAMERA = "front"
"""Its picture shows where a chunk leads."""


@runtime_checkable
class Acts(Protocol):
    """What is evaluated. Observations are {"images", "state", "task"}; chunks are in the robot's units."""

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """One chunk [H, D]. Used for latency alone, so its noise may be any."""
        ...

    def act_batch(
        self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]
    ) -> Sequence[Chunk] | np.ndarray:
        """A chunk [H, D] for each row, or why there is none; all randomness of a row comes from its `seeds`."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A world that can say where a chunk would lead."""

    def chunk_pixels(self, chunk: np.ndarray, camera: str) -> np.ndarray:
        """The way of the gripper in a camera's picture, (x, y) of [n + 1, 2], for actions [n, D] from here on."""
        ...


@runtime_checkable
class Blinks(Protocol):
    """A world whose observations have no images while it is not `looking`: drawing is half of its work."""

    looking: bool


class Job(NamedTuple):
    """An episode to run: a scene, and what is asked there (`EpisodeResult`)."""

    seed: int
    swapped: bool = False
    held_out: bool = False

    @property
    def name(self) -> tuple[int, int]:
        """By which a policy knows the episode, and draws its noise."""
        return self.seed, 2 if self.held_out else int(self.swapped)

    @property
    def options(self) -> dict[str, Any] | None:
        """Of the environment's reset. None for the scene's own goal: not every world knows options."""
        asked: dict[str, Any] = {"swap": True} if self.swapped else {}
        return (asked | {"split": "held_out"} if self.held_out else asked) or None


@dataclasses.dataclass(frozen=True)
class EpisodeResult:
    """How one episode ended. `task`: what was asked; `swapped`: something else than the scene's own; `held_out`: in
    words, or of pairs, that no demonstration has. `wrong_object`: at any time, a block lay where it was not asked for.
    `credit`: the share of what was asked that was done in the end."""

    seed: int
    swapped: bool
    success: bool
    wrong_object: bool
    steps: int
    task: str
    held_out: bool = False
    credit: float = 0.0

    @property
    def job(self) -> Job:
        """What was to be run."""
        return Job(self.seed, self.swapped, self.held_out)


@dataclasses.dataclass(frozen=True, eq=False)
class Planned:
    """A plan of a recorded episode: what was seen at `step`, and the `chunk` from there on, of which the first steps
    were executed. `pixels` [n + 1, 2]: its way in the picture of `WAY_CAMERA`; None where the world cannot say.

    `said`, the subtask that is acted on, and `look`, where the expert looked, are known only after the evaluation
    (`insula.evaluate.explained`).
    """

    step: int
    observation: dict[str, Any]
    chunk: Float[np.ndarray, "n D"]
    pixels: Float[np.ndarray, "_ 2"] | None = None
    said: Said | None = None
    look: Look | None = None


@dataclasses.dataclass(frozen=True)
class Recording:
    """What the cameras saw of an episode, side by side, with what was planned meanwhile, in order. `held`: steps in
    which no chunk was due, so that the robot held; known only after the evaluation, too."""

    episode: EpisodeResult
    frames: UInt8[np.ndarray, "_ h width 3"]
    plans: tuple[Planned, ...] = ()
    held: tuple[int, ...] = ()

    def planned(self, step: int) -> Planned | None:
        """What is acted on at a step; None where that was not kept."""
        return next((plan for plan in reversed(self.plans) if plan.step <= step), None)


class _Lane:
    """One environment and the episode it is in. What touches the environment, `start` and `play`, is for its home."""

    def __init__(self, place: Housed, told: bool, blink: bool):
        self.env = place.env
        self.home = place.home
        self.told = told
        self.blink = blink
        self.busy = False

    def start(self, job: Job, taped: bool) -> None:
        self.job = job
        self.taped = taped
        self.busy = True

        if self.blink and isinstance(self.env.unwrapped, Blinks):
            self.env.unwrapped.looking = True
        # The same scene either way: swapping changes what is asked for, not what is drawn from the seed.
        observation, info = self.env.reset(seed=job.seed, options=job.options)
        self.observation = observation
        self.info = info
        self.task = observation["task"]
        self.steps = 0

        self.frames: list[np.ndarray] = []
        self.plans: list[Planned] = []
        self._tape()

    def play(self, chunk: np.ndarray, steps: int) -> None:
        """Execute the first `steps` of [n, D], or fewer where the episode ends."""
        world = self.env.unwrapped
        if self.taped:
            pixels = world.chunk_pixels(chunk, WAY_CAMERA) if isinstance(world, Foresees) else None
            self.plans.append(Planned(self.steps, self.seen(), chunk, pixels))

        for number, action in enumerate(chunk[:steps], start=1):
            if self.blink and isinstance(world, Blinks):
                world.looking = self.taped or number == steps
            observation, _, terminated, truncated, info = self.env.step(action)
            self.observation = observation
            self.info = info
            self.steps += 1
            self._tape()

            # What is left of the chunk was planned for a scene that is over.
            if terminated or truncated:
                self.busy = False
                return

    def seen(self) -> dict[str, Any]:
        """The observation; with the true subtask, where the policy is to be told."""
        return self.observation | {"subtask": self.info["subtask"]} if self.told else self.observation

    def result(self) -> Recording:
        # As of the last step: the environment remembers a wrong object until its reset.
        success, wrong = bool(self.info["success"]), bool(self.info["wrong_object"])
        done = float(self.info.get("credit", success))
        seed, swapped, held_out = self.job
        episode = EpisodeResult(seed, swapped, success, wrong, self.steps, self.task, held_out, done)

        # No frames says "not recorded"; `evaluate` drops these from its recordings.
        frames = np.stack(self.frames) if self.frames else np.empty((0, 0, 0, 3), np.uint8)
        return Recording(episode, frames, tuple(self.plans))

    def _tape(self) -> None:
        if self.taped:
            self.frames.append(np.concatenate(list(self.observation["images"].values()), axis=1))


def run_episodes(
    policy: Acts,
    jobs: Sequence[Job],
    envs: Sequence[Housed],
    rows: int,
    replan_steps: int,
    taped: set[int],
    tell: Progress,
    told: bool = False,
    blink: bool = False,
) -> tuple[list[Recording], list[dict[str, Any]]]:
    """Every job once, in the order in which they end. Also returns some observations on the way, for measuring latency.

    `rows`: of each call of the policy. `taped`: scenes whose frames and plans are kept. `told`: whether observations
    have the true "subtask", as the world has it in its `info`. `blink`: worlds that can need not draw what nobody looks
    at; for worlds without a wrapper, which might have looked. Raises InputError for chunks of the wrong shape,
    NonFiniteError for one with NaN or infinity, and what a policy gives in place of a chunk.
    """
    waiting, done, seen = deque(jobs), list[Recording](), list[dict[str, Any]]()
    lanes = [_Lane(place, told, blink) for place in envs]

    while True:
        # Before every plan: a call costs the same however few of its rows are episodes.
        free = [lane for lane in lanes if not lane.busy][: len(waiting)]
        starts = [(lane, waiting.popleft()) for lane in free]
        _at_home((lane, partial(lane.start, job, job.seed in taped)) for lane, job in starts)

        active = [lane for lane in lanes if lane.busy]
        if not active:
            return done, seen

        # From another lane each time: prompts and scenes differ, and so may the time they take.
        if len(seen) < LATENCY_CALLS:
            seen.append(active[len(seen) % len(active)].seen())

        chunks = _plan(policy, active, rows, replan_steps)
        _at_home((lane, partial(lane.play, chunk, replan_steps)) for lane, chunk in zip(active, chunks, strict=True))
        for lane in active:
            if not lane.busy:
                done.append(lane.result())
                tell(len(done), len(jobs))


def _at_home(calls: Iterable[tuple[_Lane, Callable[[], None]]]) -> None:
    """Do each of these in the thread of its lane, and wait for all. Raises what the first of them raised."""
    for call in [lane.home.submit(work) for lane, work in calls]:
        call.result()


def _plan(policy: Acts, active: list[_Lane], rows: int, replan_steps: int) -> list[np.ndarray]:
    """A chunk [n, D] for every active lane, of at least `replan_steps` actions."""
    observations = [lane.seen() for lane in active]
    # Noise of scene and step, as the module says: what runs beside an episode, or before it, cannot change it.
    seeds = [(*lane.job.name, lane.steps) for lane in active]
    missing = rows - len(active)  # one batch size: one compiled program, and the same rounding in it
    chunks = policy.act_batch(observations + observations[:1] * missing, seeds + seeds[:1] * missing)
    if len(chunks) != rows:
        raise InputError(f"act_batch: got {len(chunks)} chunks, expected {rows}")

    # What fills the batch is not executed.
    return [_check(chunk, lane, replan_steps) for lane, chunk in zip(active, chunks, strict=False)]


def _check(chunk: Chunk, lane: _Lane, replan_steps: int) -> np.ndarray:
    where = f"at step {lane.steps} of seed {lane.job.seed} ({lane.task!r})"
    if isinstance(chunk, InsulaError):
        raise chunk

    action_space = lane.env.action_space
    assert action_space.shape is not None
    (dim,) = action_space.shape
    if chunk.ndim != 2 or chunk.shape[1] != dim:
        raise InputError(f"act_batch: got a chunk {list(chunk.shape)}, expected [H, {dim}]")
    if len(chunk) < replan_steps:
        raise InputError(
            f"replan_steps: got {replan_steps}, but chunks have only {len(chunk)} steps; execute at most those"
        )

    # Not every world refuses NaN, and there a broken checkpoint would pass for a policy that fails.
    if not np.isfinite(chunk).all():
        row, column = np.argwhere(~np.isfinite(chunk))[0]
        raise NonFiniteError(
            f"act_batch: action[{row}][{column}] is {chunk[row, column]} {where}, expected finite numbers; look at the "
            "weights of this checkpoint"
        )

    return chunk
