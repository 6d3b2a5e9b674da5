"""From recordings to a policy: write a LeRobot data set, describe it, train, act. About a minute on a laptop."""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

import insula
from insula.data.describe import describe
from insula.data.lerobot import LeRobotWriter
from insula.data.lerobot.info import Feature, image_feature
from insula.train.config import TrainConfig
from insula.train.run import train

FEATURES = {
    "observation.images.top": image_feature(64, 64),
    "observation.state": Feature("float32", (2,), ("x", "y")),
    "action": Feature("float32", (2,), ("dx", "dy")),
}


def episode(rng: np.random.Generator, steps: int = 30) -> dict[str, np.ndarray]:
    """A point that is pushed around. `frames[name]` is [steps, *shape]."""
    moves = rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
    where = np.cumsum(0.1 * moves, axis=0, dtype=np.float32)
    pictures = rng.integers(0, 256, (steps, 64, 64, 3), dtype=np.uint8)
    return {"observation.images.top": pictures, "observation.state": where, "action": moves}


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with LeRobotWriter(folder / "recordings", fps=10, features=FEATURES, robot_type="point") as writer:
        for _ in range(8):
            writer.add_episode(episode(rng), task="push the point around")

    model = dataclasses.replace(insula.preset("tiny"), state_dim=2, action_dim=2, horizon=4)
    mapping = folder / "data.toml"  # what `insula data describe` prints: correct it by hand where it guessed wrong
    mapping.write_text(describe(folder / "recordings", model.cameras), encoding="utf-8")
    train(TrainConfig(run=folder / "run", data=mapping, model=model, steps=10, batch_size=4, certify=False), quiet=True)

    policy = insula.Policy.load(folder / "run")
    picture = np.zeros((64, 64, 3), np.uint8)
    chunk = policy.act({"images": {"front": picture}, "state": np.zeros(2), "task": "push the point around"})
    print(f"{len(chunk)} actions of {chunk.shape[1]} numbers, in the recordings' units:\n{chunk}")


if __name__ == "__main__":  # processes that are started for the work read this file again
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
