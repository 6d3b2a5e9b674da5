"""What a delay costs a policy, and what real-time chunking wins back: success and jumps in the world of `posts`.

    python benchmarks/delay.py --folder runs/posts              demonstrations, two policies, the table
    python benchmarks/delay.py --folder runs/posts --episodes 500 --delays 0 8        two rows of it, narrower

One policy is trained plainly, the other with training-time real-time chunking (arXiv 2512.05964) and nothing else
changed. The robot looks again every `PERIOD` steps, half a chunk, and gets its answer `delay` steps later. The plain
policy's chunks are followed by switching, by ACT's ensembling, and by inference-time real-time chunking (arXiv
2506.07339). What is there already is not made again. Writes delay.json into the folder.
"""

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
from posts import HOLD, PostsEnv, write_demonstrations
from rich.console import Console
from rich.table import Table

from insula.client.plan import Stitching
from insula.evaluate.closed_loop import evaluate
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.files import write_json
from insula.policy import Policy

HORIZON, PERIOD = 16, 8
EPISODES, STEPS = 2000, 12_000
PLAIN, TRAINED = "plain", "trained"
SETTINGS = [
    # The state as a token and not as text, which a backbone that never saw this world would have to learn to read.
    *("--model.cameras", "front", "--model.horizon", str(HORIZON), "--model.action-dim", "2", "--model.state-dim", "6"),
    *("--model.state-input", "token", "--model.max-fast-len", "32", "--fast-vocab", "512", "--fast-scale", "5.0"),
    # The expert alone, on the shipped backbone: chunks are the expert's, and a draw of noise costs nothing else.
    *("--model.objective.freeze-backbone", "--model.objective.flow-samples", "4"),
    *("--steps", str(STEPS), "--checkpoint-every", str(STEPS), "--no-certify", "--workers", "1"),
]
METHODS = [(PLAIN, Stitching.SWITCH), (PLAIN, Stitching.ENSEMBLE), (PLAIN, Stitching.RTC), (TRAINED, Stitching.RTC)]
DELAYS = [Delay(steps) for steps in range(PERIOD + 1)] + [Delay(4, 4), Delay(6, 2)]


def train(folder: Path, name: str, *flags: str) -> None:
    """By the command line, as anyone would."""
    if (folder / name / "checkpoints" / str(STEPS)).exists():
        return

    command = [sys.executable, "-m", "insula", "train", "--data", str(folder / "data"), "--run", str(folder / name)]
    subprocess.run([*command, *SETTINGS, *flags], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--delays", type=int, nargs="+", help="these steps alone, without jitter")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder: Path = given.folder

    if not (folder / "data").exists():
        write_demonstrations(folder / "data", EPISODES)
    train(folder, PLAIN, "--seed", str(given.seed))
    train(folder, TRAINED, "--seed", str(given.seed), "--model.objective.rtc-max-delay", str(PERIOD))

    policies = {name: Policy.load(folder / name, seed=given.seed) for name in (PLAIN, TRAINED)}
    table = Table("delay", "jitter", *(f"{name}, {stitching}" for name, stitching in METHODS))
    rows = []
    for delay in DELAYS if given.delays is None else map(Delay, given.delays):
        cells = []
        for name, stitching in METHODS:
            waits = dataclasses.replace(delay, stitching=stitching)
            late = DelayedPolicy(policies[name], waits, PERIOD, HOLD)
            done = evaluate(late, given.episodes, replan_steps=PERIOD, swap=False, record=0, environment=PostsEnv)
            assert done.success is not None
            p95 = float(np.percentile(late.jumps, 95))
            cells.append(f"{done.success}; jump {p95:.2f}, {max(late.jumps):.2f}")
            rows.append(
                {
                    **dataclasses.asdict(waits),
                    "policy": name,
                    "success": done.success.to_json(),
                    "mean_steps": done.mean_steps,
                    "jump": {"p50": float(np.percentile(late.jumps, 50)), "p95": p95, "max": max(late.jumps)},
                }
            )
        table.add_row(str(delay.steps), str(delay.jitter), *cells)
        print(delay, *cells, sep="  ", flush=True)

    Console(width=160).print(table)
    write_json(folder / "delay.json", {"episodes": given.episodes, "seed": given.seed, "rows": rows})


if __name__ == "__main__":
    main()
