"""Data sets made to hang, to fill the memory or to crash: each ends in bounded time and memory, in one clear line.

One process examines, describes, reads and converts all of them, with an address space of 1 GiB beyond what it needs to
start and an alarm for each.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, v21, v30

from insula.data.describe import describe
from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.lerobot.pages import count_pages
from insula.data.lerobot.parquet import open_parquet, read_columns
from insula.errors import DatasetError, InsulaError

SECONDS = 20
MEMORY = 2**30
INFO, TASK_LINES, EPISODE_LINES = "meta/info.json", "meta/tasks.jsonl", "meta/episodes.jsonl"
OLD, NEW = "data/chunk-000/episode_000001.parquet", "data/chunk-000/file-000.parquet"
OLD_TABLES, NEW_TABLES = (
    (INFO, TASK_LINES, EPISODE_LINES),
    (INFO, "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"),
)


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return damage


def info(**changes: Any) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        raw = json.loads((root / INFO).read_text())
        features = raw["features"] | changes.get("features", {})
        (root / INFO).write_text(json.dumps(raw | changes | {"features": features}))

    return damage


def text_of_info(old: str, new: str) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        raw = (root / INFO).read_text()
        assert old in raw
        (root / INFO).write_text(raw.replace(old, new))

    return damage


def loop(path: Path) -> None:
    other = path.with_name("loop")
    path.symlink_to(other)
    other.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def many_tasks(root: Path) -> None:
    (root / "meta/tasks.parquet").unlink()
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())])
    with pq.ParquetWriter(root / "meta/tasks.parquet", schema, compression="zstd") as writer:
        part = pa.table({"task_index": np.zeros(10**6, np.int64), "task": pa.array([""] * 10**6)})
        for _ in range(20):
            writer.write_table(part)


def long_task(root: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000, np.int32)), pa.array(["x" * 2**20]))
    table = pa.table({"task_index": np.zeros(2_000, np.int64), "task": column})
    pq.write_table(table, root / "meta/tasks.parquet", compression="zstd")


def many_rows(root: Path) -> None:
    table = pq.read_table(root / OLD)
    schema = pa.schema([table.schema.field(name) for name in table.column_names if name != CAMERA])
    with pq.ParquetWriter(root / OLD, schema, compression="zstd") as writer:
        one = {name: table[name][0].as_py() for name in schema.names}
        part = pa.table({name: pa.array([value] * 10**6, schema.field(name).type) for name, value in one.items()})
        for _ in range(40):
            writer.write_table(part)


def large_pictures(root: Path) -> None:
    table = pq.read_table(root / OLD)
    same = pa.array([{"bytes": bytes(2**26), "path": "x"}], table.schema.field(CAMERA).type)
    picked = same.take(pa.array(np.zeros(len(table), np.int32)))
    table = table.set_column(table.column_names.index(CAMERA), CAMERA, picked)
    pq.write_table(table, root / OLD, compression="zstd")


DEEP = "[" * 200_000 + "]" * 200_000
DAMAGE: dict[str, tuple[Callable, Callable[[Path], Any], str]] = {
    **{
        f"{Path(name).name} a pipe": (v21, instead(name, os.mkfifo), "is a named pipe, expected a file")
        for name in OLD_TABLES
    },
    **{f"{Path(name).name} a device": (v21, instead(name, device), "is a device") for name in OLD_TABLES},
    **{f"{Path(name).name} a folder": (v21, instead(name, Path.mkdir), "is a directory") for name in OLD_TABLES},
    **{f"{Path(name).name} a loop": (v21, instead(name, loop), "symbolic links") for name in OLD_TABLES},
    **{f"{name} a pipe": (v30, instead(name, os.mkfifo), "is a named pipe") for name in (*NEW_TABLES, NEW)},
    "data a pipe": (v21, instead(OLD, os.mkfifo), "is a named pipe"),
    "data a device": (v21, instead(OLD, device), "is a device"),
    "data a loop": (v21, instead(OLD, loop), "symbolic links"),
    "deep info": (v21, lambda root: (root / INFO).write_text(DEEP), "nested too deeply"),
    "deep names": (v21, text_of_info('"names": ["x", "y"]', f'"names": {DEEP}'), "nested too deeply"),
    "deep line": (v21, lambda root: (root / EPISODE_LINES).write_text(DEEP), "line 1: not usable as JSON"),
    "large info": (v21, lambda root: (root / INFO).write_text("[" + "[]," * 2**23 + "[]]"), "at most 8 MiB are read"),
    "large lines": (v21, lambda root: (root / TASK_LINES).write_text("x" * 2**27), "at most 64 MiB are read"),
    "one long line": (v21, lambda root: (root / TASK_LINES).write_text("[" + "[]," * 2**23 + "[]]"), "at most 8 MiB"),
    "a long number": (v21, text_of_info('"fps": 10', f'"fps": 1{"0" * 5000}'), "a number of more than 4300 digits"),
    "fps of 64 digits": (v21, info(fps=10**64), "fps is a number of more than 64 bits"),
    "fps 0": (v21, info(fps=0), "fps is 0, expected a positive number"),
    "fps below 0": (v21, info(fps=-30), "fps is -30"),
    "fps infinite": (v21, info(fps=float("inf")), "fps is Infinity"),
    "fps NaN": (v21, info(fps=float("nan")), "fps is NaN"),
    "fps tiny": (v21, info(fps=1e-300), "fps is 1e-300"),
    "fps true": (v21, info(fps=True), "'fps' is true, expected int or float"),
    "chunks_size 0": (v21, info(chunks_size=0), "'chunks_size' is 0, expected at least 1"),
    "chunks_size text": (v21, info(chunks_size="many"), "'chunks_size' is \"many\", expected int"),
    "data_path constant": (v21, info(data_path="data/all.parquet"), "every episode would be the same file"),
    "data_path with a null": (v21, info(data_path="data/\0{episode_index}"), "path is"),
    "video_path a number": (v21, info(video_path=7), "'video_path' is 7, expected str"),
    "video_key as a number": (
        v21,
        info(video_path="{video_key:03d}/{episode_index}", features={"cam": {"dtype": "video", "shape": [4, 4, 3]}}),
        "cannot be filled in",
    ),
    "half a surrogate": (v21, text_of_info('"so100"', '"\\ud800"'), "no valid Unicode"),
    "half a surrogate in a task": (
        v21,
        lambda root: (root / TASK_LINES).write_text('{"task_index": 0, "task": "\\ud800"}'),
        "no valid Unicode",
    ),
    "twenty million tasks": (v30, many_tasks, "claims 20,000,000 rows"),
    "one task of a megabyte, often": (v30, long_task, "MiB or more in memory"),
    "forty million rows": (v21, many_rows, "claims 40,000,000 rows"),
    "the same large picture": (v21, large_pictures, "MiB or more in memory"),
}
HARMLESS: dict[str, tuple[Callable, Callable[[Path], Any], str]] = {
    "a frame of a billion numbers": (
        v21,
        info(features={"x": {"dtype": "float32", "shape": [10**9]}}),
        "at most 1,048,576",
    ),
    "frames without end": (v21, info(total_frames=10**18, total_episodes=10**18), "there are 24: write 24"),
    "a key outside": (v30, info(features={"../../x": {"dtype": "video", "shape": [4, 4, 3]}}), "'../../x': "),
    "robot_type a list": (v21, info(robot_type=[1]), ""),
}


def outcomes(root: Path, work: Path) -> list[str]:
    """What the doctor, describe, reading and convert say."""

    def read() -> None:
        dataset = LeRobotDataset(root, cache_bytes=0)
        dataset.column(ACTION)
        dataset.images(CAMERA, [0, 8, len(dataset) - 1])  # of each data file

    said = ["\n".join(map(str, examine(root)))]
    for ask in (lambda: describe(root, ("front",)), read, lambda: convert_dataset(root, work, overwrite=True)):
        try:
            ask()
            said.append("fine")
        except InsulaError as error:
            said.append(str(error))
    return said


def main(folder: Path) -> None:
    """In a process of its own: a line of JSON for each data set."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for root in sorted(folder.iterdir()):
        signal.alarm(SECONDS)
        try:
            said = outcomes(root, folder.parent / "made")
        except Exception as error:
            said = [f"TRACEBACK {type(error).__name__}: {error}"]
        print(json.dumps([root.name, said]), flush=True)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("hostile") / "sets"
    for name, (write, damage, _) in (DAMAGE | HARMLESS).items():
        root = write(folder / name.replace("/", "-"), video=False)
        damage(root)
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(DAMAGE) + len(HARMLESS), (lines[-1], done.returncode, done.stderr[-2000:])
    return dict(lines)


