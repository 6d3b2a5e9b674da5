"""A small mixture on disk: two robots of other cameras and sizes, and questions; and a model small enough for it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from insula.data.config import DataConfig
from insula.data.lerobot import LeRobotWriter
from insula.data.lerobot.info import Feature, image_feature
from insula.model.config import TINY, TransformerConfig, VisionConfig
from insula.parallel.mesh import ONE_DEVICE
from insula.train.config import TrainConfig
from insula.train.optimizer import OptimizerConfig

SMALL = (
    dataclasses.replace(
        TINY,
        name="small",
        vision=VisionConfig(32, (16,), (), width=16, depth=1, mlp_dim=16, num_heads=2),
        backbone=TransformerConfig(16, 1, 16, 2, 1, 8),
        expert=TransformerConfig(16, 1, 16, 2, 1, 8),
        horizon=6,
        action_dim=4,
        state_dim=5,
        max_fast_len=40,
    )
    .with_objective(flow_samples=1)
    .with_compute(dtype="float32")
)
MAPPING = """
[robots.arm]
path = "arm"
cameras = { front = "observation.images.top", wrist = "observation.images.wrist" }
weight = 2
delta = [0, 1]
units = { actions = "rad" }

[robots.cart]
path = "cart"
state = [{ column = "observation.state", dims = [2, 0] }]
cameras = { front = "observation.images.front" }
horizon = 4
normalization = "min_max"

[questions.scenes]
path = "questions"
camera = "front"
"""


def record(root: Path, cameras: dict[str, int], state: int, actions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = {f"observation.images.{name}": image_feature(size, size) for name, size in cameras.items()}
    numbers = {"observation.state": Feature("float32", (state,)), "action": Feature("float32", (actions,))}
    with LeRobotWriter(root, 10, features | numbers) as writer:
        for episode in range(4):
            n = 7 + episode
            pictures = {key: rng.integers(0, 256, (n, *f.shape), dtype=np.uint8) for key, f in features.items()}
            values = {
                "observation.state": rng.normal(size=(n, state)).astype(np.float32).cumsum(0),
                "action": rng.normal(size=(n, actions)).astype(np.float32).cumsum(0),
            }
            writer.add_episode(pictures | values, f"task {episode % 2}")


def write_mixture(root: Path) -> Path:
    """`root/data.toml` and what it maps: arm (2 cameras), cart (1), and 13 questions, the last without an image."""
    record(root / "arm", {"top": 32, "wrist": 32}, state=3, actions=3, seed=0)
    record(root / "cart", {"front": 24}, state=4, actions=2, seed=1)
    (root / "questions").mkdir()
    rows = []
    for n in range(12):
        Image.fromarray(np.full((20, 40, 3), 20 * n, np.uint8)).save(root / "questions" / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": f"how bright is picture {n}", "answer": f"{20 * n} of 255"})
    rows.append({"question": "what is the opposite of left", "answer": "right"})
    (root / "questions" / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "data.toml").write_text(MAPPING)
    return root


def settings(folder: Path, run: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        run=run,
        data=folder / "data.toml",
        model=SMALL,
        optimizer=OptimizerConfig(warmup_steps=2),
        steps=4,
        batch_size=8,
        mesh=ONE_DEVICE,
        from_scratch=True,
        held_out_fraction=0.25,
        evaluate_every=2,
        checkpoint_every=2,
        log_every=1,
        reading=DataConfig(fast_vocab=400, fast_scale=4.0),
        certify=False,  # two more programs to compile
    )
    return dataclasses.replace(config, **changes)
