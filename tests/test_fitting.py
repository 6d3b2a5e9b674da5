"""Statistics and FAST over all of a data set: exact however it is split, over files and over processes."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from insula.data import fitting, normalize, quantiles
from insula.data.chunks import chunk_indices, frames_of
from insula.data.command import fit_fast, stats
from insula.data.fitting import action_chunks, fit_stats, measure_fast
from insula.data.lerobot import LeRobotDataset, LeRobotWriter
from insula.data.lerobot.info import Feature
from insula.data.mapping import Columns, RobotData
from insula.data.robot import Robot
from insula.errors import DatasetError, InputError
from insula.tokens.fast import FASTCodec

HORIZON = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RobotData:
    """Eleven episodes in several files, as a recorder with small files leaves them."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data") / "set"
    features = {"observation.state": Feature("float32", (3,), ("x", "y", "z")), "action": Feature("float32", (4,))}
    with LeRobotWriter(root, 10, features, file_megabytes=0.004) as writer:
        for episode in range(11):
            n = 20 + 7 * episode
            state = rng.normal(size=(n, 3)).cumsum(0).astype(np.float32)
            action = rng.standard_t(2, size=(n, 4)).astype(np.float32)
            action[:, 2], action[:, 3] = 0.25, rng.random(n) < 0.003  # one constant, one that rarely moves
            writer.add_episode({"observation.state": state, "action": action}, "go")
    found = RobotData(root, {})
    assert LeRobotDataset(root).files > 2
    return found


@pytest.fixture(autouse=True)
def calm() -> None:
    warnings.simplefilter("ignore")


