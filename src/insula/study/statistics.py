"""How sure a study may be: of a mean over seeds and scenes, of a difference, and of many differences at once.

A success is one of a scene and of a training seed, and both were drawn. Two recipes are asked the same scenes, so
scenes are paired; seeds of training are not the same luck in another recipe, so they are not. Intervals come from
drawing seeds and scenes again, each with replacement (Owen 2007, “the pigeonhole bootstrap”, for crossed factors).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.stats import binomtest

from insula.errors import InputError

DRAWS = 4000
CONFIDENCE = 0.95
ALPHA = 1 - CONFIDENCE


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean, and where it would be in 95 of 100 studies like this one."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`second` − `first`, over the same scenes: the mean difference with its interval; of single trials, how often one
    alone succeeded; and p of McNemar's exact test, as it is and corrected by Holm for all that were made together."""

    first: str
    second: str
    difference: Interval
    only_first: int
    only_second: int
    p: float
    p_corrected: float = 1.0

    @property
    def told_apart(self) -> bool:
        """By both: the interval, which knows of seeds, and the corrected test, which knows of the other questions."""
        beyond = self.difference.low > 0 or self.difference.high < 0
        return beyond and self.p_corrected < ALPHA


def crossed_interval(outcomes: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Of the mean of `outcomes` [training seeds, scenes]. Raises InputError where there are none."""
    _check(outcomes)
    rng = np.random.default_rng(seed)
    scenes = _shares(rng, draws, outcomes.shape[1])
    return _interval(float(outcomes.mean()), _means(outcomes, rng, scenes))


def paired_difference(first: np.ndarray, second: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Of mean(`second`) − mean(`first`), each [its training seeds, scenes], over the same scenes. Raises InputError
    where the scenes are not the same number, or there are none."""
    _check(first)
    _check(second)
    if first.shape[1] != second.shape[1]:
        raise InputError(f"paired: got {first.shape[1]} and {second.shape[1]} scenes, expected the same ones")

    rng = np.random.default_rng(seed)
    scenes = _shares(rng, draws, first.shape[1])  # one draw for both: that is what pairs them
    found = _means(second, rng, scenes) - _means(first, rng, scenes)
    return _interval(float(second.mean() - first.mean()), found)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """How often `first` alone succeeded, how often `second` alone did, and p of the exact two-sided test that one is as
    likely as the other (McNemar 1947). 1 where they never differ. Both bool [n], the same trials."""
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    differing = only_first + only_second
    return only_first, only_second, float(binomtest(only_first, differing).pvalue) if differing else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p corrected so that 1 in 20 such families has a false positive at 0.05 (Holm 1979)."""
    order = np.argsort(p)
    corrected, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def compare_all(outcomes: Mapping[str, np.ndarray], seed: int = 0, draws: int = DRAWS) -> list[Comparison]:
    """Every two of `outcomes`, each bool [training seeds, scenes] of the same scenes; corrected together."""
    made = []
    for first, second in combinations(outcomes, 2):
        a, b = outcomes[first], outcomes[second]
        both = min(len(a), len(b))  # seeds that both have: a trial of the test is a scene and a seed's number
        only_first, only_second, p = mcnemar(a[:both].ravel(), b[:both].ravel())
        difference = paired_difference(a.astype(float), b.astype(float), seed, draws)
        made.append(Comparison(first, second, difference, only_first, only_second, p))

    corrected = holm([one.p for one in made])
    return [dataclasses.replace(one, p_corrected=p) for one, p in zip(made, corrected, strict=True)]


def not_told_apart(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """The pairs of which the study cannot say that one is better."""
    return [(one.first, one.second) for one in comparisons if not one.told_apart]


def _check(outcomes: np.ndarray) -> None:
    if outcomes.ndim != 2 or outcomes.size == 0:
        raise InputError(f"outcomes: got shape {outcomes.shape}, expected [training seeds, scenes], at least 1 of each")


def _shares(rng: np.random.Generator, draws: int, count: int) -> np.ndarray:
    """How often each of `count` things comes when as many are drawn with replacement, as shares: [draws, count]."""
    return rng.multinomial(count, np.full(count, 1 / count), size=draws) / count


def _means(outcomes: np.ndarray, rng: np.random.Generator, scenes: np.ndarray) -> np.ndarray:
    """The mean of each draw [draws], of training seeds drawn here and of `scenes` drawn already."""
    seeds = _shares(rng, len(scenes), len(outcomes))
    return np.einsum("dn,dn->d", seeds @ outcomes, scenes)


def _interval(mean: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(mean, float(low), float(high))
