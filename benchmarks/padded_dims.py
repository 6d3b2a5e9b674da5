"""What padded action dimensions do while sampling, on a trained run: ours are held on their way to 0 (t · noise), as
the expert saw them in training; LeRobot lets them follow the expert's velocity there, which no loss ever scored.

    insula train --data DATA --run runs/padded --model.action-dim 32     # a robot of fewer dimensions
    python benchmarks/padded_dims.py runs/padded --episodes 100

Held-out frames of the run, the same noise for both ways of sampling: how far the real dimensions move apart, beside how
far two draws of noise are apart. With --episodes the tabletop as well, where both ways act in the same scenes.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from insula.batch import Batch
from insula.decode.flow import sample_actions
from insula.evaluate.closed_loop import evaluate
from insula.inspection.config import InspectConfig
from insula.inspection.subject import open_subject
from insula.policy import Policy
from insula.shapes import Array

ROWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--frames", type=int, default=512, help="held-out frames, spread evenly")
    parser.add_argument("--episodes", type=int, default=0, help="scenes of the tabletop to act in, both ways")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()

    subject = open_subject(InspectConfig(run=settings.run))
    config = subject.assets.config
    robot = subject.assets.robot(None)
    samples = next(found for found in subject.sources.values() if hasattr(found, "frames"))
    print(f"{config.action_dim - robot.action_dim} of {config.action_dim} action dimensions are padding")

    real = np.zeros((config.horizon, config.action_dim), bool)
    real[: robot.horizon, : robot.action_dim] = True
    ways = {"held": real, "free": None}
    sample: dict[str, Any] = {
        name: jax.jit(lambda p, o, noise, mask=mask: sample_actions(p, config, o, noise, real=mask))
        for name, mask in ways.items()
    }

    rng = np.random.default_rng(settings.seed)
    rows = np.linspace(0, len(samples) - 1, min(settings.frames, len(samples)) // ROWS * ROWS).astype(int)
    found: dict[str, list[np.ndarray]] = {"held": [], "free": [], "held, other noise": []}
    padding = []
    for part in rows.reshape(-1, ROWS):
        batch: Batch = samples.batch(part)
        observation = prompt_only(batch, config.max_prompt_len)
        noise, other = rng.standard_normal((2, ROWS, config.horizon, config.action_dim), np.float32)
        for name in ways:
            chunk = np.asarray(sample[name](subject.params, observation, noise))
            found[name].append(chunk[:, real])
            if name == "free":
                padding.append(chunk[:, ~real])
        found["held, other noise"].append(np.asarray(sample["held"](subject.params, observation, other))[:, real])

    chunks = {name: np.concatenate(parts) for name, parts in found.items()}
    size = rms(chunks["held"])
    print(
        f"{len(rows)} held-out frames, seed {settings.seed}; normalized actions of the real dimensions, rms {size:.3f}"
    )
    print(f"    free against held, same noise    {rms(chunks['free'] - chunks['held']) / size:.4f} of that")
    print(
        f"    held against held, other noise   {rms(chunks['held, other noise'] - chunks['held']) / size:.4f} of that"
    )
    print(f"    where free padding ends          rms {rms(np.concatenate(padding)):.3f} (0 where held)")

    if settings.episodes:
        for name, mask in ways.items():
            policy = Policy(subject.params, subject.assets, settings.seed)
            policy._chunk = jax.jit(sampler(policy, mask))
            done = evaluate(policy, settings.episodes, replan_steps=2)
            print(f"\nclosed loop, {name}:\n{done.summary()}")


def prompt_only(batch: Batch, width: int) -> Any:
    """The observation without its answer: the first columns, FAST tokens among them hidden."""
    observation = batch.observation
    mask = observation.token_mask & ~batch.ar_mask
    return dataclasses.replace(observation, tokens=observation.tokens[:, :width], token_mask=mask[:, :width])


def sampler(policy: Policy, mask: np.ndarray | None) -> Any:
    """`Policy`'s own program, with this mask."""
    shape = (policy.config.horizon, policy.config.action_dim)

    def chunk(params: Any, observation: Any, keys: Array) -> Array:
        draw = jax.vmap(lambda key: jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), shape))
        return sample_actions(params, policy.config, observation, draw(keys), real=mask)

    return chunk


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


if __name__ == "__main__":
    main()
