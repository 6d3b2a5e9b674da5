"""How sure a rate is: Wilson's score interval, which stays honest at 0 %, at 100 %, and for few episodes.

The textbook interval, rate ± 1.96 · deviation, has no width at all where every episode succeeded or none did, and there
good policies and broken ones are. Wilson's is 96 % to 100 % for 100 of 100, and 44 % to 100 % for 3 of 3.
"""

import dataclasses
import math
from statistics import NormalDist
from typing import Any

from insula.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rate:
    """`count` of `total`, with its interval [low, high]; all as fractions."""

    count: int
    total: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.0%} ({self.low:.0%} to {self.high:.0%})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, fractions as they are."""
        return dataclasses.asdict(self)


def wilson(count: int, total: int, confidence: float = 0.95) -> Rate:
    """The score interval of `count` successes in `total` trials (Wilson 1927; Newcombe 1998, method 3).

    Raises InputError unless 0 ≤ count ≤ total, total ≥ 1 and 0 < confidence < 1.
    """
    if total < 1 or not 0 <= count <= total:
        raise InputError(f"rate: got {count} of {total}, expected 0 <= count <= total and at least one trial")
    if not 0 < confidence < 1:
        raise InputError(f"confidence: got {confidence}, expected a fraction between 0 and 1, such as 0.95")

    # The ends are the two p with |rate − p| = z · sqrt(p (1 − p) / n): with the deviation of p, not of the rate seen.
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    rate = count / total
    center = (rate + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (rate * (1 - rate) / total + z2 / (4 * total**2))) / (1 + z2 / total)

    # At the ends the formula gives exactly 0 and 1; rounding must not say 1e-17.
    low = 0.0 if count == 0 else center - half
    high = 1.0 if count == total else center + half
    return Rate(count, total, rate, low, high)
