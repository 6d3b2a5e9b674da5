"""What a train step holds in memory, before and after each measure that makes it less.

    python benchmarks/memory.py                          # the preset small, a batch of 4
    python benchmarks/memory.py --preset tiny --batch-size 32

One process for each row. It makes the real state from random weights and a batch of random numbers, compiles the step
that `insula train` runs, and makes two updates:

    arguments, temporary    XLA's memory_analysis of that step: the state with its batch, and what is made and freed
    peak resident           VmHWM of the process: both of these, Python, JAX and the compiler
    seconds                 of the second update, on a machine that may be busy
    plan                    what `insula plan` gives for the same settings, and how far it is off arguments + temporary
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import jax

from insula.model.params import init_params
from insula.parallel.mesh import ONE_DEVICE, make_mesh, put_batch
from insula.parallel.sharding import put
from insula.testing import fake_batch
from insula.train.config import TrainConfig, training_preset
from insula.train.optimizer import averaged, make_optimizer
from insula.train.plan import PlanConfig, measure
from insula.train.step import abstract_state, make_train_state, make_train_step

GIB = 2**30


def rows(preset: str, batch_size: int) -> dict[str, TrainConfig]:
    """Nothing, each measure of activations alone, and then one more with each row."""
    start = dataclasses.replace(training_preset(preset, Path()), batch_size=batch_size, accumulate=1)

    def computing(remat: Literal["none", "dots", "all"], parts: int = 1) -> TrainConfig:
        model = start.model.with_compute(scan_layers=True, remat=remat)
        return dataclasses.replace(start, model=model, accumulate=parts)

    lean = computing("all", batch_size)
    plain = dataclasses.replace(lean.optimizer, ema_decay=None)
    narrow = dataclasses.replace(plain, moment_dtype="bfloat16")
    frozen = lean.model.with_objective(freeze_backbone=True)
    return {
        "none": computing("none"),
        f"accumulate {batch_size}": computing("none", batch_size),
        "remat dots": computing("dots"),
        "remat all": computing("all"),
        f"remat all, accumulate {batch_size}": lean,
        "... and no average": dataclasses.replace(lean, optimizer=plain),
        "... and the first moment in bfloat16": dataclasses.replace(lean, optimizer=narrow),
        f"remat all, accumulate {batch_size}, frozen backbone": dataclasses.replace(lean, model=frozen),
    }


def measure_row(config: TrainConfig) -> dict[str, float]:
    """Bytes and seconds of one row, of this process."""
    mesh = make_mesh(ONE_DEVICE)
    asked = PlanConfig(
        model=config.model, optimizer=config.optimizer, batch_size=config.batch_size, accumulate=config.accumulate
    )
    planned = measure(asked, mesh).memory  # makes no weight, and has no part in the peak

    optimizer = make_optimizer(config.optimizer, config.model, steps=1000)
    having = averaged(config.optimizer, config.model)
    with jax.set_mesh(mesh):
        like = abstract_state(config.model, optimizer, mesh, having)
        places = jax.tree.map(lambda leaf: leaf.sharding, like)
        params = put(init_params(config.model, jax.random.key(0)), places.params)
        start = jax.jit(
            lambda params: make_train_state(params, optimizer, having), out_shardings=places, donate_argnums=0
        )
        state = start(params)
        del params

        batch = put_batch(
            jax.device_get(fake_batch(config.model, config.batch_size, jax.random.key(1))), mesh, config.batch_size
        )
        decay, parts = config.optimizer.ema_decay, config.accumulate
        step = make_train_step(config.model, optimizer, decay, jax.random.key(0), parts=parts, places=places)
        compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
        said = compiled.memory_analysis()

        for _ in range(2):
            began = time.perf_counter()
            state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))

    return {
        "arguments": said.argument_size_in_bytes,
        "temporary": said.temp_size_in_bytes,
        "resident": peak_resident(),
        "seconds": time.perf_counter() - began,
        "plan": planned,
    }


def peak_resident() -> int:
    """VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = next(line for line in lines if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024


def in_a_process(options: argparse.Namespace, name: str) -> dict[str, float]:
    """A row in a process of its own: a peak is that of all before it."""
    flags = ["--preset", options.preset, "--batch-size", str(options.batch_size), "--row", name]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--row", help="measure this row alone, in this process")
    options = parser.parse_args()

    table = rows(options.preset, options.batch_size)
    if options.row is not None:
        print(json.dumps(measure_row(table[options.row])))
        return

    print(f"{options.preset}, a batch of {options.batch_size}, scanned layers; GiB")
    print("| | arguments | temporary | peak resident | seconds | plan | off |\n|---|---|---|---|---|---|---|")
    for name in table:
        found = in_a_process(options, name)
        needed = found["arguments"] + found["temporary"]
        cells = [found["arguments"], found["temporary"], found["resident"]]
        sizes = " | ".join(f"{cell / GIB:.2f}" for cell in cells)
        off = found["plan"] / needed - 1
        print(f"| {name} | {sizes} | {found['seconds']:.1f} | {found['plan'] / GIB:.2f} | {off:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
