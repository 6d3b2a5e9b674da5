"""What the backbone knows: accuracy on held-out questions about scenes, before and after robot training."""

import dataclasses

import jax
import numpy as np

from insula.collect.scenes import Scenes, question_batch, tokenize
from insula.losses import predict_tokens
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.tokens.sequence import FASTTokenizer

NEAR = 2
"""A location counts as right within so many bins of 128: one pixel of a 64-pixel image."""


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """`accuracy[kind]`: share of questions whose whole answer is right. `location_error`: mean distance of location
    tokens from the truth, in bins of 128. `answered`: how many questions. All teacher-forced on unseen scenes."""

    accuracy: dict[str, float]
    location_error: float
    answered: int

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracy.values())))


def measure_knowledge(
    params: Params, config: ModelConfig, tokenizer: FASTTokenizer, scenes: Scenes, batch_size: int = 100
) -> Knowledge:
    """Every question of every scene, once."""
    tokens = tokenize(scenes, tokenizer)
    scene, which = (a.reshape(-1) for a in np.indices(tokens.tokens.shape[:2]))
    low, high = tokenizer.text.encode("<loc0000>")[0], tokenizer.text.encode("<loc0127>")[0]
    predict = jax.jit(lambda p, batch: predict_tokens(p, config, batch))
    right, errors = [], []
    for start in range(0, len(scene), batch_size):
        rows = np.arange(start, start + batch_size) % len(scene)  # the last batch wraps: one compiled shape
        batch = question_batch(scenes, tokens, scene[rows], which[rows], config)
        got, targets = jax.device_get(predict(params, batch))
        true, scored = targets.labels, targets.valid
        place = (true >= low) & (true <= high) & scored
        distance = np.where((got >= low) & (got <= high), np.abs(got - true), high - low)
        fine = np.where(place, distance <= NEAR, got == true) | ~scored
        fresh = min(batch_size, len(scene) - start)
        right.append(fine.all(axis=1)[:fresh])
        errors.append(distance[:fresh][place[:fresh]])
    kinds = np.array([kind for asked in scenes.questions for kind, _, _ in asked])
    correct = np.concatenate(right)
    accuracy = {kind: float(correct[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))}
    return Knowledge(accuracy, float(np.concatenate(errors).mean()), len(correct))
