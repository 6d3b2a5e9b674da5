"""What people's own data sets look like: metadata of every kind of damage, tables that contradict the rows, numbering
of every kind, columns nobody can read. Each is read as it is meant, or refused in one line that says what to do.

The data sets are written by `lerobot_files`; what is asserted beside each fault is that the sound one has none.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, LENGTHS, STATE, TASKS, picture, rows, table, v21, v30, write_json

from insula.data.describe import describe
from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.lerobot.info import Feature, parse_feature
from insula.data.lerobot.layout import read_layout
from insula.data.lerobot.remedies import Finding
from insula.data.lerobot.rows import BadRows, numbers, texts
from insula.errors import DatasetError

OLD, NEW = "data/chunk-000/episode_000001.parquet", "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 5145\n"


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta" / "info.json"
    raw = json.loads(path.read_text())
    features = {name: f for name, f in (raw["features"] | changes.pop("features", {})).items() if f is not None}
    path.write_text(json.dumps(raw | changes | {"features": features}))


def edit_rows(root: Path, change: Callable[[pa.Table, int], pa.Table]) -> None:
    """Rewrite every data file; `change` is told its number."""
    for number, path in enumerate(sorted((root / "data").rglob("*.parquet"))):
        pq.write_table(change(pq.read_table(path), number), path)


def put(root: Path, name: str, make: Callable[[pa.Table, int], Any]) -> None:
    """Replace or add a column in every data file."""

    def change(rows: pa.Table, number: int) -> pa.Table:
        rest = rows.drop_columns([name]) if name in rows.column_names else rows
        return rest.append_column(name, make(rows, number))

    edit_rows(root, change)


def edit_episodes(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """The episode table of either version, as a list of dicts that `change` may change in place."""
    path = root / "meta" / "episodes.jsonl"
    if path.exists():
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        change(entries)
        write_json(path, *entries)
    else:
        entries = pq.read_table(root / EPISODES).to_pylist()
        change(entries)
        pq.write_table(pa.Table.from_pylist(entries), root / EPISODES)


def faults(root: Path) -> dict[str, Finding]:
    return {finding.fault: finding for finding in examine(root)}


def everything(root: Path) -> tuple[np.ndarray, np.ndarray]:
    dataset = LeRobotDataset(root)
    return dataset.column(ACTION), dataset.images(CAMERA, range(len(dataset)))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return v21(tmp_path / "old", video=False)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return v30(tmp_path / "new", video=False)


# --- the length of every row -----------------------------------------------------------------------------------------

FLOATS = Feature("float32", (2,))
GRID = Feature("uint8", (2, 3))


@pytest.mark.parametrize(
    ("column", "feature"),
    [
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.float32())), FLOATS),
        (pa.array([[1, 2], [3, 4]], pa.large_list(pa.float32())), FLOATS),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)), FLOATS),
        (pa.array([[1, 2], [3, 4]], pa.large_list(pa.int16())), FLOATS),
        (pa.array([[9, 9], [1, 2], [3, 4]], pa.list_(pa.float64())).slice(1), FLOATS),
        (pa.array([[9, 9], [1, 2], [3, 4]], pa.list_(pa.float64(), 2)).slice(1), FLOATS),
        (pa.array([1, 2]), Feature("int64", (1,))),
        (pa.array([[1], [2]]), Feature("int64", (1,))),
        (pa.array([[[1, 2, 3], [4, 5, 6]]] * 2), GRID),
        (pa.array([[1, 2, 3, 4, 5, 6]] * 2), GRID),
        (pa.array([[[1, 2, 3], [4, 5, 6]]] * 2, pa.large_list(pa.list_(pa.uint8(), 3))), GRID),
        (pa.array([True, False]), Feature("bool", (1,))),
        (pa.array([1, 2, 1]).dictionary_encode().slice(0, 2), Feature("int64", (1,))),
    ],
)
def test_rows_of_every_kind_of_list_are_read(column: pa.Array, feature: Feature) -> None:
    found = numbers(pa.chunked_array([column]), feature)
    assert isinstance(found, np.ndarray) and found.dtype == feature.dtype
    shape = () if feature.shape == (1,) else feature.shape
    np.testing.assert_array_equal(found, np.array(column.to_pylist()).reshape(2, *shape))


@pytest.mark.parametrize(
    ("values", "kind", "feature", "fault", "row", "message"),
    [
        ([[1, 2], [3], [4, 5, 6]], pa.list_(pa.float32()), FLOATS, "wrong shape", 1, "has 1 values, expected 2"),
        ([[1, 2], [3], [4, 5, 6]], pa.large_list(pa.float32()), FLOATS, "wrong shape", 1, "2 such rows, of 1 or 3"),
        ([[1, 2], [], [3, 4]], pa.list_(pa.float32()), FLOATS, "wrong shape", 1, "has 0 values"),
        ([[1, 2, 3]], pa.list_(pa.float32(), 3), FLOATS, "wrong shape", 0, "has 3 values, expected 2"),
        ([[1, 2], None, [3, 4]], pa.list_(pa.float32()), FLOATS, "null", 1, "is null, expected 2"),
        ([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2), FLOATS, "null", 1, "is null, expected 2"),
        ([[1, 2], [3, None]], pa.list_(pa.float32()), FLOATS, "null", 1, "is null in dimension 1"),
        ([None, None], pa.null(), FLOATS, "wrong shape", None, "one value in each row, expected [2]"),
        ([1, 2], pa.float32(), FLOATS, "wrong shape", None, "one value in each row, expected [2]"),
        ([[[1, 2]]], pa.list_(pa.list_(pa.float32())), FLOATS, "wrong shape", None, "lists 2 deep"),
        (
            [[[1, 2, 3], [4, 5]]],
            pa.list_(pa.list_(pa.uint8())),
            GRID,
            "wrong shape",
            0,
            "has 2 values, expected [2, 3]",
        ),
        ([[[1, 2], [3, 4], [5, 6]]], pa.list_(pa.list_(pa.uint8())), GRID, "wrong shape", 0, "has 3 values"),
        (["[1, 2]"], pa.string(), FLOATS, "wrong dtype", None, 'holds string such as "[1, 2]"'),
        ([["a", "b"]], pa.list_(pa.string()), FLOATS, "wrong dtype", None, "meta/info.json says float32"),
        ([[1.5]], pa.list_(pa.float32()), Feature("int64", (1,)), "wrong dtype", 0, "is 1.5, which int64 cannot"),
        ([1, 300], pa.int64(), Feature("uint8", (1,)), "wrong dtype", 1, "is 300, which uint8 cannot hold"),
        ([1, None], pa.int64(), Feature("int64", (1,)), "null", 1, "is null"),
        ([{"x": 1}], pa.struct([("x", pa.int64())]), Feature("int64", (1,)), "wrong dtype", None, "holds struct"),
    ],
)
def test_a_row_of_another_length_is_named(
    values: list[Any], kind: pa.DataType, feature: Feature, fault: str, row: int | None, message: str
) -> None:
    bad = numbers(pa.chunked_array([pa.array(values, kind)]), feature)
    assert isinstance(bad, BadRows) and (bad.fault, bad.row) == (fault, row) and message in bad.message


def test_texts_are_read_from_every_kind_of_string_column() -> None:
    for column in (pa.array(["a", None]), pa.array(["a", None], pa.large_string()), pa.array([["a"], [None]])):
        assert texts(pa.chunked_array([column])) == ["a", None]
    assert texts(pa.chunked_array([pa.array(["a", None]).dictionary_encode()])) == ["a", None]
    assert isinstance(texts(pa.chunked_array([pa.array([1, 2])])), BadRows)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_ragged_rows_whose_total_is_right_are_an_error_with_their_place(old: Path, kind: Callable) -> None:
    everything(old)  # the control
    ragged = [[0.0] * (2 if i % 2 else 4) for i in range(LENGTHS[1] - 2)] + [[0.0] * 3] * 2
    put(old, ACTION, lambda rows, n: pa.array(ragged, kind(pa.float32())) if n == 1 else rows[ACTION])
    with pytest.raises(DatasetError, match=rf"{OLD}: 'action', episode 1, frame 0: has 4 values, expected 3"):
        LeRobotDataset(old).column(ACTION)
    finding = faults(old)["wrong shape"]
    assert (finding.file, finding.episode, finding.frame) == (OLD, 1, 0)


def test_nulls_are_an_error_with_their_place(new: Path) -> None:
    def second(rows: pa.Table, number: int) -> pa.Array:
        values = rows[STATE].to_pylist()
        return pa.array([*values[:8], None, *values[9:]] if number == 0 else values)

    put(new, STATE, second)
    with pytest.raises(DatasetError, match=r"'observation.state', episode 1, frame 1: is null, expected 2 \(1 such"):
        LeRobotDataset(new).column(STATE)
    assert (faults(new)["null"].episode, faults(new)["null"].frame) == (1, 1)


def test_texts_that_are_null_are_counted(old: Path) -> None:
    edit_info(old, features={"said": {"dtype": "string", "shape": [1]}})
    put(old, "said", lambda rows, n: pa.array([None if i == 3 else "go" for i in range(len(rows))], pa.large_string()))
    dataset = LeRobotDataset(old)
    assert dataset.nullable_texts("said")[2:5] == ["go", None, "go"]
    with pytest.raises(DatasetError, match=r"episode 0, frame 3: 'said' is null, expected a text \(3 of 24 frames\)"):
        dataset.texts("said")
    made = convert_dataset(old, old.parent / "made")
    assert made.nullable_texts("said") == dataset.nullable_texts("said")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["x", "y"], ("x", "y")),
        ({"motors": ["x", "y"]}, ("x", "y")),
        ({"left": ["x"], "right": ["y"]}, ("x", "y")),
        ([["x"], ["y"]], ("x", "y")),
        ({"y": 1, "x": 0}, ("x", "y")),
        ([0, 1], ("0", "1")),
        (None, None),
        ([], None),
    ],
)
def test_names_are_flattened_where_they_are_read(names: Any, read: Any) -> None:
    feature = parse_feature({"dtype": "float32", "shape": [2], "names": names})
    assert feature.names == read and feature.names_problem is None


@pytest.mark.parametrize(
    "names", [["state"], ["a", "b", "c"], ["a", None], ["a", float("nan")], {"a": {"b": None}}, "xy", [True, False], 7]
)
def test_other_names_are_left_aside_and_said(old: Path, names: Any) -> None:
    edit_info(old, features={STATE: {"dtype": "float32", "shape": [2], "names": names}})
    put(old, STATE, lambda rows, n: pa.array([[0.0, float("nan")] if n == 1 else [0.0, 1.0]] * len(rows)))
    dataset = LeRobotDataset(old)
    assert dataset.feature(STATE).names is None
    found = faults(old)
    assert "left aside" in found["names"].message and "'observation.state', 1" in found["not finite"].message
    assert convert_dataset(old, old.parent / "made").feature(STATE).names is None
    assert STATE in describe(old, ("front",))


# --- an unused column blocks nothing ---------------------------------------------------------------------------------

UNREADABLE = {
    "a dtype of tomorrow": ({"dtype": "float16", "shape": [2]}, "dtype is"),
    "no dtype": ({"shape": [2]}, "expected dtype, shape and names"),
    "null": (7, "expected dtype, shape and names"),
    "no shape": ({"dtype": "float32", "shape": None}, "expected a list of positive integers"),
    "zero": ({"dtype": "float32", "shape": [0]}, "expected a list of positive integers"),
    "negative": ({"dtype": "float32", "shape": [-3]}, "expected a list of positive integers"),
    "a fraction": ({"dtype": "float32", "shape": [1e9]}, "expected a list of positive integers"),
    "a truth value": ({"dtype": "float32", "shape": [True]}, "expected a list of positive integers"),
    "text": ({"dtype": "float32", "shape": ["2"]}, "expected a list of positive integers"),
    "a number": ({"dtype": "float32", "shape": 2}, "expected a list of positive integers"),
    "a billion": ({"dtype": "float32", "shape": [10**9]}, "at most 1,048,576 values"),
    "more than 64 bits": ({"dtype": "float32", "shape": [10**30, 2]}, "at most 1,048,576 values"),
    "texts": ({"dtype": "string", "shape": [3]}, "one text in a frame"),
    "a flat picture": ({"dtype": "image", "shape": [3]}, "expected .height, width, channels."),
    "a huge picture": ({"dtype": "image", "shape": [10**6, 10**6, 3]}, "at most 67,108,864 pixels"),
    "a camera never recorded": ({"dtype": "image", "shape": [48, 64, 3]}, "the data files have no such column"),
    "a video never recorded": ({"dtype": "video", "shape": [48, 64, 3]}, "has no video_path"),
    "a column never recorded": ({"dtype": "float32", "shape": [2]}, "the data files have no such column"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_feature_is_kept_apart_until_it_is_asked_for(old: Path, kind: str) -> None:
    feature, message = UNREADABLE[kind]
    before, pictures = everything(old)
    edit_info(old, features={"observation.extra": feature})
    after, again = everything(old)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(pictures, again)

    dataset = LeRobotDataset(old)
    for ask in (dataset.column, dataset.texts, lambda name: dataset.images(name, [0])):
        with pytest.raises(DatasetError, match=f"'observation.extra' cannot be read: .*{message}"):
            ask("observation.extra")
    assert "'observation.extra': " in faults(old)["cannot be read"].message
    assert '# cannot be read: "observation.extra"' in describe(old, ("front",))


def test_conversion_leaves_out_what_cannot_be_written_and_says_so(old: Path, caplog: Any) -> None:
    grid = {"dtype": "uint8", "shape": [2, 3], "names": ["obs/grid"]}
    edit_info(old, features={"grid": grid, "events": {"dtype": "language", "shape": [1]}})
    put(old, "grid", lambda rows, n: pa.array([[[1, 2, 3], [4, 5, 6]]] * len(rows)))
    assert LeRobotDataset(old).column("grid").shape == (24, 2, 3)
    with caplog.at_level(logging.WARNING):
        made = convert_dataset(old, old.parent / "made")
    assert set(made.features) == set(LeRobotDataset(old).features) - {"grid", "events"}
    assert "'grid' is left out: shape is [2, 3]" in caplog.text and "'events' is left out: dtype" in caplog.text
    assert examine(old.parent / "made") == []


def test_a_camera_without_any_video_blocks_nothing(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    edit_info(root, features={"observation.images.old": {"dtype": "video", "shape": [96, 128, 3]}})
    dataset = LeRobotDataset(root)
    assert dataset.cameras == (CAMERA,) and dataset.images(CAMERA, [3]).shape == (1, 48, 64, 3)
    with pytest.raises(DatasetError, match=r"no video of it is there, such as videos/chunk-000/"):
        dataset.images("observation.images.old", [0])
    assert convert_dataset(root, tmp_path / "made").cameras == (CAMERA,)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_null_place_of_a_video_is_one_line_with_row_and_column(tmp_path: Path, value: Any) -> None:
    root = v30(tmp_path / "set")
    edit_episodes(root, lambda entries: entries[1].update({f"videos/{CAMERA}/from_timestamp": value}))
    dataset = LeRobotDataset(root)
    dataset.column(ACTION)
    with pytest.raises(DatasetError, match=rf"{EPISODES}, row 1: 'videos/{CAMERA}/from_timestamp' is null|NaN"):
        dataset.images(CAMERA, [0])
    assert not faults(root)["null"].is_note
    with pytest.raises(DatasetError, match=f"mend it, or convert without it: --leave-out {CAMERA}"):
        convert_dataset(root, tmp_path / "made")
    assert convert_dataset(root, tmp_path / "made", leave_out=[CAMERA]).cameras == ()


def test_values_that_are_not_finite_are_kept_in_a_conversion(old: Path, caplog: Any) -> None:
    edit_info(old, features={"current": {"dtype": "float32", "shape": [2], "names": None}})
    values = [[1.0, float("inf")], [2.0, 5.0], [float("nan"), 7.0]]
    put(old, "current", lambda rows, n: pa.array((values * 4)[: len(rows)], pa.list_(pa.float32())))
    made = convert_dataset(old, old.parent / "made")
    np.testing.assert_array_equal(made.column("current"), LeRobotDataset(old).column("current"))
    stats = json.loads((old.parent / "made/meta/stats.json").read_text())["current"]
    assert (stats["min"], stats["max"]) == ([1.0, 5.0], [2.0, 7.0])
    assert "are NaN or infinite, and are kept" in caplog.text


# --- numbering -------------------------------------------------------------------------------------------------------


def restarting(rows: pa.Table, number: int) -> pa.Array:
    return pa.array(np.arange(len(rows)))


NUMBERINGS: dict[str, Callable[[Path], Any]] = {
    "index restarts": lambda root: put(root, "index", restarting),
    "index is zero": lambda root: put(root, "index", lambda rows, n: pa.array([0] * len(rows))),
    "index from one": lambda root: put(root, "index", lambda rows, n: pa.array(np.array(rows["index"]) + 1)),
    "frames from one": lambda root: put(
        root, "frame_index", lambda rows, n: pa.array(np.array(rows["frame_index"]) + 1)
    ),
    "episodes from one": lambda root: put(root, "episode_index", lambda rows, n: pa.array([n + 1] * len(rows))),
    "all episode 0": lambda root: put(root, "episode_index", lambda rows, n: pa.array([0] * len(rows))),
    "32 bits": lambda root: put(root, "index", lambda rows, n: pa.array(rows["index"].to_pylist(), pa.int32())),
    "floats": lambda root: [
        put(root, name, lambda rows, n: pa.array(rows[name].to_pylist(), pa.float64()))  # noqa: B023
        for name in ("index", "frame_index", "episode_index", "task_index")
    ],
    "no index": lambda root: drop(root, "index"),
    "no frame_index": lambda root: drop(root, "frame_index"),
    "no episode_index": lambda root: drop(root, "episode_index"),
    "no timestamp": lambda root: drop(root, "timestamp"),
    "none at all": lambda root: drop(root, "index", "frame_index", "episode_index", "timestamp"),
    "no task_index": lambda root: drop(root, "task_index"),
    "tasks from one": lambda root: shift_tasks(root, 1),
    "a gap in the tasks": lambda root: shift_tasks(root, 7),
}


def drop(root: Path, *names: str) -> None:
    edit_rows(root, lambda rows, n: rows.drop_columns(list(names)))
    edit_info(root, features=dict.fromkeys(names))


def shift_tasks(root: Path, by: int) -> None:
    write_json(root / "meta/tasks.jsonl", *({"task_index": 2 * i + by, "task": t} for i, t in enumerate(TASKS)))
    put(root, "task_index", lambda rows, n: pa.array(2 * np.array(rows["task_index"]) + by))


@pytest.mark.parametrize("kind", NUMBERINGS)
def test_numbering_of_every_kind_is_mapped_inside(old: Path, kind: str) -> None:
    sound = LeRobotDataset(old)
    columns = {name: sound.column(name) for name in sound.features if sound.features[name].is_numeric}
    pictures = sound.images(CAMERA, range(24))
    NUMBERINGS[kind](old)
    dataset = LeRobotDataset(old)
    made = convert_dataset(old, old.parent / "made")
    for name, values in columns.items():
        np.testing.assert_array_equal(dataset.column(name), values, err_msg=name)
        np.testing.assert_array_equal(made.column(name), values, err_msg=name)
    np.testing.assert_array_equal(dataset.images(CAMERA, range(24)), pictures)
    assert [made.tasks[i] for i in made.column("task_index")] == [
        TASKS[e % 2] for e in (0, 1, 2) for _ in range(LENGTHS[e])
    ]
    assert examine(old) == [] and examine(old.parent / "made") == []


def test_a_gap_in_the_episodes_is_mapped_inside_and_messages_keep_the_number(old: Path) -> None:
    (old / OLD).unlink()
    edit_episodes(old, lambda entries: entries.pop(1))
    edit_info(old, total_episodes=2, total_frames=12)
    dataset = LeRobotDataset(old)
    assert len(dataset.episodes) == 2 and dataset.episodes.number.tolist() == [0, 2]
    assert dataset.episodes.locate(8) == (2, 1)
    np.testing.assert_array_equal(dataset.images(CAMERA, [7])[0], picture(2, 0))
    assert convert_dataset(old, old.parent / "made").episodes.number.tolist() == [0, 1] and examine(old) == []
    put(old, ACTION, lambda rows, n: pa.array([[0.0]] * len(rows)) if n == 1 else rows[ACTION])
    with pytest.raises(DatasetError, match="episode 2, frame 0"):
        LeRobotDataset(old).column(ACTION)


@pytest.mark.parametrize("name", ["index", "frame_index"])
def test_rows_out_of_order_are_refused(new: Path, name: str) -> None:
    def swapped(rows: pa.Table, number: int) -> pa.Array:
        values = rows[name].to_pylist()
        return pa.array([*values[:2], values[3], values[2], *values[4:]] if number == 0 else values)

    put(new, name, swapped)
    with pytest.raises(DatasetError, match=rf"episode 0, frame 2: {name} is 3, expected 2"):
        LeRobotDataset(new).column(ACTION)
    assert (faults(new)["index gap"].episode, faults(new)["index gap"].frame) == (0, 2)


def test_pictures_need_no_clock_but_a_wrong_rate_is_said(old: Path, caplog: Any) -> None:
    def jittered(rows: pa.Table, number: int) -> pa.Array:
        step = np.arange(len(rows))
        return pa.array((step / 10 + 0.0123 + 0.004 * np.sin(7 * step)).astype(np.float32))

    put(old, "timestamp", jittered)
    made = convert_dataset(old, old.parent / "made")
    np.testing.assert_allclose(made.column("timestamp")[:7], np.arange(7) / 10, atol=1e-6)
    assert "timestamps are written again" in caplog.text
    edit_info(old, fps=30)
    with pytest.raises(DatasetError, match=r'frames are 0\.\d+ s apart, but fps is 30: write "fps": '):
        convert_dataset(old, old.parent / "again")


def test_no_clock_at_all_is_no_matter_for_pictures(old: Path) -> None:
    put(old, "timestamp", lambda rows, n: pa.array([None] * len(rows), pa.float32()))
    made = convert_dataset(old, old.parent / "made")
    np.testing.assert_array_equal(made.images(CAMERA, [3, 9]), LeRobotDataset(old).images(CAMERA, [3, 9]))
    np.testing.assert_allclose(made.column("timestamp")[:7], np.arange(7) / 10, atol=1e-6)


def test_files_in_another_chunk_than_chunks_size_says_are_found(old: Path, tmp_path: Path) -> None:
    video = v21(tmp_path / "video")
    before = [everything(root) for root in (old, video)]
    for root, (actions, pictures) in zip((old, video), before, strict=True):
        edit_info(root, chunks_size=1000)  # the files lie two to a folder
        dataset = LeRobotDataset(root)
        np.testing.assert_array_equal(dataset.column(ACTION), actions)
        np.testing.assert_array_equal(dataset.images(CAMERA, range(24)), pictures)
        finding = faults(root)["wrong place"]
        assert finding.episode == 2 and "chunk 0 by chunks_size, its file is in chunk 1" in finding.message


def test_a_column_of_integers_may_point_into_the_task_table(old: Path) -> None:
    write_json(old / "meta/tasks.jsonl", *({"task_index": i + 5, "task": t} for i, t in enumerate((*TASKS, "valid"))))
    put(old, "task_index", lambda rows, n: pa.array([7] * len(rows)))
    edit_episodes(old, lambda entries: [entry.update(tasks=["valid", *TASKS]) for entry in entries])
    edit_info(old, total_tasks=3, features={"said": {"dtype": "int64", "shape": [1], "names": None}})
    put(old, "said", lambda rows, n: pa.array([5 + n % 2] * len(rows)))
    dataset = LeRobotDataset(old)
    meant = dataset.task_positions(dataset.column("said"), "said")
    assert [dataset.tasks[i] for i in meant[[0, 7, 19]]] == [TASKS[0], TASKS[1], TASKS[0]]
    with pytest.raises(DatasetError, match="episode 1, frame 2: 'said' is 9, the task table has 5 to 7"):
        dataset.task_positions(np.array([5] * 9 + [9] * 15), "said")


# --- text files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["info.json", "tasks.jsonl", "episodes.jsonl"])
def test_a_byte_order_mark_and_dot_files_are_no_matter(old: Path, new: Path, name: str) -> None:
    path = old / "meta" / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for folder in ("meta", "data/chunk-000"):
        (old / folder / ".DS_Store").write_bytes(b"\0\1")
        (old / folder / "._episode_000009.parquet").write_bytes(b"\0\5\x16\7")
    for folder in ("meta/episodes/chunk-000", "meta/episodes", "data/chunk-000"):
        (new / folder / "._file-000.parquet").write_bytes(b"\0\5\x16\7")
    assert examine(old) == [] and examine(new) == []


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085"])
def test_lines_end_at_a_line_feed_only(old: Path, mark: str) -> None:
    said = f"put the red{mark}block"
    lines = [{"task_index": 0, "task": said}, {"task_index": 1, "task": TASKS[1]}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert len(text.splitlines()) == 3  # the control
    (old / "meta/tasks.jsonl").write_text(text, encoding="utf-8")
    edit_episodes(old, lambda entries: [entry.update(tasks=[]) for entry in entries])
    assert LeRobotDataset(old).tasks == (said, TASKS[1])


@pytest.mark.parametrize("indent", [2, None])
def test_objects_over_several_lines_and_lists_are_read(old: Path, indent: int | None) -> None:
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    for text in ("\n".join(json.dumps(task, indent=2) for task in tasks), json.dumps(tasks, indent=indent)):
        (old / "meta/tasks.jsonl").write_text(text)
        assert LeRobotDataset(old).tasks == TASKS
    (old / "meta/tasks.jsonl").write_text(json.dumps(tasks[0], indent=2)[:-3])
    with pytest.raises(DatasetError, match=r"tasks.jsonl, line 1: not JSON"):
        LeRobotDataset(old)


@pytest.mark.parametrize(("encoding", "said"), [("gbk", "GBK"), ("utf-16", "UTF-16"), ("shift_jis", "SHIFT_JIS")])
def test_another_encoding_is_recognized(old: Path, encoding: str, said: str) -> None:
    path = old / "meta/tasks.jsonl"
    lines = [{"task_index": 0, "task": "拿起杯子" if encoding != "shift_jis" else "カップを取る"}]
    path.write_bytes("\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode(encoding))
    found = faults(old)
    assert list(found) == ["encoding"] and said in found["encoding"].message and "iconv" in found["encoding"].message


def test_empty_files_are_one_line(old: Path) -> None:
    for name in ("info.json", "tasks.jsonl", "episodes.jsonl"):
        (old / "meta" / name).write_bytes(b"")
    found = examine(old)
    assert [finding.fault for finding in found] == ["empty file"]
    assert "info.json: is empty (0 bytes), and episodes.jsonl, tasks.jsonl too" in found[0].message


@pytest.mark.parametrize("name", ["meta/info.json", "meta/tasks.jsonl", OLD])
def test_git_lfs_pointers_are_recognized(old: Path, name: str) -> None:
    (old / name).write_text(LFS)
    found = faults(old)
    assert list(found) == ["git lfs"] and "git lfs pull" in found["git lfs"].message
    assert "5,145 bytes" in found["git lfs"].message


@pytest.mark.parametrize("write", [v21, v30])
def test_a_clone_without_git_lfs_is_one_line(write: Callable, tmp_path: Path) -> None:
    root = write(tmp_path / "set", video=False)
    files = list((root / "data").rglob("*.parquet"))
    for path in files:
        path.write_text(LFS)
    found = examine(root)
    assert len(found) == 1 and f"{len(files)} of {len(files)} data files are Git LFS pointers" in found[0].message
    with pytest.raises(DatasetError, match="git lfs pull"):
        convert_dataset(root, tmp_path / "made")


@pytest.mark.parametrize("name", ["meta/info.json", "meta/tasks.jsonl", OLD])
def test_web_pages_in_place_of_files_are_recognized(old: Path, name: str) -> None:
    (old / name).write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    assert list(faults(old)) == ["web page"]


def test_no_data_at_all_is_one_line(old: Path) -> None:
    shutil.rmtree(old / "data")
    found = examine(old)
    assert len(found) == 1 and "3 of 3 data files are not there" in found[0].message


@pytest.mark.parametrize(("write", "told", "there"), [(v21, "v3.0", "v2.1"), (v30, "v2.1", "v3.0")])
@pytest.mark.parametrize("with_paths", [True, False])
def test_the_layout_of_the_other_version_is_recognized_and_the_remedy_works(
    write: Callable, told: str, there: str, with_paths: bool, tmp_path: Path
) -> None:
    root = write(tmp_path / "set", video=False)
    right = json.loads((root / "meta/info.json").read_text())["data_path"]
    other = json.loads(((v30 if write is v21 else v21)(tmp_path / "other", video=False) / "meta/info.json").read_text())
    edit_info(root, codebase_version=told, **({"data_path": other["data_path"]} if with_paths else {}))
    found = faults(root)
    assert list(found) == ["other version"] and f'write "codebase_version": "{there}"' in found["other version"].message
    assert (f'"data_path": "{right}"' in found["other version"].message) == with_paths
    edit_info(root, codebase_version=there, data_path=right)
    assert examine(root) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"length": None}, "'length' is null, expected a whole number"),
        ({"length": "7"}, "'length' is \"7\""),
        ({"length": 1.5}, "'length' is 1.5"),
        ({"length": True}, "'length' is true"),
        ({"length": -1}, "'length' is -1"),
        ({"length": 10**40}, "'length' is a number of more than 64 bits"),
        ({"episode_index": None}, "'episode_index' is null"),
        ({"tasks": 3}, "'tasks' is 3, expected a list of texts"),
        ({"tasks": [None]}, r"'tasks' is \[null\]"),
    ],
)
def test_a_wrong_value_in_the_episode_lines_is_named(old: Path, entry: dict[str, Any], message: str) -> None:
    edit_episodes(old, lambda entries: entries[1].update(entry))
    with pytest.raises(DatasetError, match=rf"episodes.jsonl, line 2: {message}"):
        read_layout(old)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("episode_index", [0, None, 2], "row 1: 'episode_index' is null, expected a whole number"),
        ("length", [7, None, None], r"row 1: 'length' is null, expected a whole number \(2 such rows\)"),
        ("length", ["7", "12", "5"], "'length' holds string such as \"7\", expected whole numbers"),
        ("dataset_from_index", [0.0, float("nan"), 3.0], "row 1: 'dataset_from_index' is NaN"),
        ("data/file_index", [0.5, 0.0, 1.0], "row 0: 'data/file_index' is 0.5"),
        ("dataset_to_index", [[7], [19], [24]], "'dataset_to_index' holds list"),
    ],
)
def test_a_wrong_value_in_the_episode_table_is_named(new: Path, name: str, values: list[Any], message: str) -> None:
    edit_episodes(new, lambda entries: [entry.update({name: v}) for entry, v in zip(entries, values, strict=True)])
    with pytest.raises(DatasetError, match=message):
        read_layout(new)


@pytest.mark.parametrize("text", [None, 3, ["a"]])
def test_a_task_that_is_no_text_is_named(old: Path, new: Path, text: Any) -> None:
    write_json(old / "meta/tasks.jsonl", {"task_index": 0, "task": TASKS[0]}, {"task_index": 1, "task": text})
    with pytest.raises(DatasetError, match=r"tasks.jsonl, line 2: 'task' is .*, expected a text"):
        read_layout(old)
    pq.write_table(pa.table({"task_index": [0, 1], "task": [TASKS[0], None]}), new / "meta/tasks.parquet")
    with pytest.raises(DatasetError, match=r"tasks.parquet, row 1: 'task' is null, expected a text"):
        read_layout(new)


def test_whole_floats_of_a_pandas_detour_are_read(new: Path) -> None:
    edit_episodes(new, lambda entries: [entry.update(length=float(entry["length"])) for entry in entries])
    pq.write_table(pa.table({"task_index": [0.0, 1.0], "task": list(TASKS)}), new / "meta/tasks.parquet")
    assert examine(new) == []


def test_one_number_for_two_texts_is_refused_and_two_numbers_for_one_text_are_fine(old: Path) -> None:
    lines = [{"task_index": 0, "task": "a"}, {"task_index": 0, "task": "b"}]
    write_json(old / "meta/tasks.jsonl", *lines)
    with pytest.raises(DatasetError, match='task_index 0 is both "a" and "b"'):
        read_layout(old)
    write_json(old / "meta/tasks.jsonl", {"task_index": 0, "task": "a"}, {"task_index": 1, "task": "a"})
    edit_episodes(old, lambda entries: [entry.update(tasks="a") for entry in entries])
    assert LeRobotDataset(old).tasks == ("a", "a") and examine(old) == []


# --- tables against rows ---------------------------------------------------------------------------------------------


def test_lengths_are_those_of_the_rows(old: Path, caplog: Any) -> None:
    before = everything(old)[0]
    edit_episodes(old, lambda entries: (entries[0].update(length=0), entries[1].update(length=19)))
    found = examine(old)
    assert [(f.fault, f.episode, f.count) for f in found] == [("row count", 0, 2)]
    assert "episode 1: length is 19" in found[0].others[0] and 'write "length": 12' in found[0].others[0]
    np.testing.assert_array_equal(everything(old)[0], before)
    assert "the rows are believed" in caplog.text and "and 1 more; insula data doctor" in caplog.text
    made = convert_dataset(old, old.parent / "made")
    assert made.episodes.length.tolist() == list(LENGTHS) and examine(old.parent / "made") == []
    edit_episodes(old, lambda entries: [entry.update(length=n) for entry, n in zip(entries, LENGTHS, strict=True)])
    assert examine(old) == []  # the remedy works


def test_totals_are_counted_anew(old: Path) -> None:
    edit_info(old, total_episodes=7, total_frames=10**18, total_tasks=0)
    (found,) = examine(old)
    assert found.is_note and found.message == "total_episodes is 7, there are 3: write 3" and found.count == 3
    assert found.others[0].endswith("there are 24: write 24")
    dataset = LeRobotDataset(old)
    assert len(dataset) == 24 and dataset.info.total_episodes == 3 and dataset.info.total_tasks == 2


def test_an_episode_listed_twice_is_read_once(old: Path, new: Path) -> None:
    for root in (old, new):
        edit_episodes(root, lambda entries: entries.insert(1, dict(entries[1])))
        assert everything(root)[0].shape == (24, 3)
        assert faults(root)["episode repeated"].episode == 1
        assert convert_dataset(root, root / "made").episodes.length.tolist() == list(LENGTHS)


def test_a_stale_pointer_is_read_past(new: Path) -> None:
    before = everything(new)
    edit_episodes(new, lambda entries: entries[2].update({"data/file_index": 0, "dataset_from_index": 5}))
    finding = faults(new)["wrong place"]
    assert finding.episode == 2 and "data/file_index is 0, the rows say 1" in finding.message
    assert "dataset_from_index is 5, the rows say 19" in finding.message
    for one, other in zip(before, everything(new), strict=True):
        np.testing.assert_array_equal(one, other)
    edit_episodes(new, lambda entries: entries[2].update({"data/file_index": 1, "dataset_from_index": 19}))
    assert examine(new) == []  # the remedy works


def test_wrong_lengths_in_the_new_table_are_those_of_the_rows(new: Path) -> None:
    before = everything(new)[0]
    edit_episodes(
        new, lambda e: (e[0].update(length=8, dataset_to_index=8), e[1].update(dataset_from_index=8, length=11))
    )
    assert "length is 8, the rows say 7" in {f.episode: f for f in examine(new)}[0].message
    np.testing.assert_array_equal(everything(new)[0], before)


def test_episode_numbers_that_differ_are_matched_by_their_lengths(new: Path) -> None:
    put(new, "episode_index", lambda rows, n: pa.array(np.array(rows["episode_index"]) + 40))
    assert faults(new)["numbering"].file == EPISODES
    assert LeRobotDataset(new).column("episode_index").tolist() == [e for e in range(3) for _ in range(LENGTHS[e])]


def test_rows_and_entries_that_cannot_be_matched_are_refused_with_what_to_write(new: Path) -> None:
    edit_episodes(new, lambda entries: entries.pop(1))
    message = "its 12 rows are in data/chunk-000/file-000.parquet, but .* does not list it: add a row with length 12"
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(new)
    assert faults(new)["not listed"].episode == 1


def test_an_entry_without_rows_is_refused_by_name(new: Path) -> None:
    pq.write_table(pq.read_table(new / NEW).slice(0, 7), new / NEW)
    with pytest.raises(DatasetError, match="episode 1: no data file holds a row of it"):
        LeRobotDataset(new)
    assert faults(new)["empty episode"].episode == 1


def test_a_file_that_no_table_lists_is_said(old: Path) -> None:
    pq.write_table(table(rows(1, False)), old / "data/chunk-000/episode_000077.parquet")
    finding = faults(old)["not listed"]
    assert finding.file == "data/chunk-000/episode_000077.parquet" and len(LeRobotDataset(old)) == 24


@pytest.mark.parametrize("write", [v21, v30])
def test_rows_that_mean_another_task_than_the_table_are_refused(write: Callable, tmp_path: Path) -> None:
    root = write(tmp_path / "set", video=False)
    put(root, "task_index", lambda rows, n: pa.array([0] * len(rows)))
    finding = faults(root)["tasks differ"]
    assert (
        finding.episode == 1
        and f'write ["{TASKS[0]}"] into the table, or task_index 1 into the rows' in finding.message
    )
    with pytest.raises(DatasetError, match="episode 1: the rows have task_index 0"):
        LeRobotDataset(root).column("task_index")
    with pytest.raises(DatasetError, match="episode 1: the rows have task_index 0"):
        convert_dataset(root, tmp_path / "made")
    by_rows = convert_dataset(root, tmp_path / "rows", tasks_from="rows")
    assert set(by_rows.column("task_index").tolist()) == {0} and by_rows.tasks == TASKS[:1]
    by_table = convert_dataset(root, tmp_path / "episodes", tasks_from="episodes")
    assert [by_table.tasks[i] for i in by_table.column("task_index")[[0, 7, 19]]] == [TASKS[0], TASKS[1], TASKS[0]]
    assert examine(tmp_path / "rows") == [] and examine(tmp_path / "episodes") == []


def test_videos_of_several_episodes_are_converted_as_well(tmp_path: Path) -> None:
    root = v30(tmp_path / "set")
    before = everything(root)
    edit_episodes(root, lambda entries: entries[2].update({"data/file_index": 0, "length": 1}))
    convert_dataset(root, tmp_path / "made")
    for one, other in zip(before, everything(tmp_path / "made"), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "made/videos").rglob("*.mp4"))) == 2 and examine(tmp_path / "made") == []
