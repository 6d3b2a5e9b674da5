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
"""A location counts as right within this many bins of 128: one pixel of a 64-pixel image."""


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """`accuracy[kind]`: share of questions whose whole answer is right. `location_error`: mean distance of location
    tokens from the truth, in bins of 128. `answered`: how many questions. All teacher-forced on unseen scenes."""

    accuracy: dict[str, float]
    location_error: float
    answered: int

    @property
    def mean(self) -> float:
        """Over kinds, each counted once, so that a kind with many questions does not hide another."""
        return float(np.mean(list(self.accuracy.values())))


def measure_knowledge(
    params: Params, config: ModelConfig, tokenizer: FASTTokenizer, scenes: Scenes, batch_size: int = 100
) -> Knowledge:
    """Ask every question of every scene once, `batch_size` at a time; all random choices were made with `scenes`.

    An answer is right where every one of its tokens is, given the true tokens before it. Location tokens may be `NEAR`.
    Raises TokenBudgetError where a question or an answer is longer than the tokenizer allows.
    """
    tokens = tokenize(scenes, tokenizer)
    scene, which = (a.reshape(-1) for a in np.indices(tokens.tokens.shape[:2]))

    # Location tokens follow each other in the vocabulary, so a difference of ids is a distance in bins.
    low, high = tokenizer.text.encode("<loc0000>")[0], tokenizer.text.encode("<loc0127>")[0]
    # Parameters come in as an argument: closed over, they would be constants of the program.
    predict = jax.jit(lambda p, batch: predict_tokens(p, config, batch))
    right, errors = [], []

    for start in range(0, len(scene), batch_size):
        rows = np.arange(start, start + batch_size) % len(scene)  # the last batch wraps: one compiled shape
        batch = question_batch(scenes, tokens, scene[rows], which[rows], config)
        got, targets = jax.device_get(predict(params, batch))
        true, scored = targets.labels, targets.valid

        # A word where a place was due is as far off as a place can be: left out, it would improve the mean.
        place = (true >= low) & (true <= high) & scored
        distance = np.where((got >= low) & (got <= high), np.abs(got - true), high - low)
        fine = np.where(place, distance <= NEAR, got == true) | ~scored  # slots without a token cannot be wrong

        fresh = min(batch_size, len(scene) - start)  # the rest of a last batch was counted in the first
        right.append(fine.all(axis=1)[:fresh])
        errors.append(distance[:fresh][place[:fresh]])

    kinds = np.array([kind for asked in scenes.questions for kind, _, _ in asked])
    correct = np.concatenate(right)
    accuracy = {kind: float(correct[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))}
    return Knowledge(accuracy, float(np.concatenate(errors).mean()), len(correct))
