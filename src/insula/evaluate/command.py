"""What `insula evaluate` does."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from insula.checks import check_integer, check_seed
from insula.client.connection import KEY_VARIABLE, Client
from insula.client.plan import Stitching
from insula.errors import InputError
from insula.evaluate.closed_loop import RECORDED, REPLAN_STEPS, ClosedLoop, check_seeds, evaluate, summary_of_tasks
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.evaluate.episodes import Acts
from insula.evaluate.explained import explain
from insula.evaluate.rollout_video import ENDINGS, reel, write_video
from insula.evaluate.served import ServedPolicy
from insula.files import check_output_file, write_json
from insula.policy import Policy
from insula.policy.modes import Mode, SubtaskPolicy, TokenPolicy
from insula.worlds.seeds import EVALUATION
from insula.worlds.tabletop.environment import ACTION_DIM, CONTROL_HZ, MAX_STEP
from insula.worlds.tabletop.tasks import ALL, named_tasks


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Run a trained policy in closed loop in the tabletop: success, wrong objects, and swapped instructions. Raises
    InputError for values that cannot be."""

    run: tyro.conf.Positional[Path | None] = None
    """Folder that `insula train` wrote."""
    step: int | None = None
    """Which of its checkpoints; the newest unless told."""
    server: str | None = None
    """In place of a run: address of a policy server, as ws://127.0.0.1:8000. Its noise is by the server's own --seed,
    its mode the server's own --mode; in mode subtask it says one for every chunk.
    An API key is taken from the environment's INSULA_API_KEY."""
    certificate: Path | None = None
    """Certificates to trust, for a server at wss://."""
    task: str = "put"
    """Which of the tabletop's tasks (docs/tasks.md), or all of them."""
    held_out: bool = False
    """Also ask in words, and for pairs of colors, that no demonstration has."""
    mode: Mode = Mode.FLOW
    """flow; tokens: FAST tokens decoded to chunks; subtask: say the subtask, then act on it by flow."""
    subtask_every: int = REPLAN_STEPS
    """In mode subtask: steps after which it is said again."""
    subtask_lag: int = 0
    """In mode subtask: steps that saying it takes, during which the last one is acted on."""
    told: bool = False
    """In mode subtask: tell the policy the true subtask, in place of what it would say."""
    episodes: int = 100
    """Scenes of a task; each is tried with its instruction and with another one."""
    first_seed: int = EVALUATION.start
    """Scenes count up from here. A scene evaluated alone (--episodes 1) is the episode it was among others."""
    replan_steps: int = REPLAN_STEPS
    """Steps of each chunk to execute before the policy looks again."""
    seed: int = 0
    """Of the policy's noise, which depends on it, the scene and the step alone."""
    json: Path | None = None
    """Write the results to this .json file."""
    video: Path | None = None
    """Write the first episodes to this .mp4 or .gif, with the subtask, the chunk, and where the expert looks."""
    robot: str | None = None
    """Which one to act for, where the run was trained on several."""
    delay: int = 0
    """Control steps until a chunk is there, during which the last one is executed; the policy then looks again every
    `delay` + `jitter` steps, or `replan_steps` where that is more."""
    jitter: int = 0
    """The delay is up to this many steps more or less, each time."""
    stitching: Stitching = Stitching.SWITCH
    """How a chunk follows the last one: rtc is real-time chunking."""

    def __post_init__(self) -> None:
        check_integer("episodes", self.episodes, 1)
        check_integer("replan_steps", self.replan_steps, 1)
        check_seed("seed", self.seed)
        self.waits  # noqa: B018 (checks delay and jitter)
        check_integer("subtask_every", self.subtask_every, 1)
        check_integer("subtask_lag", self.subtask_lag, 0)
        if (self.run is None) == (self.server is None):
            raise InputError("expected a run, or --server with an address, and not both")
        if self.mode is not Mode.FLOW and self.run is None:
            raise InputError(f"--mode {self.mode} needs a run: a server has its own mode")
        if self.mode is Mode.TOKENS and self.stitching is Stitching.RTC:
            raise InputError("--stitching rtc needs flow: chunks of FAST tokens cannot go on from the last one")
        if self.mode is not Mode.SUBTASK and (self.subtask_every, self.subtask_lag) != (REPLAN_STEPS, 0):
            raise InputError("--subtask-every and --subtask-lag are for --mode subtask: in others none is said")
        if self.server is not None and (self.step, self.robot, self.seed) != (None, None, 0):
            raise InputError("--step, --robot and --seed are for a run: a server has its own")
        if self.server is None and self.certificate is not None:
            raise InputError("--certificate is for --server: a run in this process needs none")
        if self.told and self.mode is not Mode.SUBTASK and self.server is None:
            raise InputError("--told is for --mode subtask: without it no subtask is read")

    @property
    def waits(self) -> Delay:
        """How long the robot waits for a chunk, and what it does then."""
        return Delay(self.delay, self.jitter, self.stitching)


