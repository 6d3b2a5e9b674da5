"""Every fault the doctor knows, planted in a sound data set and found by name and place; and nothing in a sound one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, LENGTHS, STATE, TASKS, picture, png, v21, v30, write_json, write_video

from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.lerobot.remedies import REMEDIES, Finding

EPISODES = "meta/episodes.jsonl"
DATA_0 = "data/chunk-000/episode_000000.parquet"
DATA = "data/chunk-000/episode_000001.parquet"  # of v2.1
VIDEO = f"videos/chunk-000/{CAMERA}/episode_000001.mp4"
Damage = Callable[[Path], Any]


def column(name: str, change: Callable[[list[Any]], list[Any]], kind: pa.DataType | None = None) -> Damage:
    """Rewrite a column of episode 1."""

    def damage(root: Path) -> None:
        table = pq.read_table(root / DATA)
        changed = pa.array(change(table[name].to_pylist()), kind or table[name].type)
        pq.write_table(table.set_column(table.column_names.index(name), name, changed), root / DATA)

    return damage


def at(index: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:index], value, *values[index + 1 :]]


def info(**changes: Any) -> Damage:
    def damage(root: Path) -> None:
        path = root / "meta" / "info.json"
        raw = json.loads(path.read_text())
        features = raw["features"] | changes.pop("features", {})
        path.write_text(json.dumps(raw | changes | {"features": features}))

    return damage


def cut(name: str) -> Damage:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-200])


def lengths(*values: int) -> Damage:
    def damage(root: Path) -> None:
        rows = [{"episode_index": e, "tasks": ["x"], "length": n} for e, n in enumerate(values)]
        write_json(root / "meta" / "episodes.jsonl", *rows)

    return damage


def rows_of(length: int) -> Damage:
    return lambda root: pq.write_table(pq.read_table(root / DATA).slice(0, length), root / DATA)


def without(name: str) -> Damage:
    return lambda root: pq.write_table(pq.read_table(root / DATA).drop_columns([name]), root / DATA)


def same_numbers(root: Path) -> None:
    lengths(7, 7, 5)(root)
    info(total_frames=19)(root)
    first = pq.read_table(root / "data/chunk-000/episode_000000.parquet")
    renamed = {
        "episode_index": np.ones(7, np.int64),
        "index": np.arange(7, 14),
        "task_index": np.ones(7, np.int64),
    }
    for name, values in renamed.items():
        first = first.set_column(first.column_names.index(name), name, pa.array(values))
    pq.write_table(first, root / DATA)
    third = pq.read_table(root / "data/chunk-001/episode_000002.parquet")
    third = third.set_column(third.column_names.index("index"), "index", pa.array(np.arange(14, 19)))
    pq.write_table(third, root / "data/chunk-001/episode_000002.parquet")


def tasks(root: Path, *texts: str) -> None:
    write_json(root / "meta" / "tasks.jsonl", *({"task_index": i, "task": text} for i, text in enumerate(texts)))
    rows = [{"episode_index": e, "tasks": [texts[e % 2]], "length": n} for e, n in enumerate(LENGTHS)]
    write_json(root / "meta" / "episodes.jsonl", *rows)


def one_episode(root: Path) -> None:
    lengths(LENGTHS[0])(root)
    write_json(root / EPISODES, {"episode_index": 0, "tasks": [TASKS[0]], "length": LENGTHS[0]})


def no_statistics(root: Path) -> None:
    values = np.concatenate(
        [np.array(pq.read_table(path)[ACTION].to_pylist()) for path in sorted(root.rglob("*.parquet"))]
    )
    figures = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    write_json(root / "meta" / "stats.json", {ACTION: {name: value.tolist() for name, value in figures.items()}})


def constant(root: Path) -> None:
    for path in root.rglob("*.parquet"):
        table = pq.read_table(path)
        if ACTION in table.column_names:
            values = pa.array([[*x[:2], 0.5] for x in table[ACTION].to_pylist()], table[ACTION].type)
            pq.write_table(table.set_column(table.column_names.index(ACTION), ACTION, values), path)


PLANTED_ELSEWHERE = {
    *("jump", "spike", "copy", "black pictures", "frozen pictures"),  # test_sanity.py
    *("git lfs", "empty file", "web page", "encoding", "other version", "names", "totals", "episode repeated"),
    *("not listed", "wrong place", "numbering", "tasks differ", "null"),
    *("video damaged", "video offset", "video gap", "video overlap", "frames left over", "frames unused"),
    *("clock", "orientation", "not 8-bit color"),
    "subtasks",  # test_subtask_labels.py
}
"""In test_lerobot_faults.py and test_recorded_pictures.py."""
PLANTED: dict[str, tuple[str, bool, Damage, dict[str, Any]]] = {
    "no info": ("metadata", True, lambda root: (root / "meta/info.json").unlink(), {}),
    "a path outside": ("path outside", True, info(data_path="../{episode_chunk}/{episode_index}.parquet"), {}),
    "an empty episode": ("empty episode", True, rows_of(0), {"file": EPISODES, "episode": 1}),
    "wrong lengths": ("row count", True, lengths(7, 0, 17), {"file": EPISODES, "episode": 1}),
    "no data file": ("file missing", True, lambda root: (root / DATA).unlink(), {"file": DATA}),
    "parquet without footer": ("file damaged", True, cut(DATA), {"file": DATA}),
    "too few rows": ("row count", True, rows_of(9), {"file": EPISODES, "episode": 1}),
    "a column that one file lacks": ("column missing", True, without(ACTION), {"file": DATA}),
    "a camera that was never recorded": (
        "cannot be read",
        False,
        info(features={"observation.images.wrist": {"dtype": "image", "shape": [48, 64, 3], "names": None}}),
        {},
    ),
    "state as text": ("wrong dtype", True, column(STATE, lambda v: ["1"] * len(v), pa.string()), {"file": DATA}),
    "a state of three": ("wrong shape", True, column(STATE, lambda v: [[*x, 0.0] for x in v]), {"file": DATA}),
    "a gap in index": ("index gap", True, column("index", at(4, 99)), {"file": DATA, "episode": 1, "frame": 4}),
    "another episode's row": ("index gap", True, column("episode_index", at(0, 0)), {"episode": 1, "frame": 0}),
    "a task without text": ("task index", True, column("task_index", at(3, 2)), {"episode": 1, "frame": 3}),
    "a late timestamp": ("timestamps", True, column("timestamp", at(5, 0.53)), {"episode": 1, "frame": 5}),
    "another fps": ("timestamps", True, info(fps=12), {"episode": 0, "frame": 1}),
    "NaN in the action": (
        "not finite",
        True,
        column(ACTION, at(6, [0.0, float("nan"), 0.0])),
        {"episode": 1, "frame": 6},
    ),
    "an action that never moves": ("constant", True, constant, {}),
    "an unreadable image": (
        "unreadable image",
        False,
        column(CAMERA, at(2, {"bytes": b"\x89PNG broken", "path": "x"})),
        {"file": DATA, "episode": 1, "frame": 2},
    ),
    "a larger image": (
        "picture size",
        False,
        column(CAMERA, at(2, {"bytes": png(np.zeros((50, 64, 3), np.uint8)), "path": "x"})),
        {"episode": 1, "frame": 2},
    ),
    "no video": ("file missing", True, lambda root: (root / VIDEO).unlink(), {"file": VIDEO, "episode": 1}),
    "a truncated video": ("video damaged", True, cut(VIDEO), {"file": VIDEO, "episode": 1}),
    "a short video": (
        "video too short",
        True,
        lambda root: write_video(root / VIDEO, [picture(1, i) for i in range(8)]),
        {"file": VIDEO, "episode": 1, "frame": 8},
    ),
    "a video of another rate": (
        "video rate",
        True,
        lambda root: write_video(root / VIDEO, [picture(1, i) for i in range(12)], fps=15),
        {"episode": 1, "frame": 1},
    ),
    "no instruction": ("no text", False, lambda root: tasks(root, "", " "), {"file": DATA_0, "episode": 0, "frame": 0}),
    "a single episode": ("one episode", False, one_episode, {}),
    "a column without statistics": ("no statistics", False, no_statistics, {"file": "meta/stats.json"}),
    "the same episode twice": ("duplicate episode", False, same_numbers, {"file": DATA, "episode": 1}),
}


def found(findings: list[Finding], fault: str) -> Finding:
    assert any(f.fault == fault for f in findings), [str(f) for f in findings]
    return next(f for f in findings if f.fault == fault)


@pytest.mark.parametrize("write", [v21, v30])
@pytest.mark.parametrize("video", [True, False])
def test_a_sound_data_set_has_no_faults(write: Callable, video: bool, tmp_path: Path) -> None:
    assert examine(write(tmp_path / "set", video=video)) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted: str, tmp_path: Path) -> None:
    fault, video, damage, place = PLANTED[planted]
    root = v21(tmp_path / "set", video=video)
    damage(root)
    finding = found(examine(root), fault)
    assert {key: getattr(finding, key) for key in place} == place
    assert finding.message and finding.remedy in str(finding)


def test_statistics_that_do_not_match_are_found(tmp_path: Path) -> None:
    convert_dataset(v21(tmp_path / "old"), tmp_path / "set")
    assert examine(tmp_path / "set") == []
    path = tmp_path / "set" / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    stats[ACTION]["mean"][1] += 0.5
    path.write_text(json.dumps(stats))
    assert "mean is [" in found(examine(tmp_path / "set"), "statistics").message


def test_every_fault_is_planted_once() -> None:
    assert {fault for fault, *_ in PLANTED.values()} | {"statistics"} | PLANTED_ELSEWHERE == set(REMEDIES)
    assert len(REMEDIES) >= 15


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    for planted in ("a gap in index", "a task without text", "no video"):
        PLANTED[planted][2](root)
    assert {finding.fault for finding in examine(root)} == {"index gap", "task index", "file missing"}


def test_a_quick_look_decodes_three_pictures_of_each_episode(tmp_path: Path) -> None:
    root = v21(tmp_path / "set", video=False)
    PLANTED["an unreadable image"][2](root)
    assert examine(root, every_frame=False) == [] and len(examine(root)) == 1
    column(CAMERA, at(LENGTHS[1] - 1, {"bytes": b"", "path": "x"}))(root)
    assert found(examine(root, every_frame=False), "unreadable image").frame == LENGTHS[1] - 1


def test_the_command_says_it_in_json_and_by_its_exit_code(tmp_path: Path) -> None:
    root = v21(tmp_path / "set", video=False)

    def doctor(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "insula", "data", "doctor", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert doctor() == (0, f"{root}: sound\n")
    PLANTED["a gap in index"][2](root)
    code, text = doctor("--json")
    assert code == 1 and json.loads(text)[0]["fault"] == "index gap" and json.loads(text)[0]["remedy"]
