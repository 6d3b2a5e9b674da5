"""Several sources of samples drawn by weight into one batch: robots of different sizes, and questions.

A batch's rows are of one shape; what differs is masked. The two masks of the KI paper follow from the data:
M_language is `loss_mask.any()`, M_action is `action_mask.any()` of a sample.
"""

import json
import logging
from collections.abc import Mapping as Table
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np

from insula.batch import Batch
from insula.data.config import BadSample
from insula.errors import DatasetError, InputError

log = logging.getLogger(__name__)


@runtime_checkable
class SampleSource(Protocol):
    """What a mixture draws from: `Samples`, `QuestionSamples`."""

    @property
    def quarantined(self) -> int:
        """How many samples were left out before any was drawn."""
        ...

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The samples `rows` [B]. Raises DatasetError where one cannot be read."""
        ...

    def where(self, row: int) -> str:
        """Which sample it is, for a person."""
        ...


class Order:
    """`order[step]` -> (source [B], row [B]): which sample of which source, a pure function of (seed, step).

    Each source is shuffled again every time it has been seen whole. Sources are interleaved evenly by weight, so that
    any stretch of samples holds each one's share to within one. Any step costs the same; there is no state.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int):
        """Raises InputError for no samples, weights that are not positive, or of another number than the sources."""
        if min(sizes, default=0) < 1 or batch_size < 1:
            raise InputError(f"loader: got {list(sizes)} samples and batch size {batch_size}, expected at least 1 each")
        if len(weights) != len(sizes) or not all(weight > 0 for weight in weights):
            raise InputError(f"loader: got weights {list(weights)} for {len(sizes)} sources, expected one > 0 for each")

        total = sum(weights)

        # By number as well as seed: two sources of one size would otherwise be shuffled alike.
        sources = [
            grain.MapDataset.range(size).seed(seed + number).shuffle().repeat().map(_Tag(number))
            for number, size in enumerate(sizes)
        ]

        # Repeated before they are mixed: a small source goes round while a large one is still in its first epoch.
        mixed = grain.MapDataset.mix(sources, [weight / total for weight in weights])
        self._order = mixed.batch(batch_size)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = self._order[step]
        return drawn[:, 0], drawn[:, 1]


class _Tag(grain.transforms.Map):
    """A row with its source's number."""

    def __init__(self, number: int):
        self.number = number

    def map(self, element: int) -> np.ndarray:
        return np.array([self.number, element])


class Mixture:
    """`sources` by name, drawn by `weights`.

    on_bad: what happens where a sample's picture cannot be read. "fail" raises its DatasetError; "quarantine" puts the
    next readable sample of that source in its place, and writes the bad one to `quarantine`, a JSON-lines file.
    """

    def __init__(
        self,
        sources: Table[str, SampleSource],
        weights: Sequence[float] | None = None,
        on_bad: BadSample = "fail",
        quarantine: Path | None = None,
    ):
        self.sources = dict(sources)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.sources)
        self.on_bad = on_bad
        self.quarantine = quarantine

        # Known to this process alone: each worker finds the same ones for itself, so all replace them alike.
        self._bad: dict[tuple[str, int], str] = {}

    def order(self, batch_size: int, seed: int) -> Order:
        """Which samples the batches hold, over all sources. Raises InputError as `Order`."""
        return Order([len(source) for source in self.sources.values()], self.weights, batch_size, seed)

    def batch(self, source: np.ndarray, rows: np.ndarray) -> Batch:
        """Row i of the batch is sample rows[i] of source[i]. Raises DatasetError for a bad one, unless quarantined."""
        names = list(self.sources)
        present = np.unique(source).tolist()
        parts = {number: self._part(names[number], rows[source == number]) for number in present}

        # Always so with one source: then a whole batch of pictures need not be copied.
        if len(present) == 1:
            return parts[present[0]]

        # Sources pad to the same sizes, so one gives the shapes of all; every row is written below.
        out = jax.tree.map(lambda x: np.empty((len(rows), *x.shape[1:]), x.dtype), parts[present[0]])
        for number, part in parts.items():
            where = np.flatnonzero(source == number)
            for whole, piece in zip(jax.tree.leaves(out), jax.tree.leaves(part), strict=True):
                whole[where] = piece

        return out

    def _part(self, name: str, rows: np.ndarray) -> Batch:
        source = self.sources[name]
        if self.on_bad == "fail":
            return source.batch(rows)

        # Those known to be bad first, so that one bad sample does not cost every epoch a failed batch.
        rows = np.array([self._next_readable(name, row) if (name, row) in self._bad else row for row in rows.tolist()])
        try:
            return source.batch(rows)
        except DatasetError:
            # Sample by sample: a batch's error names one of them, and there may be more.
            return source.batch([self._next_readable(name, row) for row in rows.tolist()])

    def _next_readable(self, name: str, row: int) -> int:
        """`row`, or the first after it that can be read. Raises DatasetError where there is none."""
        size = len(self.sources[name])

        # The next row, and not a random one: the same replacement after a resume and in every worker.
        for candidate in range(row, row + size):
            if self._read(name, candidate % size):
                return candidate % size

        raise DatasetError(f"{name}: no sample of this source can be read; one of them: {self._bad[name, row]}")

    def _read(self, name: str, row: int) -> bool:
        """Whether a sample can be read; one that cannot is written down."""
        if (name, row) in self._bad:
            return False

        source = self.sources[name]
        try:
            source.batch([row])
        except DatasetError as e:
            self._bad[name, row] = str(e)
            log.warning("quarantined: %s: %s", source.where(row), e)
            if self.quarantine is not None:
                line = json.dumps({"source": name, "row": row, "where": source.where(row), "because": str(e)})

                # Appended, by several workers perhaps: so short a line is written whole.
                with self.quarantine.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")

            return False

        return True


def quarantined(mixture: Mixture) -> int:
    """How many different samples were left out: those that could not be read so far, by this process or its workers,
    and those whose numbers are not finite."""
    left_out = sum(source.quarantined for source in mixture.sources.values())
    if mixture.quarantine is None or not mixture.quarantine.is_file():
        return left_out

    # Each worker writes down what it met, so a sample may stand there several times.
    rows = map(json.loads, mixture.quarantine.read_text(encoding="utf-8").splitlines())

    return left_out + len({(row["source"], row["row"]) for row in rows})
