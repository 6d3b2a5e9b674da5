"""Token sequences of all samples of a source, made when first asked for and kept."""

from collections.abc import Callable

import numpy as np

from insula.shapes import Bool, Int
from insula.tokens.sequence import Tokenized

EAGER = 200_000
"""Up to this many samples are tokenized before training, so that one that is too long is known then. Of more, this many
spread evenly are, and the others when they are drawn."""


class TokenTable:
    """N rows of L columns: tokens int32 and three masks, bool. Rows nobody asks for cost no memory."""

    FIELDS = ("tokens", "token_mask", "ar_mask", "loss_mask")

    tokens: Int[np.ndarray, "n L"]
    token_mask: Bool[np.ndarray, "n L"]
    ar_mask: Bool[np.ndarray, "n L"]
    loss_mask: Bool[np.ndarray, "n L"]

    def __init__(self, size: int, length: int):
        # Zeros cost no memory until they are written over, unlike any other filling.
        self.known = np.zeros(size, bool)
        self.tokens = np.zeros((size, length), np.int32)
        self.token_mask = np.zeros((size, length), bool)
        self.ar_mask = np.zeros((size, length), bool)
        self.loss_mask = np.zeros((size, length), bool)

    def put(self, row: int, sample: Tokenized) -> None:
        """Keep the sequence of one row."""
        for name in self.FIELDS:
            getattr(self, name)[row] = getattr(sample, name)

        # Last: should writing fail, the row is still unknown.
        self.known[row] = True

    def take(self, rows: np.ndarray, tokenize: Callable[[np.ndarray], None]) -> dict[str, np.ndarray]:
        """Every field of these rows. `tokenize` puts those not known yet, each once."""
        # A batch may hold one row twice, where a source is smaller than a batch.
        unknown = np.unique(rows[~self.known[rows]])
        if len(unknown):
            tokenize(unknown)

        return {name: getattr(self, name)[rows] for name in self.FIELDS}


def ahead(count: int) -> np.ndarray:
    """The rows to tokenize before training: all, or EAGER of them spread evenly."""
    # Spread, and not the first ones: long chunks may all be in one episode, recorded late.
    return np.arange(count) if count <= EAGER else np.linspace(0, count - 1, EAGER).astype(np.int64)
