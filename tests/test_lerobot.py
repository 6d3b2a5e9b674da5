"""LeRobot v3.0 on disk: ours is checked with plain pyarrow, and theirs, built by hand here, is read by ours."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from insula.data.lerobot import LeRobotDataset, LeRobotWriter
from insula.data.lerobot.info import Feature, image_feature
from insula.errors import DatasetError

LENGTHS, H, W = (5, 7, 4), 6, 8
CAMERA = "observation.images.front"
FEATURES = {
    CAMERA: image_feature(H, W),
    "observation.state": Feature("float32", (2,), ("x", "y")),
    "action": Feature("float32", (3,), ("dx", "dy", "grip")),
    "reward": Feature("float32", (1,)),
}


def episode(rng: np.random.Generator, steps: int) -> dict[str, np.ndarray]:
    return {
        CAMERA: rng.integers(0, 256, (steps, H, W, 3), dtype=np.uint8),
        "observation.state": rng.normal(size=(steps, 2)).astype(np.float32),
        "action": rng.normal(size=(steps, 3)).astype(np.float32),
        "reward": rng.normal(size=steps).astype(np.float32),
    }


def write(root: Path, rng: np.random.Generator, **options: object) -> list[dict[str, np.ndarray]]:
    episodes = [episode(rng, steps) for steps in LENGTHS]
    with LeRobotWriter(root, 10, FEATURES, "toy", **options) as writer:
        for e, frames in enumerate(episodes):
            assert writer.add_episode(frames, task=f"task {e % 2}") == e
    return episodes


@pytest.fixture
def written(tmp_path: Path, np_rng: np.random.Generator) -> tuple[Path, list[dict[str, np.ndarray]]]:
    return tmp_path / "set", write(tmp_path / "set", np_rng)


def joined(episodes: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([frames[name] for frames in episodes])


# --- what is on disk, by the format's own description ----------------------------------------------------------------


def test_info_has_every_key_of_the_format(written):
    root, _ = written
    info = json.loads((root / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 10 and info["robot_type"] == "toy"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 16, 2)
    assert info["data_path"] == "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    assert info["chunks_size"] == 1000 and info["splits"] == {"train": "0:3"} and info["video_path"] is None
    assert info["features"][CAMERA] == {"dtype": "image", "shape": [H, W, 3], "names": ["height", "width", "channels"]}
    assert info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["dx", "dy", "grip"]}
    assert info["features"]["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    assert {"frame_index", "episode_index", "index", "task_index"} <= set(info["features"])


def test_rows_have_the_types_and_numbers_of_the_format(written):
    root, episodes = written
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    assert table.schema.field(CAMERA).type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("action").type == pa.list_(pa.float32(), 3)
    assert table.schema.field("reward").type == table.schema.field("timestamp").type == pa.float32()
    for name in ("frame_index", "episode_index", "index", "task_index"):
        assert table.schema.field(name).type == pa.int64()
    assert table["index"].to_pylist() == list(range(16))
    assert table["frame_index"].to_pylist() == [i for n in LENGTHS for i in range(n)]
    assert table["episode_index"].to_pylist() == [e for e, n in enumerate(LENGTHS) for _ in range(n)]
    assert table["task_index"].to_pylist() == [e % 2 for e, n in enumerate(LENGTHS) for _ in range(n)]
    np.testing.assert_allclose(table["timestamp"].to_numpy(), [i / 10 for n in LENGTHS for i in range(n)], rtol=1e-6)
    np.testing.assert_array_equal(np.array(table["action"].to_pylist(), np.float32), joined(episodes, "action"))
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table[CAMERA].to_pylist()]
    np.testing.assert_array_equal(np.stack(pixels), joined(episodes, CAMERA))
    assert pq.ParquetFile(root / "data/chunk-000/file-000.parquet").num_row_groups == len(LENGTHS)


def test_tasks_and_episode_table(written):
    root, _ = written
    tasks = pq.read_table(root / "meta/tasks.parquet")
    assert tasks["task"].to_pylist() == ["task 0", "task 1"] and tasks["task_index"].to_pylist() == [0, 1]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    table = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")
    assert table["length"].to_pylist() == list(LENGTHS)
    assert table["dataset_from_index"].to_pylist() == [0, 5, 12]
    assert table["dataset_to_index"].to_pylist() == [5, 12, 16]
    assert table["tasks"].to_pylist() == [["task 0"], ["task 1"], ["task 0"]]
    assert table["data/chunk_index"].to_pylist() == table["data/file_index"].to_pylist() == [0, 0, 0]
    assert {"stats/action/mean", f"stats/{CAMERA}/q99", "meta/episodes/file_index"} <= set(table.column_names)


def test_statistics_are_true_global_ones(written):
    root, episodes = written
    stats = json.loads((root / "meta/stats.json").read_text())
    action, pixels = joined(episodes, "action").astype(float), joined(episodes, CAMERA) / 255
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(action, 0.01, axis=0))
    np.testing.assert_allclose(stats["action"]["std"], action.std(0))
    assert stats["action"]["count"] == stats[CAMERA]["count"] == [16]
    for name in ("mean", "std", "min", "max"):
        expected = getattr(pixels, name)(axis=(0, 1, 2))
        assert np.shape(stats[CAMERA][name]) == (3, 1, 1)
        np.testing.assert_allclose(np.ravel(stats[CAMERA][name]), expected, rtol=1e-9)
    np.testing.assert_allclose(np.ravel(stats[CAMERA]["q50"]), np.median(pixels, axis=(0, 1, 2)), atol=1 / 255)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("file_megabytes", [0, 100])
def test_round_trip_with_and_without_cache_in_one_file_and_many(tmp_path, np_rng, cache_bytes, file_megabytes):
    episodes = write(tmp_path / "set", np_rng, file_megabytes=file_megabytes)
    assert len(list((tmp_path / "set/data").rglob("*.parquet"))) == (1 if file_megabytes else 3)
    dataset = LeRobotDataset(tmp_path / "set", cache_bytes)
    assert len(dataset) == 16 and dataset.tasks == ("task 0", "task 1") and dataset.cameras == (CAMERA,)
    assert dataset.episodes.start.tolist() == [0, 5, 12] and dataset.episodes.length.tolist() == list(LENGTHS)
    assert dataset.episodes.of_frame(np.array([0, 4, 5, 15])).tolist() == [0, 0, 1, 2]
    for name in ("observation.state", "action", "reward"):
        np.testing.assert_array_equal(dataset.column(name), joined(episodes, name))
        assert dataset.column(name).dtype == np.float32
    order = np_rng.permutation(16)
    for _ in range(2):  # decoded, then from the cache
        np.testing.assert_array_equal(dataset.images(CAMERA, order), joined(episodes, CAMERA)[order])
    np.testing.assert_array_equal(dataset.image(CAMERA, 7), episodes[1][CAMERA][2])


def test_columns_cannot_be_changed_by_accident(written):
    with pytest.raises(ValueError, match="read-only"):
        LeRobotDataset(written[0]).column("action")[0] = 0


def test_threads_see_the_same_frames(written):
    root, episodes = written
    dataset, seen = LeRobotDataset(root), []
    threads = [threading.Thread(target=lambda: seen.append(dataset.images(CAMERA, np.arange(16)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    for images in seen:
        np.testing.assert_array_equal(images, joined(episodes, CAMERA))


def test_a_set_made_by_others_is_read(tmp_path):
    """As converters leave them: two files, one row group each, lists of free length, unnamed text column, JPEG."""
    root = tmp_path / "theirs"
    state = np.arange(10, dtype=np.float32).reshape(5, 2)
    buffer = io.BytesIO()
    Image.new("L", (W, H), 77).save(buffer, "JPEG")
    for number, rows in enumerate([range(0, 3), range(3, 5)]):
        path = root / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "observation.state": pa.array(state[list(rows)].tolist(), pa.list_(pa.float32())),
            "cam": pa.array([{"bytes": buffer.getvalue(), "path": "x.jpg"}] * len(rows)),
            "timestamp": pa.array([i / 10 for i in range(len(rows))], pa.float32()),
            "frame_index": pa.array(range(len(rows))),
            "episode_index": pa.array([number] * len(rows)),
            "index": pa.array(rows),
            "task_index": pa.array([number] * len(rows)),
        }
        pq.write_table(pa.table(columns), path)
    meta = root / "meta"
    (meta / "episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table({"task_index": [1, 0], "__index_level_0__": ["b", "a"]}), meta / "tasks.parquet")
    table = {
        "episode_index": [1, 0],
        "tasks": [["b"], ["a"]],
        "length": [2, 3],
        "data/chunk_index": [0, 0],
        "data/file_index": [1, 0],
        "dataset_from_index": [3, 0],
        "dataset_to_index": [5, 3],
    }
    pq.write_table(pa.table(table), meta / "episodes/chunk-000/file-000.parquet")
    scalars = {"timestamp": "float32"} | dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "robot_type": None,
        "total_episodes": 2,
        "total_frames": 5,
        "total_tasks": 2,
        "a_key_of_tomorrow": 1,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [2], "names": {"motors": ["a", "b"]}},
            "cam": {"dtype": "image", "shape": [H, W, 3], "names": ["height", "width", "channel"]},
            **{k: {"dtype": v, "shape": [1], "names": None} for k, v in scalars.items()},
        },
    }
    (meta / "info.json").write_text(json.dumps(info))

    dataset = LeRobotDataset(root)
    assert dataset.tasks == ("a", "b") and dataset.feature("observation.state").names == ("a", "b")
    assert dataset.episodes.stop.tolist() == [3, 5] and dataset.episodes.tasks == (("a",), ("b",))
    np.testing.assert_array_equal(dataset.column("observation.state"), state)
    assert np.all(np.abs(dataset.images("cam", range(5)).astype(int) - 77) <= 1)


# --- writing: all or nothing -----------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(written, np_rng):
    root, _ = written
    before = sorted(p.name for p in root.rglob("*"))
    with pytest.raises(DatasetError, match="not empty"):
        LeRobotWriter(root, 10, FEATURES)
    assert sorted(p.name for p in root.rglob("*")) == before
    with LeRobotWriter(root, 10, FEATURES, overwrite=True) as writer:
        writer.add_episode(episode(np_rng, 2), "again")
    assert len(LeRobotDataset(root)) == 2
    assert [p.name for p in root.parent.iterdir()] == ["set"]


def test_an_exception_leaves_nothing_and_keeps_what_was_there(written, np_rng):
    root, _ = written
    with pytest.raises(KeyboardInterrupt), LeRobotWriter(root, 10, FEATURES, overwrite=True) as writer:
        writer.add_episode(episode(np_rng, 2), "interrupted")
        raise KeyboardInterrupt
    assert len(LeRobotDataset(root)) == 16
    assert [p.name for p in root.parent.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.full((3, 3), np.nan, np.float32)}, "nan at frame 0, dimension dx"),
        ({"action": np.zeros((3, 4), np.float32)}, r"shape \(3, 4\), expected \(3, 3\)"),
        ({"action": np.zeros((3, 3), complex)}, "got complex128, expected float32"),
        ({"actoin": np.zeros((3, 3), np.float32)}, "'actoin'.*did you mean 'action'"),
        ({"reward": np.zeros(2, np.float32)}, "differ in length"),
        ({CAMERA: np.zeros((3, W, H, 3), np.uint8)}, r"images of \(8, 6\), expected \(6, 8\)"),
        ({CAMERA: np.zeros((3, H, W, 3), np.float32)}, "expected uint8"),
    ],
)
def test_a_bad_episode_is_refused_by_name(tmp_path, np_rng, change, message):
    writer = LeRobotWriter(tmp_path / "set", 10, FEATURES)
    with pytest.raises(ValueError, match=message):
        writer.add_episode(episode(np_rng, 3) | change, "x")
    writer.add_episode(episode(np_rng, 3), "x")  # the control: nothing of it was kept
    writer.close()
    assert len(LeRobotDataset(tmp_path / "set")) == 3


def test_missing_feature_empty_episode_and_empty_set(tmp_path, np_rng):
    frames = episode(np_rng, 3)
    with pytest.raises(DatasetError, match="nothing to write"), LeRobotWriter(tmp_path / "set", 10, FEATURES) as writer:
        with pytest.raises(DatasetError, match="lacks reward"):
            writer.add_episode({k: v for k, v in frames.items() if k != "reward"}, "x")
        with pytest.raises(DatasetError, match="empty"):
            writer.add_episode({k: v[:0] for k, v in frames.items()}, "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"index": Feature("int64", (1,))}, "filled in by the writer"),
        ({"a/b": Feature("float32", (1,))}, "must not be empty nor contain"),
        ({"m": Feature("float32", (2, 2))}, "flatten it first"),
        ({"m": Feature("float32", (2,), ("x",))}, "1 names for 2 dimensions"),
        ({}, "at least one column"),
    ],
)
def test_features_that_cannot_be_written(tmp_path, features, message):
    with pytest.raises(ValueError, match=message):
        LeRobotWriter(tmp_path / "set", 10, features)
    assert list(tmp_path.iterdir()) == []


# --- damage ----------------------------------------------------------------------------------------------------------


def edit_info(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "meta/info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return apply


def cut(relative: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / relative
        path.write_bytes(path.read_bytes()[:-40])

    return apply


def edit_rows(relative: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda root: pq.write_table(change(pq.read_table(root / relative)), root / relative)


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
NOT_AN_IMAGE = pa.array([{"bytes": b"\x89PNG\r\n\x1a\nrest", "path": ""}] * 16)
FAULTS = {
    "no meta": (lambda root: (root / "meta/info.json").unlink(), "no meta/info.json.*expected the root"),
    "json": (lambda root: (root / "meta/info.json").write_text("{"), "info.json: not JSON"),
    "v1.6": (edit_info(lambda i: i.update(codebase_version="v1.6")), "'v1.6', this reader knows v2.0, v2.1, v3.0"),
    "key": (edit_info(lambda i: i.update(totalframes=i.pop("total_frames"))), "did you mean 'totalframes'"),
    "dtype": (edit_info(lambda i: i["features"]["action"].update(dtype="flaot32")), "did you mean 'float32'"),
    "shape": (edit_info(lambda i: i["features"]["action"].update(shape=["a"])), "expected a list of positive integers"),
    "fps": (edit_info(lambda i: i.update(fps=0)), "fps is 0"),
    "escape": (edit_info(lambda i: i.update(data_path="../x-{file_index:03d}")), "leaves the data set"),
    "template": (edit_info(lambda i: i.update(data_path="{chunk_index.__class__}")), "expected something like"),
    "width": (
        edit_info(lambda i: i["features"]["action"].update(shape=[4])),
        "'action', episode 0, frame 0: has 3 values, expected 4",
    ),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.parquet: missing"),
    "no episodes": (lambda root: (root / EPISODES).unlink(), "no meta/episodes"),
    "no data": (lambda root: (root / DATA).unlink(), "file-000.parquet: missing"),
    "cut data": (cut(DATA), "not a readable parquet file.*cut short"),
    "cut episodes": (cut(EPISODES), "not a readable parquet file"),
    "order": (
        edit_rows(DATA, lambda t: replaced(t, "index", pa.array([1, 0, *range(2, 16)]))),
        "episode 0, frame 0: index is 1, expected 0",
    ),
    "column lost": (edit_rows(DATA, lambda t: t.drop(["action"])), "'action' cannot be read: .* no such column"),
    "size": (edit_info(lambda i: i["features"][CAMERA].update(shape=[H, H, 3])), r"is 6×8 .*, info.json says 6×6"),
    "no image": (edit_rows(DATA, lambda t: replaced(t, CAMERA, NOT_AN_IMAGE)), "episode 0, frame 0: unreadable image"),
}


def read_all(root: Path) -> None:
    dataset = LeRobotDataset(root)
    dataset.column("action")
    dataset.images(CAMERA, range(len(dataset)))


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named(written, fault):
    root, _ = written
    read_all(root)  # the control
    plant, message = FAULTS[fault]
    plant(root)
    with pytest.raises(DatasetError, match=message):
        read_all(root)


def test_missing_data_set_and_wrong_names(written, tmp_path):
    with pytest.raises(DatasetError, match=r"no directory .*insula collect"):
        LeRobotDataset(tmp_path / "nowhere")
    dataset = LeRobotDataset(written[0])
    with pytest.raises(DatasetError, match=r"did you mean 'observation\.state'"):
        dataset.column("observation.stat")
    with pytest.raises(DatasetError, match="ask images"):
        dataset.column(CAMERA)
    with pytest.raises(DatasetError, match="is no camera, it holds float32 values"):
        dataset.images("action", [0])
    with pytest.raises(ValueError, match="frame 16, expected 0 to 15"):
        dataset.image(CAMERA, 16)
