"""How long each mode takes to act, in one run; what a token costs beside the memory it reads; how many chunks decode.

    python benchmarks/decode.py RUN          a run that was trained on subtasks (insula demo --task all)

Modes take turns, call by call; medians, with the range of five blocks. A token cannot come sooner than its weights can
be read: those of the backbone's layers and the embedding, once each.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from insula.errors import DecodeError
from insula.policy import Policy
from insula.policy.modes import SubtaskPolicy, TokenPolicy
from insula.worlds.seeds import EVALUATION
from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.demonstrator import rollout
from insula.worlds.tabletop.tasks import TASKS

BLOCKS, BATCH = 5, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--task", default="sort")
    parser.add_argument("--calls", type=int, default=200)
    arguments = parser.parse_args()

    policy = Policy.load(arguments.run)
    env = make_tabletop(arguments.task, policy.config.vision.image_size)
    scenes = [env.reset(seed=seed)[0] for seed in EVALUATION.take(20)]
    told = [scene | {"subtask": "put the red block in the red bowl"} for scene in scenes]
    tokens, subtask = TokenPolicy(policy), SubtaskPolicy(policy)
    pictures = [{name: scene["images"][name][None] for name in policy.robot.cameras} for scene in scenes]
    question = "is the gripper holding something"

    modes: dict[str, Callable[[int], object]] = {
        "flow": lambda n: policy.act(scenes[n]),
        "flow, told the subtask": lambda n: policy.act(told[n]),
        "tokens": lambda n: tokens.act(scenes[n]),
        "say the subtask": lambda n: subtask.think([scenes[n]], [(0,)]),
        "say the subtask, then flow": lambda n: subtask.act(scenes[n]),
        f"ask: {question!r}": lambda n: subtask.speaker.ask(pictures[n], [question]),
    }
    times = take_turns(modes, len(scenes), arguments.calls)
    print(f"{policy.config.name}, one observation of {arguments.task} at a time, {arguments.calls} calls of each; ms\n")
    print("| mode | p50 | blocks | p99 |\n|---|---|---|---|")
    for name, taken in times.items():
        blocks = [float(np.median(block)) for block in np.array_split(taken, BLOCKS)]
        p50, p99 = np.percentile(taken, (50, 99))
        print(f"| {name} | {p50:.2f} | {min(blocks):.2f}–{max(blocks):.2f} | {p99:.2f} |")

    spoken = np.mean([len(subtask.think([scene], [(0,)])[0].tokens) for scene in scenes])
    show_tokens(policy, tokens, scenes, float(spoken))
    show_validity(policy, tokens)


def take_turns(modes: dict[str, Callable[[int], object]], scenes: int, calls: int) -> dict[str, np.ndarray]:
    """Milliseconds of each call, by mode."""
    times: dict[str, list[float]] = {name: [] for name in modes}
    for call in range(-3, calls):  # the first three compile
        for name, run in modes.items():
            started = time.perf_counter()
            run(call % scenes)
            if call >= 0:
                times[name].append(1e3 * (time.perf_counter() - started))

    return {name: np.array(taken) for name, taken in times.items()}


def show_tokens(policy: Policy, tokens: TokenPolicy, scenes: list[dict], spoken: float) -> None:
    """What one more token costs, from answers of two lengths, beside one product that reads as many bytes."""
    speaker, seen = tokens.speaker, policy.observe(scenes[:1])
    lengths = (13, 29)  # one bucket, so one program
    answers = {n: speaker.choose_from(["<loc0000>" * (n - 1)]) for n in lengths}

    taken: dict[int, list[float]] = {n: [] for n in lengths}
    for round_ in range(-3, 200):
        for n, grammar in answers.items():
            started = time.perf_counter()
            (said,) = speaker.say(seen, [(0,)], grammar, limit=max(lengths))
            assert len(said.tokens) == n
            if round_ >= 0:
                taken[n].append(1e3 * (time.perf_counter() - started))

    few, many = lengths
    per_token = float(np.median(taken[many]) - np.median(taken[few])) / (many - few)
    weights = jax.tree.leaves((policy.params.backbone.layers, policy.params.backbone.embedding))
    read = sum(weight.nbytes for weight in weights)
    limit = read_once(read)
    print(
        f"\nA token takes {per_token:.3f} ms and reads {read / 2**20:.2f} MiB of weights, which one product does in ",
        end="",
    )
    print(f"{limit:.3f} ms: {per_token / limit:.2f} times. A subtask has {spoken:.1f} tokens here, its end included.")


def show_validity(policy: Policy, bound: TokenPolicy) -> None:
    """How many chunks decode, with the grammar and without, in states along the expert's episodes of all tasks."""
    seen: list[dict] = []
    for task in TASKS:
        env = make_tabletop(task, policy.config.vision.image_size)
        for seed in EVALUATION.take(10, 500):
            seen += rollout(env, np.random.default_rng(seed), seed=seed).observations[::6]
        env.close()

    said = []
    for name, acting in (("free", TokenPolicy(policy, bound=False)), ("bound", bound)):
        failures: Counter[str] = Counter()
        for start in range(0, len(seen), BATCH):
            rows = [seen[row % len(seen)] for row in range(start, start + BATCH)]
            chunks = acting.act_batch(rows, [(row,) for row in range(BATCH)])[: len(seen) - start]
            failures.update(str(chunk) for chunk in chunks if isinstance(chunk, DecodeError))
        said.append(f"{name} {len(seen) - failures.total()} of {len(seen)} {failures.most_common(2) or ''}")

    print("Whole chunks: " + "; ".join(said))


def read_once(size: int) -> float:
    """Milliseconds of one product of a vector with a float32 matrix of `size` bytes: the median of many."""
    width = 128
    matrix, vector = jnp.ones((width, size // (4 * width))), jnp.ones((1, width))
    product = jax.jit(lambda x, w: x @ w)
    taken = []
    for _ in range(300):
        started = time.perf_counter()
        jax.block_until_ready(product(vector, matrix))
        taken.append(1e3 * (time.perf_counter() - started))

    return float(np.median(taken))


if __name__ == "__main__":
    main()
