"""Statistics and FAST over a whole data set, one data file at a time, over as many processes as asked for."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from insula.data import normalize, quantiles
from insula.data.chunks import check_delta, chosen_episodes, chunk_indices, dim_names, frames_of, joined
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.mapping import Columns, RobotData
from insula.data.normalize import NormStats
from insula.data.robot import Robot, relative
from insula.data.workers import Map, mapping_over
from insula.errors import DatasetError, FASTRangeError, InputError
from insula.tokens.fast import FASTCodec

log = logging.getLogger(__name__)

RANGE_QUANTILES = (0.01, 0.99)
# Rows of a block, after the steps of chunks are laid out: of 32 dimensions 16 MiB.
ROWS_AT_ONCE = 2**17
# Chunks of one task: enough that sending them to a process costs little beside encoding them.
ENCODED_AT_ONCE = 2000
LOOKED_AT = 8
"""Data files, spread evenly, that are compared with statistics made elsewhere."""
Blocks = Callable[[int], Iterable[np.ndarray]]


@dataclass(frozen=True, eq=False)
class _Pass:
    """What every worker must know. `episodes` bool [all]: which are looked at."""

    data: RobotData
    horizon: int
    episodes: np.ndarray
    skip_non_finite: bool


def robot_stats(
    data: RobotData,
    horizon: int,
    episodes: Iterable[SupportsIndex] | None = None,
    processes: int = 1,
    skip_non_finite: bool = False,
) -> dict[str, NormStats]:
    """The statistics the mapping names, else those `fit_stats` finds. Warns by name of dimensions that the file cannot
    have been made for. Raises as `fit_stats`, and InputError where the file contradicts the mapping."""
    if data.statistics is None:
        return fit_stats(data, horizon, episodes, processes, skip_non_finite)

    # Numbers alone are asked for: no picture is decoded, so none need be kept.
    dataset = LeRobotDataset(data.path, cache_bytes=0)
    names = {part: dim_names(dataset, columns) for part, columns in _parts(data).items()}
    stats = normalize.load_mapped_stats(data.statistics, data.normalization, {k: len(n) for k, n in names.items()})

    # A look at some files, to warn: a NaN is for whoever reads all of them.
    work = _prepared(dataset, data, horizon, episodes, skip_non_finite=True)
    some = np.unique(np.linspace(0, dataset.files - 1, LOOKED_AT).astype(int)).tolist()
    for part in names:
        if not names[part]:
            continue

        normalize.warn_of_constants(stats[part], names[part], f"{data.statistics}, {part}")
        # The first block of each file is enough to tell radians from degrees.
        values = np.concatenate([next(_blocks(work, part, file)) for file in some])
        if strange := [names[part][i] for i in np.flatnonzero(normalize.strangers(stats[part], values)).tolist()]:
            log.warning(
                "%s, %s: %s of data set %s lie far outside the statistics, or within a hundredth of their range; are "
                "they of another robot, or in other units? insula data stats shows both",
                data.statistics,
                part,
                ", ".join(strange),
                data.path,
            )

    return stats


def _parts(data: RobotData) -> dict[str, tuple[Columns, ...]]:
    return {"state": data.state, "actions": data.actions}


def fit_stats(
    data: RobotData,
    horizon: int,
    episodes: Iterable[SupportsIndex] | None = None,
    processes: int = 1,
    skip_non_finite: bool = False,
) -> dict[str, NormStats]:
    """{"state": ..., "actions": ...} over all frames of `episodes` (all by default), quantiles exact. Dimensions in
    `data.delta` are measured as they are learned: over all real steps of all chunks, relative to the state. A state
    without columns has no "state" dimension.

    Raises DatasetError; InputError for NaN or infinity, naming where, unless they are to be skipped.
    """
    dataset = LeRobotDataset(data.path, cache_bytes=0)
    work = _prepared(dataset, data, horizon, episodes, skip_non_finite)

    # One pool for all passes and both parts: each worker opens the data set once.
    with mapping_over(min(processes, dataset.files)) as over:
        return {
            name: _stats(over, partial(_blocks, work, name), dataset.files, data, name, dim_names(dataset, columns))
            if columns
            else normalize.nothing(data.normalization)
            for name, columns in _parts(data).items()
        }


def _prepared(
    dataset: LeRobotDataset,
    data: RobotData,
    horizon: int,
    episodes: Iterable[SupportsIndex] | None,
    skip_non_finite: bool,
) -> _Pass:
    check_delta(dataset, data)
    included = np.zeros(len(dataset.episodes), bool)
    included[chosen_episodes(dataset, episodes)] = True

    return _Pass(data, data.horizon or horizon, included, skip_non_finite)


def _stats(over: Map, blocks: Blocks, count: int, data: RobotData, what: str, names: list[str]) -> NormStats:
    files = range(count)
    # Three passes over the files, each of which needs what the one before found. A file may have none of the episodes.
    moments = [part for part in over(partial(_moments, blocks), files) if part is not None]
    if not moments:
        raise DatasetError(
            f"data set {data.path}: {what} has no frame without NaN or infinity to measure; insula data doctor lists "
            "them"
        )

    whole = quantiles.merge_moments(moments)
    histogram = sum(
        over(partial(_counts, blocks, whole), files), np.zeros((len(names), quantiles.HISTOGRAM_BINS), np.int64)
    )

    # Values are sent back for these bins alone: a thousandth of all, where they spread evenly.
    wanted = quantiles.wanted_bins(histogram, RANGE_QUANTILES)
    parts = list(over(partial(_candidates, blocks, whole, wanted), files))
    q01, q99 = quantiles.quantiles(parts, wanted, whole, RANGE_QUANTILES)

    stats = NormStats(whole.mean, whole.std, q01, q99, whole.min, whole.max, data.normalization)
    normalize.warn_of_constants(stats, names, f"{data.path}, {what}")

    return stats


def _moments(blocks: Blocks, file: int) -> quantiles.Moments | None:
    parts = [quantiles.moments(block) for block in blocks(file) if len(block)]
    return quantiles.merge_moments(parts) if parts else None


def _counts(blocks: Blocks, whole: quantiles.Moments, file: int) -> np.ndarray:
    none = np.zeros((len(whole.mean), quantiles.HISTOGRAM_BINS), np.int64)
    return sum((quantiles.counts(block, whole) for block in blocks(file)), none)


def _candidates(
    blocks: Blocks, whole: quantiles.Moments, wanted: quantiles.Wanted, file: int
) -> dict[tuple[int, int], np.ndarray]:
    parts = [quantiles.candidates(block, whole, wanted) for block in blocks(file)]
    return {key: np.concatenate([part[key] for part in parts]) for key in wanted}


# The episode table is read once in each worker, and not again for each file.
@lru_cache(maxsize=1)
def _open(path: Path) -> LeRobotDataset:
    return LeRobotDataset(path, cache_bytes=0)


def _frames(work: _Pass, file: int) -> tuple[LeRobotDataset, np.ndarray, np.ndarray, int]:
    """(data set, included frames of a data file, one past the end of each one's episode, the file's first frame)."""
    dataset = _open(work.data.path)
    start, stop = dataset.frames_of(file)
    members = np.array([e for e in dataset.episodes.between(start, stop) if work.episodes[e]], np.int64)
    if not len(members):
        return dataset, np.zeros(0, np.int64), np.zeros(0, np.int64), start

    return dataset, *frames_of(dataset, members), start


def _values(work: _Pass, name: str, file: int) -> np.ndarray:
    """float32 [frames of the file, D]."""
    dataset = _open(work.data.path)
    columns = work.data.state if name == "state" else work.data.actions
    values = joined(dataset, columns, lambda column: dataset.read_column(column, file))

    # Before any arithmetic: a message must name the frame, which a mean no longer knows. Frames of episodes that are
    # not asked for may hold anything.
    if not work.skip_non_finite:
        _, frames, _, start = _frames(work, file)
        asked = np.zeros(len(values), bool)
        asked[frames - start] = True
        refuse_non_finite_frames(dataset, np.where(asked[:, None], values, 0), start, dim_names(dataset, columns))

    return values


def _blocks(work: _Pass, name: str, file: int) -> Iterator[np.ndarray]:
    """What the statistics are made of, [n, D] at a time; at least one, which may be empty."""
    _, frames, stop, start = _frames(work, file)
    values, horizon = _values(work, name, file), work.horizon

    # Without delta every step of a chunk is some frame's action: frames alone give the same values, H times fewer.
    is_relative = name == "actions" and bool(work.data.delta)
    state = _values(work, "state", file) if is_relative else values
    at_once = ROWS_AT_ONCE // horizon if is_relative else ROWS_AT_ONCE
    for first in range(0, max(len(frames), 1), at_once):
        some = slice(first, first + at_once)
        if is_relative:
            chunks, is_pad = chunk_indices(frames[some], stop[some], horizon)
            # Padded steps repeat the last action and are not learned, so they are not measured either.
            rows = relative(values[chunks - start], state[frames[some] - start], work.data.delta)[~is_pad]
        else:
            rows = values[frames[some] - start]

        yield rows[np.isfinite(rows).all(1)] if work.skip_non_finite else rows


def refuse_non_finite_frames(dataset: LeRobotDataset, values: np.ndarray, first: int, names: list[str]) -> None:
    """Raises InputError naming episode, frame and dimension of the first value that is NaN or infinite."""
    if np.isfinite(values).all():
        return

    row, dim = np.argwhere(~np.isfinite(values))[0].tolist()
    episode, frame = dataset.episodes.locate(first + row)
    raise InputError(
        f"data set {dataset.root}, episode {episode}, frame {frame}: {names[dim]} is {values[row, dim]}; "
        "expected finite numbers. insula data doctor lists all of them; insula train --on-bad-sample quarantine leaves "
        "them out"
    )


# --- FAST ------------------------------------------------------------------------------------------------------------


def action_chunks(
    data: RobotData,
    robot: Robot,
    episodes: Iterable[SupportsIndex] | None = None,
    limit: int | None = None,
    processes: int = 1,
) -> tuple[np.ndarray, float]:
    """(chunks float32 [N, H, D] exactly as they are tokenized, fraction of values that were clipped).

    With `limit`, that many spread evenly over all frames of `episodes`. Chunks with a NaN are left out.
    """
    dataset = LeRobotDataset(data.path, cache_bytes=0)
    work = _prepared(dataset, data, robot.horizon, episodes, skip_non_finite=True)

    # Numbered over the included episodes alone: the same chunks, however many files and processes there are.
    total = int(dataset.episodes.length[work.episodes].sum())
    rows = np.arange(total) if limit is None or limit >= total else np.linspace(0, total - 1, limit).astype(np.int64)

    # For each episode, how many included frames lie before it.
    included = [int(dataset.episodes.length[e]) if work.episodes[e] else 0 for e in range(len(dataset.episodes))]
    before = np.concatenate([[0], np.cumsum(included)])
    tasks = []
    for file in range(dataset.files):
        members = dataset.episodes.between(*dataset.frames_of(file))
        low, high = before[members.start], before[members.stop]
        tasks.append((file, rows[(rows >= low) & (rows < high)] - low))

    with mapping_over(min(processes, dataset.files)) as over:
        parts = list(over(partial(_chunks, work, robot), tasks))

    chunks = np.concatenate([chunk for chunk, _ in parts])

    return chunks, sum(clipped for _, clipped in parts) / max(chunks.size, 1)


def _chunks(work: _Pass, robot: Robot, task: tuple[int, np.ndarray]) -> tuple[np.ndarray, int]:
    file, rows = task
    _, frames, stop, start = _frames(work, file)
    index, _ = chunk_indices(frames[rows], stop[rows], robot.horizon)
    actions = _values(work, "actions", file)[index - start]
    # Without delta the state does not enter, and a NaN in it must not cost a chunk.
    state = _values(work, "state", file)[frames[rows] - start] if work.data.delta else np.zeros((len(rows), 0))

    # Left out whatever the setting: whether a NaN is an error is decided where samples are made.
    finite = np.isfinite(actions).all((1, 2)) & np.isfinite(state).all(1)
    chunk = robot.normalize_actions(actions[finite], state[finite])

    # Clipped as in training, so that the codec is fitted to what it will have to write.
    return np.clip(chunk, -robot.clip, robot.clip), int((np.abs(chunk) > robot.clip).sum())


@dataclass(frozen=True)
class FASTReport:
    """What a codec makes of a data set's chunks. `tokens`: per chunk, at the median, the 99th percentile and the
    largest; `over_budget`: chunks whose tokens and "|" and EOS exceed `budget`; `out_of_range`: chunks the codec cannot
    write; `reconstruction_error`: rms, normalized; `clipped`: fraction of values."""

    chunks: int
    tokens: dict[str, float]
    budget: int
    over_budget: int
    out_of_range: int
    reconstruction_error: float
    clipped: float

    def to_json(self) -> dict[str, Any]:
        """As report.json holds it."""
        return asdict(self)


def measure_fast(
    codec: FASTCodec, chunks: np.ndarray, budget: int, clipped: float = 0.0, processes: int = 1
) -> FASTReport:
    """Encode and decode every chunk [N, H, D]."""
    parts = np.array_split(chunks, max(1, -(-len(chunks) // ENCODED_AT_ONCE)))
    with mapping_over(min(processes, len(parts))) as over:
        found = list(over(partial(_encoded, codec), parts))

    # Length 0 stands for a chunk that cannot be written: such have no length or error to average.
    lengths = np.concatenate([lengths for lengths, _ in found])
    written = lengths[lengths > 0]
    if not len(written):
        raise InputError(f"FAST: none of {len(chunks)} chunks can be written by this codec; fit one to this data")

    tokens = {"p50": np.median(written), "p99": np.quantile(written, 0.99), "max": written.max()}

    return FASTReport(
        chunks=len(chunks),
        tokens={name: float(value) for name, value in tokens.items()},
        budget=budget,
        # "|" and EOS take their places in the budget too.
        over_budget=int((written + 2 > budget).sum()),
        out_of_range=int((lengths == 0).sum()),
        reconstruction_error=float(np.sqrt(sum(error for _, error in found) / (len(written) * chunks[0].size))),
        clipped=clipped,
    )


def _encoded(codec: FASTCodec, chunks: np.ndarray) -> tuple[np.ndarray, float]:
    """(tokens of each chunk, 0 where it cannot be written; sum of squared errors of those that can)."""
    lengths, error = np.zeros(len(chunks), np.int64), 0.0
    for n, chunk in enumerate(chunks):
        try:
            ids = codec.encode(chunk)
        except FASTRangeError:
            continue

        decoded = codec.decode(ids, *chunk.shape).actions
        assert decoded is not None  # what this codec has written it can read

        lengths[n], error = len(ids), error + float(np.square(decoded - chunk).sum())

    return lengths, error
