"""LeRobot v2.1 and v3.0 with video, written by code of its own: exact frames, whatever the order and the codec."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, FPS, LENGTHS, STATE, TASKS, picture, rows, v21, v30, write_video

from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.video import VideoReader
from insula.errors import DatasetError

WRITERS = {"v2.1": v21, "v3.0": v30}
NUMBERS = [(e, i) for e, n in enumerate(LENGTHS) for i in range(n)]
PICTURES = np.stack([picture(e, i) for e, i in NUMBERS])
CODEC_ERROR = 4  # grey levels; neighboring frames differ by 12


@pytest.fixture(params=[(v, c) for v in WRITERS for c in ("libx264", "libsvtav1")], ids=lambda p: " ".join(p))
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    version, codec = request.param
    return WRITERS[version](tmp_path / "set", codec=codec)


def off(images: np.ndarray, frames: list[int] | np.ndarray) -> float:
    """Largest mean difference of a frame from the picture it must show."""
    return float(np.abs(images.astype(float) - PICTURES[frames]).mean(axis=(1, 2, 3)).max())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_every_frame_is_the_one_asked_for(root: Path, cache_bytes: int) -> None:
    dataset = LeRobotDataset(root, cache_bytes=cache_bytes)
    order = np.random.default_rng(0).permutation(len(PICTURES))
    assert off(dataset.images(CAMERA, order), order) < CODEC_ERROR
    again = [3, 3, 0, 20]
    assert off(dataset.images(CAMERA, again), again) < CODEC_ERROR
    assert off(dataset.images(CAMERA, order), (order + 1) % len(order)) > CODEC_ERROR  # the control: neighbors


@pytest.mark.parametrize("video", [True, False])
def test_both_versions_say_the_same(video: bool, tmp_path: Path) -> None:
    old, new = (LeRobotDataset(write(tmp_path / name, video=video)) for name, write in WRITERS.items())
    assert old.tasks == new.tasks == TASKS and old.episodes.tasks == new.episodes.tasks
    assert old.episodes.stop.tolist() == new.episodes.stop.tolist() == np.cumsum(LENGTHS).tolist()
    for name in (STATE, ACTION, "timestamp", "task_index"):
        expected = np.concatenate([np.stack(rows(e, video)[name]) for e in range(len(LENGTHS))])
        np.testing.assert_array_equal(old.column(name), expected)
        np.testing.assert_array_equal(new.column(name), expected)
    np.testing.assert_allclose(old.images(CAMERA, range(24)), new.images(CAMERA, range(24)), atol=12)
    if not video:
        np.testing.assert_array_equal(old.images(CAMERA, range(24)), PICTURES)


def test_few_files_are_open_however_many_there_are(tmp_path: Path) -> None:
    reader = VideoReader(open_files=2)
    for e in range(4):
        write_video(tmp_path / f"{e}.mp4", [picture(0, i) for i in range(3)])
    for e in (0, 1, 2, 3, 0):
        assert reader.frames(tmp_path / f"{e}.mp4", [0.2], (48, 64), "here").shape == (1, 48, 64, 3)
        assert len(reader._videos) <= 2
    np.testing.assert_allclose(reader.times(tmp_path / "0.mp4"), [0, 0.1, 0.2], atol=1e-6)
    reader.close()
    assert not reader._videos


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "missing; restore"),
        ("truncated", "not a readable video|cannot be decoded|no frame at"),
        ("shorter", r"no frame at 0\.\d+ s .*the file ends at 0\.2000 s|has 3 frames, its 2 episodes have 19 rows"),
        ("slower", r"no frame at .*fps, timestamps or the video are wrong"),
        ("larger", r"frames are 96×64 .*info.json says 48×64"),
    ],
)
def test_a_bad_video_is_named_and_never_black(version: str, damage: str, message: str, tmp_path: Path) -> None:
    root = WRITERS[version](tmp_path / "set")
    path = sorted(root.rglob("*.mp4"))[0]
    frames = [picture(0, i) for i in range(19)]  # as many as the rows of the file in v3.0
    match damage:
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "shorter":
            write_video(path, frames[:3])
        case "slower":
            write_video(path, frames, fps=FPS // 2 + 2)
        case "larger":
            write_video(path, [np.repeat(image, 2, axis=0) for image in frames])
    with pytest.raises(DatasetError, match=message) as error:
        LeRobotDataset(root).images(CAMERA, [5])
    assert CAMERA in str(error.value) and "episode 0" in str(error.value) and path.name in str(error.value)
    last = sum(LENGTHS) - 1
    assert off(LeRobotDataset(root).images(CAMERA, [last]), [last]) < CODEC_ERROR  # another file is fine


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("video_path", "../{video_key}/{episode_chunk}/{episode_index}.mp4", "leaves the data set"),
        ("video_path", "{video_key}/{secret}.mp4", "expected something like"),
        ("codebase_version", "v1.6", r"'v1\.6', this reader knows v2\.0, v2\.1, v3\.0"),
    ],
)
def test_metadata_that_lies_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 2: not JSON"), ('{"length": 3}', "line 2: expected an object")]
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    path = root / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DatasetError, match=message):
        LeRobotDataset(root)


# --- v2.1 to v3.0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("video", [True, False])
def test_conversion_keeps_every_row_and_every_picture(video: bool, tmp_path: Path) -> None:
    old = LeRobotDataset(v21(tmp_path / "old", video=video))
    new = convert_dataset(tmp_path / "old", tmp_path / "new")
    assert new.info.codebase_version == "v3.0" and new.features == old.features
    assert new.tasks == old.tasks and new.episodes.tasks == old.episodes.tasks
    assert (new.fps, new.info.robot_type) == (old.fps, old.info.robot_type)
    for name, feature in old.features.items():
        if feature.is_numeric:
            np.testing.assert_array_equal(new.column(name), old.column(name))
    np.testing.assert_array_equal(new.images(CAMERA, range(24)), old.images(CAMERA, range(24)))  # not coded again
    stats = json.loads((tmp_path / "new" / "meta" / "stats.json").read_text())
    np.testing.assert_allclose(stats[ACTION]["q99"], np.quantile(old.column(ACTION), 0.99, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.ravel(stats[CAMERA]["mean"]), PICTURES.mean(axis=(0, 1, 2)) / 255, atol=0.02)


def test_conversion_refuses_timestamps_off_the_grid(tmp_path: Path) -> None:
    root = v21(tmp_path / "old")
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 30}))
    with pytest.raises(DatasetError, match=r"episode 1, frame 11 lies 0\.7333 s from a multiple of 1 / fps \(30\)"):
        convert_dataset(root, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_conversion_of_tasks_that_change_within_an_episode(tmp_path: Path) -> None:
    root = v21(tmp_path / "old")
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    changing = pa.array([1, 1, 1, 0, 0, 1, 1])
    pq.write_table(table.set_column(table.column_names.index("task_index"), "task_index", changing), path)
    with pytest.raises(DatasetError, match="the rows have task_index 1"):
        convert_dataset(root, tmp_path / "new")
    new = convert_dataset(root, tmp_path / "new", tasks_from="rows")
    said = [new.tasks[i] for i in new.column("task_index")[:7]]
    assert said == [TASKS[i] for i in changing.to_pylist()]
    assert new.episodes.tasks[0] == (TASKS[1], TASKS[0])
