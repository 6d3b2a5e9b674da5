"""`insula demo`: from nothing to a policy with a report, on a laptop.

    collect, ask ─► fit FAST, train ─► knowledge before and after ─► closed loop on unseen scenes ─► proof ─► page

Each stage leaves its result on disk; an interrupted demo goes on where it stopped.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from insula.certificate.proof import require
from insula.certificate.stored import read_certificate
from insula.checkpoints.pretrained import load_pretrained
from insula.checkpoints.store import CheckpointStore
from insula.checks import check_seed
from insula.collect.demonstrations import collect, collect_questions
from insula.collect.scenes import render_scenes
from insula.data.config import DataConfig
from insula.data.fitting import measure_fast
from insula.data.mapping import read_mapping
from insula.data.samples import Samples
from insula.errors import InputError
from insula.evaluate.closed_loop import REPLAN_STEPS, ClosedLoop, evaluate
from insula.evaluate.command import HOLD, MOVES
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.evaluate.explained import explain
from insula.evaluate.knowledge import measure_knowledge
from insula.evaluate.rollout_video import reel, write_video
from insula.files import check_output_folder, read_json, write_json
from insula.parallel.mesh import ONE_DEVICE
from insula.policy import Policy
from insula.policy.modes import Mode, SubtaskPolicy
from insula.report import Report, machine, read_metrics, versions, write_report
from insula.runs.folder import CERTIFICATE_FILE, CHECKPOINTS_FOLDER, METRICS_FILE
from insula.train.config import TrainConfig, to_dict, training_preset
from insula.train.data import held_out_sources, open_data
from insula.train.resume import newest_step
from insula.train.run import train
from insula.worlds.seeds import PRETRAINING
from insula.worlds.tabletop.tasks import named_tasks

console = Console(stderr=True)  # stdout says where the report is, and nothing else


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """How much of everything, of which task, or all of them. `preset`: what training starts from; `mode`: how the
    policy acts."""

    demonstrations: int
    question_scenes: int
    steps: int
    batch_size: int
    episodes: int
    knowledge_scenes: int
    evaluate_every: int
    task: str = "put"
    preset: str = "tiny"
    mode: Mode = Mode.FLOW


DEMO = DemoSettings(
    demonstrations=1000,
    question_scenes=1500,
    steps=2500,
    batch_size=32,
    episodes=100,
    knowledge_scenes=200,
    evaluate_every=500,
)
# For a smoke test of the whole path: 40 updates learn next to nothing.
QUICK = DemoSettings(
    demonstrations=24, question_scenes=24, steps=40, batch_size=16, episodes=4, knowledge_scenes=20, evaluate_every=40
)

# Seven tasks, or one of them that takes a tower or three blocks, need more of everything.
TASKS_DEMO = DemoSettings(
    demonstrations=1400,
    question_scenes=1400,
    steps=5000,
    batch_size=32,
    episodes=100,
    knowledge_scenes=200,
    evaluate_every=1000,
    preset="tabletop",
    mode=Mode.SUBTASK,
)

MIXTURE_FILE = "data.toml"
REPORT_FILE = "report.html"
MIXTURE = """\
[robots.tabletop]
path = "data"
cameras = { front = "observation.images.front", wrist = "observation.images.wrist" }
weight = 3
{words}
[questions.scenes]  # so that the backbone keeps what it knew
path = "questions"
weight = 1
"""
WORDS = """\
subtasks = "subtask_index"
forms = { flat = 2, subtask = 1, actions = 2 }
"""
"""What the mixture says besides, for tasks that are done step by step."""


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Demonstrations, FAST, training, evaluation on unseen scenes, one report.html. Goes on where it stopped; one that
    is finished is left as it is."""

    out: Path | None = None
    """Folder for everything; runs/demo, runs/quick with --quick, or runs/TASK for other tasks than put."""
    task: str = "put"
    """Which of the tabletop's tasks (docs/tasks.md), or all of them by one policy, which takes longer."""
    quick: bool = False
    """The same path in about two minutes, for a smoke test; it learns next to nothing."""
    seed: int = 0
    """Of training. Scenes do not depend on it."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


def run_demo(config: DemoConfig) -> None:
    """Make the demo, and say where its report is. Raises as `demo`."""
    named_tasks(config.task)  # for what it raises
    plain = config.task == DemoSettings.task
    out = config.out or Path("runs/quick" if config.quick else "runs/demo" if plain else f"runs/{config.task}")
    check_output_folder(out, "out")

    settings = DEMO if plain else dataclasses.replace(TASKS_DEMO, task=config.task)
    if config.quick:
        settings = dataclasses.replace(QUICK, task=config.task, preset=settings.preset, mode=settings.mode)
    print(f"report: {demo(out, settings, config.seed)}")


def demo(out: Path, settings: DemoSettings, seed: int) -> Path:
    """Run or continue the demo in `out`; nothing is done where it is finished. Returns the report's path.

    Raises InputError where `out` holds something else, or a demo of other settings, KeyboardInterrupt where training
    was interrupted, InsulationError where the trained policy's insulation does not hold.
    """
    stages = Stages(out, settings, seed)
    if stages.finished:
        print(f"{out} holds this demo, finished: nothing was run; to make it again, delete the folder")
        return out / REPORT_FILE

    data = stages.do("collect", lambda: _collect(out / "data", settings))
    stages.do("questions", lambda: _ask(out / "questions", settings))

    # A file, so that the same training can be had with `insula train --data`, and changed.
    words = "" if settings.mode is Mode.FLOW else WORDS
    (out / MIXTURE_FILE).write_text(MIXTURE.replace("{words}", words), encoding="utf-8")
    config = dataclasses.replace(
        training_preset(settings.preset, out / "run"),
        data=out / MIXTURE_FILE,
        seed=seed,
        steps=settings.steps,
        batch_size=settings.batch_size,
        mesh=ONE_DEVICE,  # too small a model to share out
        evaluate_every=settings.evaluate_every,
        reading=DataConfig(fast_vocab=512, fast_scale=5.0),  # few and coarse: these tokens teach, the flow draws
        resume=newest_step(out / "run") is not None,
    )
    stages.do("train", lambda: _train(config))

    # From the checkpoint, not from memory: what is measured is what anyone who loads it gets.
    policy = Policy.load(out / "run", seed=seed)
    knowledge = stages.do("knowledge", lambda: _knowledge(policy, settings))
    proof = _certificate(config)
    fast = stages.do("fast", lambda: _fast(policy, config))
    loops = _closed_loops(policy, settings, out / "data")  # no stage: the page needs their frames, too
    closed_loop = next(iter(loops.values()))
    by_task = {task: loop.to_json() for task, loop in loops.items()}
    write_json(out / "closed_loop.json", closed_loop.to_json() if len(loops) == 1 else {"tasks": by_task})

    report = Report(
        closed_loop=closed_loop.to_json(),
        by_task=by_task,
        recordings=closed_loop.recordings,
        metrics=read_metrics(out / "run" / METRICS_FILE),
        knowledge=knowledge,
        question_share=_question_share(out / MIXTURE_FILE),
        insulation=proof,
        fast=fast,
        demonstrations=data["demonstrations"],
        seconds={**stages.seconds, "closed loop": sum(loop.seconds for loop in loops.values())},
        settings=to_dict(config),
        seed=seed,
        machine=machine(),
        versions={"insula": version("insula")} | versions(),
    )
    write_video(out / "rollouts.mp4", reel(closed_loop.recordings))
    path = write_report(out / REPORT_FILE, report)
    stages.note("report", True)  # the last: a demo that has it is finished
    return path


class Stages:
    """`demo.json`: which stages are done, what they found, and how long they took.

    Raises InputError where the folder holds something that is no demo, or a demo of other settings.
    """

    def __init__(self, out: Path, settings: DemoSettings, seed: int):
        self.path = out / "demo.json"
        self.wanted = {"settings": dataclasses.asdict(settings), "seed": seed}
        self.found: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

        if out.exists() and any(out.iterdir()):
            self._continue(out)
        out.mkdir(parents=True, exist_ok=True)

    def _continue(self, out: Path) -> None:
        if not self.path.is_file():
            raise InputError(f"{out} is not empty and holds no demo; choose another folder with --out")

        stored = read_json(self.path, "wanted", "found", "seconds")
        if stored["wanted"] != self.wanted:
            raise InputError(
                f"{out} holds a demo of other settings or another seed; delete it, or choose another folder (--out)"
            )

        self.found = stored["found"]
        self.seconds = stored["seconds"]

    @property
    def finished(self) -> bool:
        return "report" in self.found

    def do(self, name: str, work: Callable[[], Any]) -> Any:
        """The stage's result: from the last time, or by doing it."""
        if name not in self.found:
            console.rule(name, align="left")
            started = time.perf_counter()
            found = work()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.note(name, found)

        return self.found[name]

    def note(self, name: str, found: Any) -> None:
        """Write down that a stage is done. `found`: plain JSON values."""
        self.found[name] = found
        written = {"wanted": self.wanted, "found": self.found, "seconds": self.seconds}
        write_json(self.path, written)