HOLD = np.array([0.0] * (ACTION_DIM - 1) + [np.nan])
"""The tabletop's action for steps in which nothing is due: it stays, and keeps its gripper as it is."""
MOVES = slice(0, 3)
"""Its dimensions that are a velocity: steps of `MAX_STEP` meters, ten a second."""


def jump_percentiles(jumps: Sequence[float]) -> dict[str, float]:
    """In meters per second; the largest is what a robot's joints feel."""
    if not jumps:
        return {}

    p50, p95, most = np.percentile(np.array(jumps) * MAX_STEP * CONTROL_HZ, (50, 95, 100))
    return {"p50": float(p50), "p95": float(p95), "max": float(most)}


def load_policy(config: EvaluateConfig) -> Acts:
    """Raises as `Policy.load`, or as `Client.connect`, and InputError where a server is told subtasks that it does not
    read."""
    if config.server is None:
        assert config.run is not None
        policy = Policy.load(config.run, config.step, config.seed, robot=config.robot)
        match config.mode:
            case Mode.TOKENS:
                return TokenPolicy(policy)
            case Mode.SUBTASK:
                return SubtaskPolicy(policy, config.subtask_every, config.subtask_lag)
        return policy

    trusted = None if config.certificate is None else str(config.certificate)
    client = Client(config.server, os.environ.get(KEY_VARIABLE), certificate=trusted)
    client.connect()  # now, rather than in the middle of the first scene
    if config.told and client.metadata.get("mode") != Mode.SUBTASK:
        raise InputError(f"--told: {config.server} reads no subtask; start it with --mode subtask")
    return ServedPolicy(client)


def run_evaluate(config: EvaluateConfig) -> None:
    """Run the newest policy of a run, print a table, and write what was asked for.

    Raises, before anything is run, InputError for seeds of another purpose and for outputs of another ending, FileError
    for outputs that cannot be written.
    """
    # `evaluate` checks the seeds, too, but only after a checkpoint is loaded.
    check_seeds(config.episodes, config.first_seed, allow_any_seed=False, used=())
    if config.json is not None:
        check_output_file(config.json, (".json",), "json")
    if config.video is not None:
        check_output_file(config.video, ENDINGS, "video")

    tasks = named_tasks(config.task)
    policy = load_policy(config)
    found: dict[str, tuple[ClosedLoop, dict[str, Any]]] = {}
    for task in tasks:
        found[task] = evaluate_task(policy, config, task)
        if config.json is not None:  # each as it is done: what fails later must not cost the others
            written = {name: {"delay": waits} | loop.to_json() for name, (loop, waits) in found.items()}
            write_json(config.json, {"tasks": written} if config.task == ALL else written[config.task])

    if len(found) > 1:
        print(summary_of_tasks([loop for loop, _ in found.values()]), flush=True)
    if config.video is not None:
        write_video(config.video, reel([one for loop, _ in found.values() for one in loop.recordings]))


def evaluate_task(policy: Acts, config: EvaluateConfig, task: str) -> tuple[ClosedLoop, dict[str, Any]]:
    """One task: its result, which is printed, and what is said of the delay."""
    period = max(config.replan_steps, config.waits.longest)
    delayed = DelayedPolicy(policy, config.waits, period, HOLD, MOVES)
    done = evaluate(
        delayed,
        config.episodes,
        config.first_seed,
        period,
        task=task,
        held_out=config.held_out,
        told=config.told,
        record=0 if config.video is None else RECORDED,
    )
    print(done.summary(), flush=True)  # before any file: a full disk must not cost minutes of episodes

    for failure, times in delayed.failures.most_common(3):
        print(f"{times} times: {failure}; the robot went on with its last chunk, then held", flush=True)

    jumps = jump_percentiles(delayed.jumps)
    if config.delay:
        said = ", ".join(f"{name} {value:.2f} m/s" for name, value in jumps.items())
        print(
            f"{config.delay} steps of delay, {config.stitching}: velocity jumps where chunks meet, {said}", flush=True
        )

    if config.video is not None:
        held = (dataclasses.replace(one, held=tuple(delayed.held[one.episode.job.name])) for one in done.recordings)
        done = dataclasses.replace(done, recordings=explain(policy, held))

    waits = dataclasses.asdict(config.waits) | {"period": period, "velocity_jump": jumps}
    return done, waits | {"failed": sum(delayed.failures.values())}
