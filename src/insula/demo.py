"""`insula demo`: from nothing to a policy with a report, on a laptop.

    collect ─► fit FAST, train ─► knowledge before and after ─► closed loop on unseen scenes ─► insulation proof ─► page

Each stage leaves its result on disk; an interrupted demo goes on where it stopped.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from insula.assets import read_assets
from insula.checkpoints.pretrained import load_pretrained
from insula.checkpoints.store import CheckpointStore
from insula.collect import collect
from insula.data.lerobot import LeRobotDataset
from insula.evaluate.closed_loop import evaluate
from insula.evaluate.knowledge import Knowledge, measure_knowledge
from insula.inspection.gradients import gradient_table
from insula.model import abstract_params, init_params
from insula.policy import Policy
from insula.report import write_report
from insula.scenes import render_scenes
from insula.sim.seeds import EVALUATION, PRETRAINING
from insula.train.config import TrainConfig
from insula.train.run import prepare_split, train

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """How much of everything."""

    demonstrations: int
    steps: int
    episodes: int
    knowledge_scenes: int
    evaluate_every: int


DEMO = DemoSettings(demonstrations=1500, steps=3000, episodes=100, knowledge_scenes=200, evaluate_every=500)
QUICK = DemoSettings(demonstrations=24, steps=60, episodes=4, knowledge_scenes=20, evaluate_every=60)


def demo(out: Path, settings: DemoSettings, seed: int) -> Path:
    """Run or continue the demo in `out`; a finished one is started anew. Returns the report's path.

    Raises ValueError where `out` holds something else, KeyboardInterrupt where training was interrupted.
    """
    stages = Stages(out, settings, seed)
    data = stages.do("collect", lambda: _collect(out / "data", settings))
    config = TrainConfig(
        run=out / "run",
        data=out / "data",
        seed=seed,
        steps=settings.steps,
        evaluate_every=settings.evaluate_every,
        resume=(out / "run" / "train.json").is_file(),
    )
    stages.do("train", lambda: _train(config))
    policy = Policy.load(out / "run", seed=seed)
    knowledge = stages.do("knowledge", lambda: _knowledge(policy, settings))
    record, closed_loop = _closed_loop(policy, settings)
    stages.note("closed_loop", closed_loop)
    proof = stages.do("insulation", lambda: _insulation(policy, out, seed))
    report = Report(**_facts(out, settings, seed, stages, data, knowledge, record, proof))
    stages.note("report", True)
    return write_report(out / "report.html", report)


class Stages:
    """`demo.json`: which stages are done, what they found, and how long they took."""

    def __init__(self, out: Path, settings: DemoSettings, seed: int):
        self.path, self.wanted = out / "demo.json", {"settings": dataclasses.asdict(settings), "seed": seed}
        self.found: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        if out.exists() and any(out.iterdir()):
            self._continue(out)
        out.mkdir(parents=True, exist_ok=True)

    def _continue(self, out: Path) -> None:
        if not self.path.is_file():
            raise ValueError(f"{out} is not empty and holds no demo; choose another folder with --out")
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        if stored["wanted"] == self.wanted and "report" not in stored["found"]:
            self.found, self.seconds = stored["found"], stored["seconds"]
            return
        for name in ("data", "run"):  # what a demo made, and nothing else
            shutil.rmtree(out / name, ignore_errors=True)
        self.path.unlink()

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
        self.found[name] = found
        written = {"wanted": self.wanted, "found": self.found, "seconds": self.seconds}
        self.path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def _collect(root: Path, settings: DemoSettings) -> dict[str, int]:
    done = collect(root, settings.demonstrations, overwrite=True)
    return {"demonstrations": len(done.seeds), "frames": done.frames, "discarded": len(done.discarded)}


def _train(config: TrainConfig) -> bool:
    if not train(config):
        raise KeyboardInterrupt("training was interrupted; the same command goes on where it stopped")
    return True


def _knowledge(policy: Policy, settings: DemoSettings) -> dict[str, Any]:
    """The same held-out questions to the shipped backbone and to the trained one."""
    scenes = render_scenes(PRETRAINING.take(settings.knowledge_scenes), 8, policy.config.vision.image_size)
    tokenizer = policy.assets.tokenizer
    before = load_pretrained(policy.config, init_params(policy.config, jax.random.key(0)))
    found = {
        name: measure_knowledge(params, policy.config, tokenizer, scenes)
        for name, params in (("before", before), ("after", policy.params))
    }
    return {name: dataclasses.asdict(known) for name, known in found.items()}


def _closed_loop(policy: Policy, settings: DemoSettings) -> tuple[ClosedLoop, dict[str, Any]]:
    """Unseen scenes, each with its own instruction and with another one."""
    done = evaluate(policy, settings.episodes, first_seed=EVALUATION.start)
    console.print(done.summary())
    return done, done.to_json()
