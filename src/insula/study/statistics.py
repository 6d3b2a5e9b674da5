"""How sure a study may be: of a mean over seeds and scenes, of a difference, and of many differences at once.

A success is one of a scene and of a training seed, and both were drawn. Two recipes are asked the same scenes, so
scenes are paired; seeds of training are not the same luck in another recipe, so they are not. Tasks are none that were
drawn: each weighs alike, and has scenes of its own.

means          intervals from drawing seeds and scenes again, each with replacement (Owen 2007, “the pigeonhole
               bootstrap”, for crossed factors)
differences    Welch's t with both parts of the variance, between seeds and between scenes, and Satterthwaite's degrees
               of freedom. A test that counts every scene of every seed as a trial of its own, as McNemar's would be,
               takes the luck of a seed for skill: of equal recipes it tells many apart.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.stats import t as student

from insula.errors import InputError

DRAWS = 4000
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE
FEWEST_SEEDS = 2
"""Of a recipe that is compared: one seed does not tell what another would have done."""
Outcomes = Sequence[np.ndarray]
"""By task, each [training seeds, scenes]: 1 for a success."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, and where it would be in 95 of 100 studies like this one."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`second` − `first`, over the same scenes: the mean difference with its interval, and p of its being none, as it
    is and corrected by Holm for all that were asked together."""

    first: str
    second: str
    difference: Interval
    p: float
    p_corrected: float = 1.0

    @property
    def told_apart(self) -> bool:
        """By the corrected test."""
        return self.p_corrected < ALPHA


def crossed_interval(outcomes: Outcomes, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Of the mean over tasks; of one seed, it knows of scenes alone. Raises InputError where there are no outcomes."""
    _check(outcomes)
    rng = np.random.default_rng(seed)
    count = len(outcomes[0])
    seeds = _shares(rng, draws, count)
    if count > 1:  # drawn again from themselves, few vary less than they did when they were drawn
        seeds = 1 / count + (seeds - 1 / count) * math.sqrt(count / (count - 1))

    drawn = [np.einsum("dn,dn->d", seeds @ one, _shares(rng, draws, one.shape[1])) for one in outcomes]
    low, high = np.clip(np.quantile(np.mean(drawn, axis=0), [ALPHA / 2, 1 - ALPHA / 2]), 0, 1)
    return Interval(_mean(outcomes), float(low), float(high))


def paired_difference(first: Outcomes, second: Outcomes) -> tuple[Interval, float]:
    """Mean of `second` − mean of `first`, over the same scenes, with its interval; and p (two-sided) of its being none.
    Raises InputError where the scenes are not the same number, there are none, or one has fewer than two seeds."""
    for outcomes in (first, second):
        _check(outcomes)
        if len(outcomes[0]) < FEWEST_SEEDS:
            raise InputError(f"paired: got {len(outcomes[0])} training seed, expected at least {FEWEST_SEEDS}")
    sizes = [[one.shape[1] for one in outcomes] for outcomes in (first, second)]
    if sizes[0] != sizes[1]:
        raise InputError(f"paired: got {sizes[0]} and {sizes[1]} scenes by task, expected the same ones")

    parts = [_between_seeds(first), _between_seeds(second), *_between_scenes(first, second)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / free for part, free in parts)

    mean = _mean(second) - _mean(first)
    error = math.sqrt(variance)
    reach = float(student.ppf(1 - ALPHA / 2, freedom)) * error
    p = 2 * float(student.sf(abs(mean) / error, freedom))
    return Interval(mean, max(-1.0, mean - reach), min(1.0, mean + reach)), p


def holm(p: Sequence[float]) -> list[float]:
    """p corrected so that 1 in 20 such families has a false positive at 0.05 (Holm 1979)."""
    order = np.argsort(p)
    corrected, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def compare_all(outcomes: Mapping[str, Outcomes]) -> list[Comparison]:
    """Every two of `outcomes`, of the same scenes; corrected together. Raises as `paired_difference`."""
    made = [
        Comparison(first, second, *paired_difference(outcomes[first], outcomes[second]))
        for first, second in combinations(outcomes, 2)
    ]
    corrected = holm([one.p for one in made])
    return [dataclasses.replace(one, p_corrected=p) for one, p in zip(made, corrected, strict=True)]


def not_told_apart(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """The pairs of which the study cannot say that one is better."""
    return [(one.first, one.second) for one in comparisons if not one.told_apart]


def _check(outcomes: Outcomes) -> None:
    shapes = [list(one.shape) for one in outcomes]
    if not shapes or any(one.ndim != 2 or one.size == 0 or len(one) != len(outcomes[0]) for one in outcomes):
        raise InputError(
            f"outcomes: got shapes {shapes}, expected [training seeds, scenes] of each task, as many seeds"
        )


def _mean(outcomes: Outcomes) -> float:
    return float(np.mean([one.mean() for one in outcomes]))


def _between_seeds(outcomes: Outcomes) -> tuple[float, int]:
    """Variance of the mean for the luck of its seeds, with its degrees of freedom."""
    count = len(outcomes[0])
    found = float(np.mean([one.mean(axis=1) for one in outcomes], axis=0).var(ddof=1))

    # At least that of so many trials: three seeds that all succeeded everywhere are not the certainty that more will.
    trials = sum(one.size for one in outcomes)
    rate = (_mean(outcomes) * trials + 1) / (trials + 2)
    return max(found, rate * (1 - rate) * count / trials) / count, count - 1


def _between_scenes(first: Outcomes, second: Outcomes) -> list[tuple[float, int]]:
    """Variance of the difference for the scenes that were drawn, by task, with its degrees of freedom."""
    found = []
    for a, b in zip(first, second, strict=True):
        by_scene = b.mean(axis=0) - a.mean(axis=0)
        spread = float(by_scene.var(ddof=1)) if len(by_scene) > 1 else 1.0
        found.append((spread / len(by_scene) / len(first) ** 2, max(1, len(by_scene) - 1)))
    return found


def _shares(rng: np.random.Generator, draws: int, count: int) -> np.ndarray:
    """How often each of `count` things comes when as many are drawn with replacement, as shares: [draws, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=draws) / count
