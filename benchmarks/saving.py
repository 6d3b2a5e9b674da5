"""What a checkpoint costs the training that goes on while it is written.

    python benchmarks/saving.py                     # the preset tiny, batches of 32
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/saving.py --rounds 20

Real updates, and a save in the middle of each round: `in the loop` is what the loop waits in `save`, `next update` how
much longer the update after it takes (its results need new memory, and a thread writes beside it), `until written` what
all updates lose together until the thread is done. Medians and ranges over rounds, as shares of a step.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax

from insula.checkpoints.store import CheckpointStore
from insula.model.params import init_params
from insula.testing import fake_batch
from insula.train.config import training_preset
from insula.train.optimizer import averaged, make_optimizer
from insula.train.step import make_train_state, make_train_step, served_params

BEFORE, AFTER = 12, 12
"""Updates of a round before its save, and after it."""


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

    saving, after, losses = [], [], []
    steps = []
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder), keep=1) as store:
        for number in range(given.rounds + 1):
            seconds = []
            for update in range(BEFORE + AFTER):
                if update == BEFORE:
                    begun = time.perf_counter()
                    store.save(number, served_params(state), state, lambda folder: None)
                    waited = time.perf_counter() - begun
                begun = time.perf_counter()
                state, metrics = step(state, batch)
                jax.block_until_ready((state, metrics))  # all of it: a save must not be charged for the update
                seconds.append(time.perf_counter() - begun)
            store.wait()
            if number == 0:  # compiled, and Orbax has been imported
                continue

            usual = statistics.median(seconds[2:BEFORE])
            steps.append(usual)
            saving.append(waited / usual)
            after.append(seconds[BEFORE] / usual - 1)
            losses.append((waited + sum(seconds[BEFORE:])) / usual - AFTER)

    print(
        f"{given.preset}, batches of {given.batch_size}, {given.rounds} rounds: a step {statistics.median(steps):.4f} s"
    )
    for name, shares in (("in the loop", saving), ("next update", after), ("until written", losses)):
        print(f"{name:14} {statistics.median(shares):7.1%} of a step ({min(shares):.1%} to {max(shares):.1%})")


if __name__ == "__main__":
    main()