@pytest.mark.parametrize("name", DAMAGE)
def test_it_ends_in_one_clear_line(said: dict[str, list[str]], name: str) -> None:
    answers = said[name.replace("/", "-")]
    _, _, message = DAMAGE[name]
    assert "TRACEBACK" not in answers[0], answers
    doctor, _, read, _ = answers
    assert message in doctor and message in read and "\n" not in read and len(read) < 1000


@pytest.mark.parametrize("name", HARMLESS)
def test_it_is_read_none_the_less(said: dict[str, list[str]], name: str) -> None:
    doctor, *others = said[name]
    assert HARMLESS[name][2] in doctor and others == ["fine"] * 3


def varint(value: int, width: int = 0) -> bytes:
    """Seven bits a byte, and as many bytes as asked for."""
    out = bytearray()
    while value or len(out) < width:
        out.append(value & 127 | 128)
        value >>= 7
    out[-1] &= 127
    return bytes(out)


def test_a_footer_is_not_believed_about_how_much_there_is(tmp_path: Path) -> None:
    count = 2**20
    whole = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.float32)))
    path = tmp_path / "lies.parquet"
    pq.write_table(pa.table({"x": whole}), path, compression="zstd")

    raw = bytearray(path.read_bytes())
    claim = varint(2 * count)  # a positive number, twice: zigzag
    at = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    while (at := raw.find(claim, at)) >= 0:
        raw[at : at + len(claim)] = varint(2, len(claim))
    path.write_bytes(raw)
    file = open_parquet(path)
    column = file.metadata.row_group(0).column(0)
    assert column.num_values == 1 and count_pages(path, column).values == count and len(raw) < 1000

    with pytest.raises(DatasetError, match="x would take 4 MiB or more in memory, at most 1 MiB"):
        read_columns(file, ["x"], path, limit=2**20)
    assert len(read_columns(file, ["x"], path, limit=2**23)["x"][0]) == count  # the control: all of it is there


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("checksums", [True, False])
def test_pages_are_counted_as_an_honest_footer_says(version: str, checksums: bool, tmp_path: Path) -> None:
    path = tmp_path / "honest.parquet"
    columns = {"text": ["a", "b", None] * 1000, "number": list(range(3000)), "list": [[1, 2], [], None] * 1000}
    options = {"data_page_version": version, "write_page_checksum": checksums, "data_page_size": 1000}
    pq.write_table(pa.table(columns), path, use_dictionary=["text"], **options)
    group = pq.ParquetFile(path).metadata.row_group(0)
    pages = [count_pages(path, group.column(n)) for n in range(3)]
    assert [page.values for page in pages] == [group.column(n).num_values for n in range(3)] == [3000, 3000, 4000]
    assert [page.is_plain for page in pages] == [False, True, True]

    raw = bytearray(path.read_bytes())
    raw[group.column(1).data_page_offset] = 0x1F  # no field of a page's header
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match="the pages of 'number' cannot be read"):
        count_pages(path, group.column(1))


@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/x", "a\0b", "x" * 5000, "\ud800"])
def test_a_path_that_is_no_folder_is_one_line(root: str) -> None:
    with pytest.raises(InsulaError, match="no directory"):
        LeRobotDataset(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
