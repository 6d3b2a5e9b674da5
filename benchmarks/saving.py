"""What a checkpoint costs the training that goes on while it is written.

    python benchmarks/saving.py                     # the preset tiny, batches of 32
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/saving.py --rounds 20

Real updates, each waited for, and a save in the middle of each round, as the loop does it. `waits` is what the loop
waits for the save alone, `its update` how much later the update is done and saved (which is asked for its copy while it
runs: on a CPU that takes from what computes), `next update` how much longer that takes (the state is copied before it,
and a thread writes beside it), `until written` what all updates lose together until the thread is done. Medians and
quartiles over rounds, as shares of a step.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax

from insula.checkpoints.snapshot import snapshot
from insula.checkpoints.store import CheckpointStore
from insula.model.params import init_params
from insula.testing import fake_batch
from insula.train.config import training_preset
from insula.train.optimizer import averaged, make_optimizer
from insula.train.step import make_train_state, make_train_step, served_params

BEFORE, AFTER = 12, 12
"""Updates of a round before the one that is saved, and after it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()

    config = dataclasses.replace(training_preset(given.preset, Path()), batch_size=given.batch_size)
    optimizer = make_optimizer(config.optimizer, config.model, 1000)
    params = init_params(config.model, jax.random.key(0))
    state = make_train_state(params, optimizer, averaged(config.optimizer, config.model))
    batch = jax.jit(lambda key: fake_batch(config.model, given.batch_size, key))(jax.random.key(1))
    step = make_train_step(config.model, optimizer, config.optimizer.ema_decay, jax.random.key(2))

    waits, saved, after, losses = [], [], [], []
    steps = []
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder), keep=1) as store:
        for number in range(given.rounds + 1):
            seconds = []
            for update in range(BEFORE + 1 + AFTER):
                begun = time.perf_counter()
                state, metrics = step(state, batch)
                kept = snapshot(state) if update == BEFORE else state
                jax.block_until_ready((state, metrics))
                computed = time.perf_counter()
                if update == BEFORE:
                    store.save(number, kept, served_params, lambda folder: None)
                    waited = time.perf_counter() - computed
                del kept
                seconds.append(time.perf_counter() - begun)
            store.wait()
            if number == 0:  # compiled, and Orbax has been imported
                continue

            usual = statistics.median(seconds[2:BEFORE])
            steps.append(usual)
            waits.append(waited / usual)
            saved.append(seconds[BEFORE] / usual - 1)
            after.append(seconds[BEFORE + 1] / usual - 1)
            losses.append(sum(seconds[BEFORE:]) / usual - 1 - AFTER)

    print(
        f"{given.preset}, batches of {given.batch_size}, {given.rounds} rounds: a step {statistics.median(steps):.4f} s"
    )
    found = {"waits": waits, "its update": saved, "next update": after, "until written": losses}
    for name, shares in found.items():
        low, middle, high = statistics.quantiles(shares, n=4)
        print(f"{name:14} {middle:7.1%} of a step ({low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
