"""Closed loop: the policy acts in scenes it has never seen, each with its own instruction and with others.

own         the scene's own goal, in words of the demonstrations
swapped     something else in the same scene: another block, into the other bowl. A policy that only looks, and does
            not listen, never succeeds there and moves a wrong object instead: language following means this here.
held out    the own goal in words that no demonstration has; of `unseen-pairs`, pairs that none has
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.table import Table

from insula.errors import DecodeError, InputError
from insula.evaluate.episodes import LATENCY_CALLS, Acts, EpisodeResult, Job, Progress, Recording, run_episodes
from insula.evaluate.housing import MakeEnvironment, housed
from insula.evaluate.intervals import Rate, wilson
from insula.terminal import as_text
from insula.worlds.seeds import EVALUATION, RANGES, refuse_seen
from insula.worlds.tabletop import make_tabletop

NUM_ENVS = 16
RECORDED = 3  # scenes
REPLAN_STEPS = 2  # of each chunk, before the policy looks again
LATENCY_WARM_UP = 5  # the first compiles: single calls are a batch of one, which no lane has run
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """The result. Rates are over scenes, with 95 % Wilson intervals; None of what was not tried.

    `latency_ms`: percentiles of single `act` calls, with nothing else running in this process.
    """

    episodes: tuple[EpisodeResult, ...]
    latency_ms: dict[str, float]
    replan_steps: int
    seconds: float
    recordings: tuple[Recording, ...] = ()
    task: str = "put"

    def asked(self, swapped: bool = False, held_out: bool = False) -> list[EpisodeResult]:
        """The episodes in which this was asked."""
        return [e for e in self.episodes if (e.swapped, e.held_out) == (swapped, held_out)]

    def rate(self, outcome: str, swapped: bool = False, held_out: bool = False) -> Rate | None:
        """Of `outcome`, "success" or "wrong_object"."""
        rows = [getattr(e, outcome) for e in self.asked(swapped, held_out)]
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
    def held_out_success(self) -> Rate | None:
        """In words, or of pairs, that no demonstration has; None where they were not asked."""
        return self.rate("success", held_out=True)

    @property
    def mean_credit(self) -> float:
        """The share of what was asked that was done, over episodes with their own instruction."""
        return float(np.mean([e.credit for e in self.asked()]))

    @property
    def mean_steps(self) -> float:
        """Of all episodes with their own instruction; failures count with all the steps they were given."""
        return float(np.mean([e.steps for e in self.asked()]))

    @property
    def mean_steps_of_successes(self) -> float | None:
        """Of the successes with their own instruction; None where there is none, which has no mean."""
        steps = [e.steps for e in self.asked() if e.success]
        return float(np.mean(steps)) if steps else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the rates, the latency, and every episode."""
        names = ("success", "wrong_object", "swapped_success", "swapped_wrong_object", "held_out_success")
        rates: dict[str, Rate | None] = {name: getattr(self, name) for name in names}

        # "episodes" last: it is nearly all of the file, and a person reads the figures above it.
        return {name: rate and rate.to_json() for name, rate in rates.items()} | {
            "task": self.task,
            "mean_credit": self.mean_credit,
            "mean_steps": self.mean_steps,
            "mean_steps_of_successes": self.mean_steps_of_successes,
            "scenes": len(self.asked()),
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
        if self.held_out_success is not None:
            table.add_row("held out", str(self.held_out_success), str(self.rate("wrong_object", held_out=True)))

        latency = ", ".join(f"{name} {value:.1f} ms" for name, value in self.latency_ms.items())
        scenes = f"{len(self.asked())} scenes of {self.task}"
        return as_text(table, f"{scenes}, {self.mean_steps:.1f} steps on average; one act: {latency}", width=80)


def summary_of_tasks(loops: Iterable[ClosedLoop]) -> str:
    """One row for each task, as plain text."""
    table = Table("task", "success", "done", "swapped", "held out", "wrong object", title_justify="left")
    table.title = "success by task, 95 % intervals"
    for loop in loops:
        rates = (loop.swapped_success, loop.held_out_success, loop.wrong_object)
        others = [str(rate) if rate is not None else "" for rate in rates]
        table.add_row(loop.task, str(loop.success), f"{loop.mean_credit:.0%}", *others)

    return as_text(table, width=110)


def evaluate(
    policy: Acts,
    episodes: int = 100,
    first_seed: int = EVALUATION.start,
    replan_steps: int = REPLAN_STEPS,
    swap: bool = True,
    record: int = RECORDED,
    image_size: int = 64,
    progress: Progress | None = None,
    *,
    task: str = "put",
    held_out: bool = False,
    told: bool = False,
    num_envs: int = NUM_ENVS,
    allow_any_seed: bool = False,
    used_seeds: Iterable[int] = (),
    environment: MakeEnvironment | None = None,
) -> ClosedLoop:
    """Run `policy` in the scenes `first_seed .. first_seed + episodes - 1` of a task, executing `replan_steps` of each
    chunk. `swap`, `held_out`: ask for these as well. `told`: every observation brings the true "subtask" of that
    moment.

    `record`: keep frames and plans of this many scenes, the first ones. `progress(done, total)` follows every episode.
    `num_envs`: environments side by side at most, and the batch size of every `act_batch` call (rows are repeated to
    fill it, whatever the number of episodes: other sizes round differently).
    `used_seeds`: seeds of the demonstrations; `allow_any_seed` lifts the check of the range, never this one.
    `environment`: makes one environment; the tabletop's task unless given. Others live in the thread of the caller.

    Raises InputError for seeds kept for another purpose and an unknown task, and as `run_episodes`.
    """
    seeds = check_seeds(episodes, first_seed, allow_any_seed, used_seeds)
    if replan_steps < 1 or num_envs < 1:
        raise InputError(f"replan_steps is {replan_steps} and num_envs is {num_envs}, expected at least 1 of each")

    jobs = _jobs(seeds, swap, held_out)
    make = environment or (lambda: make_tabletop(task, image_size))

    started = time.perf_counter()
    ours = environment is None
    with housed(make, min(num_envs, len(jobs)), threads=(os.cpu_count() or 1) if ours else 0) as envs:
        tell = progress or (lambda done, total: None)
        taped = set(seeds[:record])
        done, seen = run_episodes(policy, jobs, envs, num_envs, replan_steps, taped, tell, told, blink=ours)
    seconds = time.perf_counter() - started  # compiling included, latency not

    # Short episodes end first. In the order of scenes two policies can be compared line by line.
    order = {job: i for i, job in enumerate(jobs)}
    done.sort(key=lambda one: order[one.episode.job])

    # Latency last: the environments are closed, so nothing shares the cores with the policy.
    return ClosedLoop(
        episodes=tuple(recording.episode for recording in done),
        latency_ms=measure_latency(policy, seen),
        replan_steps=replan_steps,
        seconds=seconds,
        recordings=tuple(recording for recording in done if len(recording.frames)),
        task=task,
    )


def _jobs(seeds: Iterable[int], swap: bool, held_out: bool) -> list[Job]:
    kinds = [(False, False), *([(True, False)] if swap else []), *([(False, True)] if held_out else [])]
    return [Job(seed, *kind) for seed in seeds for kind in kinds]


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


def measure_latency(policy: Acts, observations: list[dict[str, Any]], calls: int = LATENCY_CALLS) -> dict[str, float]:
    """Percentiles, in ms, of `calls` single `act` calls after a warm-up (which compiles).

    `observations` are taken in turn. Measured by the wall: checking, tokenizing and the copy to the host are part of
    what a robot waits for.
    """
    times = []
    for i in range(LATENCY_WARM_UP + calls):
        observation = observations[i % len(observations)]
        started = time.perf_counter()
        with contextlib.suppress(DecodeError):  # to say what is no chunk takes its time, too
            policy.act(observation)  # returns numpy, so the device is done
        times.append(1e3 * (time.perf_counter() - started))

    # Percentiles rather than a mean, which hides the one late call that a robot would stumble over.
    found = np.percentile(times[LATENCY_WARM_UP:], PERCENTILES)
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