def fields(found: normalize.NormStats) -> dict[str, np.ndarray]:
    return {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "kind"}


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 50_000])
def test_quantiles_in_passes_are_numpys(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = np.stack([rng.standard_t(1.5, size), np.round(rng.normal(size=size)), np.full(size, 7.0)], 1)
    blocks = np.array_split(rows.astype(np.float32), 7)
    blocks = [block for block in blocks if len(block)]
    whole = quantiles.merge_moments(map(quantiles.moments, blocks))
    wanted = quantiles.wanted_bins(sum(quantiles.counts(block, whole) for block in blocks), (0.0, 0.01, 0.5, 0.99, 1.0))
    parts = [quantiles.candidates(block, whole, wanted) for block in blocks]
    found = quantiles.quantiles(parts, wanted, whole, (0.0, 0.01, 0.5, 0.99, 1.0))
    expected = np.quantile(rows.astype(np.float32).astype(np.float64), (0.0, 0.01, 0.5, 0.99, 1.0), axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.std, rows.astype(np.float32).astype(np.float64).std(0), rtol=1e-9, atol=1e-12)
    if size > 1000:
        assert sum(len(values) for part in parts for values in part.values()) < 2.1 * size  # of 3 columns


@pytest.mark.parametrize("processes", [1, 2])
def test_statistics_are_those_of_all_episodes(data: RobotData, processes: int) -> None:
    dataset = LeRobotDataset(data.path)
    found = fit_stats(data, HORIZON, processes=processes)
    for name, column in (("state", "observation.state"), ("actions", "action")):
        expected = normalize.fit_stats_of(dataset.column(column))
        for key, value in fields(expected).items():
            np.testing.assert_allclose(fields(found[name])[key], value, rtol=1e-9, atol=1e-12)
    first = normalize.fit_stats_of(dataset.column("action")[:20])
    assert not np.allclose(first.q99[:2], found["actions"].q99[:2])  # the first episode alone would not do


def test_statistics_of_some_episodes(data: RobotData) -> None:
    dataset = LeRobotDataset(data.path)
    frames, _ = frames_of(dataset, np.array([0, 9]))
    expected = normalize.fit_stats_of(dataset.column("action")[frames])
    np.testing.assert_allclose(fit_stats(data, HORIZON, [9, 0])["actions"].q01, expected.q01, rtol=1e-12)


def with_values(data: RobotData, root: Path, change: Callable[[np.ndarray], None]) -> RobotData:
    """A copy whose actions, all episodes in a row, are changed."""
    shutil.copytree(data.path, root)
    actions = LeRobotDataset(root).column("action").copy()
    change(actions)
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        place, mine = table.column_names.index("action"), actions[table["index"].to_numpy()]
        values = pa.FixedSizeListArray.from_arrays(pa.array(mine.ravel()), mine.shape[1])
        pq.write_table(table.set_column(place, table.schema.field(place), values), path)
    return RobotData(root, {})


def test_a_nan_counts_in_the_episodes_asked_for(data: RobotData, tmp_path: Path) -> None:
    def spoil(actions: np.ndarray) -> None:
        actions[20 + 3, 1] = np.nan  # episode 1, in the same file as episode 0

    spoiled = with_values(data, tmp_path / "set", spoil)
    expected, found = fit_stats(data, HORIZON, [0, 2])["actions"], fit_stats(spoiled, HORIZON, [0, 2])["actions"]
    np.testing.assert_array_equal(found.mean, expected.mean)
    with pytest.raises(InputError, match=r"episode 1, frame 3: action\[1\] is nan"):
        fit_stats(spoiled, HORIZON, [0, 1])


def test_nothing_left_to_measure_is_said(data: RobotData, tmp_path: Path) -> None:
    spoiled = with_values(data, tmp_path / "set", lambda actions: actions.fill(np.inf))
    with pytest.raises(DatasetError, match="actions has no frame without NaN or infinity"):
        fit_stats(spoiled, HORIZON, skip_non_finite=True)


@pytest.mark.parametrize("at_once", [2**17, 60])
def test_relative_actions_are_measured_as_they_are_learned(
    data: RobotData, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", at_once)
    dataset = LeRobotDataset(data.path)
    frames, stop = frames_of(dataset, np.arange(11))
    index, is_pad = chunk_indices(frames, stop, HORIZON)
    chunks = dataset.column("action")[index]
    chunks[..., [0, 2]] -= dataset.column("observation.state")[frames][:, None, [0, 2]]
    expected = normalize.fit_stats_of(chunks[~is_pad])
    found = fit_stats(dataclasses.replace(data, delta=(0, 2)), HORIZON)["actions"]
    for key, value in fields(expected).items():
        np.testing.assert_allclose(fields(found)[key], value, rtol=1e-5, atol=1e-6)


def test_columns_are_joined_in_order(data: RobotData) -> None:
    some = dataclasses.replace(data, state=(Columns("action", (1,)), Columns("observation.state", (2, 0))))
    found, whole = fit_stats(some, HORIZON)["state"], fit_stats(data, HORIZON)
    np.testing.assert_array_equal(found.max, [whole["actions"].max[1], *whole["state"].max[[2, 0]]])


def test_a_robot_without_a_state(data: RobotData) -> None:
    found = fit_stats(dataclasses.replace(data, state=()), HORIZON)["state"]
    assert found.dim == 0 and found.normalize(np.zeros((2, 0))).shape == (2, 0)


@pytest.mark.parametrize("kind", ["min_max", "mean_std", "none", "quantiles"])
def test_every_kind_of_normalization_comes_back(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 2))
    found = normalize.fit_stats_of(values, kind=kind)
    scaled = found.normalize(values)
    np.testing.assert_allclose(found.unnormalize(scaled), values, atol=1e-5)
    expected = {
        "min_max": lambda: (np.abs(scaled).max(), 1.0),
        "mean_std": lambda: (scaled.std(), 1.0),
        "none": lambda: (scaled, values),
        "quantiles": lambda: (np.quantile(scaled, 0.99, axis=0), 1.0),
    }
    np.testing.assert_allclose(*expected[kind](), rtol=1e-5)
    normalize.save_stats(tmp_path / "s.json", {"state": found})
    again = normalize.load_stats(tmp_path / "s.json")["state"]
    assert again.kind == kind and np.array_equal(again.normalize(values), scaled)
    (tmp_path / "s.json").write_text((tmp_path / "s.json").read_text().replace(f'"{kind}"', '"quantile"'))
    with pytest.raises(ValueError, match="kind is 'quantile', expected one of quantiles"):
        normalize.load_stats(tmp_path / "s.json")


@pytest.mark.parametrize("processes", [1, 2])
def test_chunks_come_from_all_episodes_whoever_cuts_them(data: RobotData, processes: int) -> None:
    robot = Robot(fit_stats(data, HORIZON), (), HORIZON)
    chunks, clipped = action_chunks(data, robot, limit=100, processes=processes)
    dataset = LeRobotDataset(data.path)
    rows = np.linspace(0, len(dataset) - 1, 100).astype(int)
    index, _ = chunk_indices(rows, dataset.episodes.stop[dataset.episodes.of_frame(rows)], HORIZON)
    expected = robot.stats["actions"].normalize(dataset.column("action")[index])
    np.testing.assert_array_equal(chunks, np.clip(expected, -2, 2))
    assert clipped == pytest.approx((np.abs(expected) > 2).mean()) and clipped > 0


def test_a_codecs_report_counts_what_is_there() -> None:
    rng = np.random.default_rng(0)
    chunks = np.clip(rng.normal(size=(300, HORIZON, 2)).cumsum(1) / 3, -2, 2).astype(np.float32)
    codec = FASTCodec.fit(chunks[:100], 300, 8.0)
    lengths = [len(codec.encode(chunk)) for chunk in chunks]
    errors = [codec.decode(codec.encode(c), HORIZON, 2).actions - c for c in chunks]
    for processes in (1, 2):
        report = measure_fast(codec, chunks, budget=9, processes=processes)
        assert report.tokens == {"p50": np.median(lengths), "p99": np.quantile(lengths, 0.99), "max": max(lengths)}
        assert report.over_budget == sum(n + 2 > 9 for n in lengths) > 0
        assert report.reconstruction_error == pytest.approx(np.sqrt(np.mean(np.square(errors))))
        assert report.chunks == 300 and report.out_of_range == 0
    beyond = FASTCodec(codec.tokenizer, codec.scale, -8, codec.vocab_size)
    assert 0 < measure_fast(beyond, chunks, budget=99).out_of_range < 300
    with pytest.raises(ValueError, match="none of 300 chunks can be written"):
        measure_fast(FASTCodec(codec.tokenizer, codec.scale, 999, codec.vocab_size), chunks, budget=99)


def test_the_commands_write_what_training_takes(data: RobotData, tmp_path: Path) -> None:
    text = stats(data.path, HORIZON, tmp_path / "norm_stats.json", limit=1000, processes=1)
    assert "constant: always 0" in text and "rarely moves" in text and "action[2]" in text and "%" in text
    written = normalize.load_stats(tmp_path / "norm_stats.json")
    np.testing.assert_array_equal(written["actions"].q99, fit_stats(data, HORIZON)["actions"].q99)
    (tmp_path / "data.toml").write_text(
        f'[robots.a]\npath = "{data.path}"\ncameras = {{}}\nstatistics = "norm_stats.json"\n'
        f'[robots.b]\npath = "{data.path}"\ncameras = {{}}\nhorizon = 3\n'
    )
    text = fit_fast(tmp_path / "data.toml", HORIZON, 20, tmp_path / "fast", 300, 5.0, limit=200, processes=1)
    assert "tokens of a chunk: p50" in text
    report = json.loads((tmp_path / "fast" / "report.json").read_text())
    assert report["a"]["chunks"] == report["b"]["chunks"] == 200
    assert report["a"]["tokens"]["p50"] > report["b"]["tokens"]["p50"]  # longer chunks
    assert FASTCodec.load(tmp_path / "fast").time_horizon is None
    stats(tmp_path / "data.toml", HORIZON, tmp_path / "both", limit=10, processes=1)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["a.json", "b.json"]