def _collect(root: Path, settings: DemoSettings) -> dict[str, int]:
    done = collect(root, settings.demonstrations, task=settings.task, overwrite=True)
    return {"demonstrations": len(done.seeds), "frames": done.frames, "discarded": len(done.discarded)}


def _ask(root: Path, settings: DemoSettings) -> int:
    return collect_questions(root, settings.question_scenes, task=settings.task, overwrite=True)


def _train(config: TrainConfig) -> bool:
    if not train(config):  # not a stage that is done: the next call resumes it
        raise KeyboardInterrupt("training was interrupted; the same command goes on where it stopped")

    return True


def _knowledge(policy: Policy, settings: DemoSettings) -> dict[str, Any]:
    """The same held-out questions to the shipped backbone and to the trained one."""
    # The first seeds of the range: neither pretraining nor the questions of this demo have them.
    scenes = render_scenes(PRETRAINING.take(settings.knowledge_scenes), 8, policy.config.vision.image_size)

    # One tokenizer for both: FAST entries lie behind those of the text, which training left as they were.
    tokenizer = policy.assets.tokenizer
    before = load_pretrained(policy.config, jax.random.key(0))
    found = {
        name: measure_knowledge(params, policy.config, tokenizer, scenes)
        for name, params in (("before", before), ("after", policy.params))
    }

    return {name: dataclasses.asdict(known) for name, known in found.items()}


def _question_share(path: Path) -> float:
    mapping = read_mapping(path)
    return sum(questions.weight for questions in mapping.questions.values()) / sum(mapping.weights)


def _closed_loops(policy: Policy, settings: DemoSettings, data: Path) -> dict[str, ClosedLoop]:
    """Unseen scenes of each task: with their own instruction, with another one, in words that no demonstration has."""
    # Seeds of evaluation are other ones by their range. This looks at what was really collected.
    made = read_json(data / "meta" / "collected.json", "first_seed", "last_seed")
    used = range(made["first_seed"], made["last_seed"] + 1)
    acting = SubtaskPolicy(policy, every=REPLAN_STEPS) if settings.mode is Mode.SUBTASK else policy
    held_out = settings.task != DemoSettings.task  # trained on `put` alone, which is one sentence, others say nothing
    loops = {}
    for task in named_tasks(settings.task):
        robot = DelayedPolicy(acting, Delay(), REPLAN_STEPS, HOLD, MOVES)  # which holds where no subtask was said
        done = evaluate(robot, settings.episodes, used_seeds=used, task=task, held_out=held_out)
        console.print(done.summary(), markup=False)
        # Before the next task, whose episodes have the same names: what was said in these is then forgotten.
        loops[task] = dataclasses.replace(done, recordings=explain(acting, done.recordings))

    return loops


def _certificate(config: TrainConfig) -> dict[str, Any]:
    """What the newest checkpoint says of its insulation. Raises InsulationError unless it holds."""
    with CheckpointStore(config.run / CHECKPOINTS_FOLDER) as store:
        found = read_certificate(store.assets() / CERTIFICATE_FILE)

    require(found["outcome"], found["findings"])
    return found


def _fast(policy: Policy, config: TrainConfig) -> dict[str, float]:
    """What FAST makes of held-out chunks."""
    data = open_data(dataclasses.replace(config, resume=True))  # split as it was trained
    samples = held_out_sources(config, policy.assets, data)["tabletop"]
    assert isinstance(samples, Samples)

    report = measure_fast(
        policy.assets.tokenizer.fast, samples.chunks(np.arange(len(samples)))[0], policy.config.max_fast_len
    )
    return {
        "tokens per chunk, median": report.tokens["p50"],
        "tokens per chunk, largest": report.tokens["max"],
        'limit, with "|" and EOS': float(report.budget),
        "reconstruction error (normalized, rms)": report.reconstruction_error,
    }
