"""Data sets of tests/lerobot_files.py with the step of the task at each frame, in each way that LeRobot has had."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot_files import CAMERA, FPS, LENGTHS, v30
from mixtures import SMALL

from insula.inspection.config import INSPECTED, InspectConfig
from insula.inspection.findings import Inspector
from insula.inspection.subject import open_subject

STEPS = ("reach for the block", "lift it", "put it down")
CHANGE = 3
"""The frame of each episode at which its second step begins."""
ENTRY = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string()),
        pa.field("style", pa.string()),
        pa.field("timestamp", pa.float32(), nullable=False),
        pa.field("camera", pa.string()),
        pa.field("tool_calls", pa.list_(pa.string())),
    ]
)
Rows = Callable[[int, int], Any]
"""(episode, its length) -> what each of its frames holds."""


def add_column(root: Path, name: str, feature: dict[str, Any], rows: Rows, kind: pa.DataType) -> None:
    """One more column, in every data file and in meta/info.json."""
    path = root / "meta" / "info.json"
    raw = json.loads(path.read_text())
    raw["features"][name] = feature
    path.write_text(json.dumps(raw))
    for file in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(file)
        episodes = np.unique(table["episode_index"].to_numpy()).tolist()
        values = [value for e in episodes for value in rows(e, LENGTHS[e])]
        # Two rows to a group: what an episode says is then in several.
        pq.write_table(table.append_column(name, pa.array(values, kind)), file, row_group_size=4)


def step_of(episode: int, frame: int) -> int:
    """Which of STEPS: none in episode 2's first two frames; episodes 0 and 1 end with different ones."""
    if episode == 2 and frame < 2:
        return -1
    return 0 if frame < CHANGE else 1 + episode % 2


def numbers(episode: int, length: int) -> list[int]:
    return [step_of(episode, frame) for frame in range(length)]


def expected() -> list[str | None]:
    steps = [step for e, n in enumerate(LENGTHS) for step in numbers(e, n)]
    return [None if step < 0 else STEPS[step] for step in steps]


def with_index(root: Path, texts: tuple[str, ...] = STEPS, rows: Rows = numbers, name: str = "subtask_index") -> Path:
    """As LeRobot 0.4.4 to 0.5: a column of numbers, and meta/subtasks.parquet with the texts as pandas' index."""
    v30(root, video=False)
    add_column(root, name, {"dtype": "int64", "shape": [1], "names": None}, rows, pa.int64())
    table = pa.table({"subtask_index": pa.array(range(len(texts)), pa.int64()), "subtask": pa.array(texts)})
    note = {"index_columns": ["subtask"], "columns": [], "column_indexes": [], "pandas_version": "2.0.0"}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), root / "meta" / "subtasks.parquet")
    return root


def write_mapping(root: Path, forms: str) -> Path:
    """`root/data.toml`, of the robot arm with these forms, and `root/set`, in which one episode begins without any."""
    with_index(root / "set")
    cameras = f'{{ front = "{CAMERA}" }}'
    extra = f'subtasks = "subtask_index"\nforms = {{ {forms} }}'
    (root / "data.toml").write_text(f'[robots.arm]\npath = "set"\ncameras = {cameras}\n{extra}\n')
    return root / "data.toml"


def subtask_inspector(root: Path, forms: str = "flat = 1, subtask = 1, actions = 2") -> Inspector:
    """Of `write_mapping`, with random weights as if they were trained: they say something, though nothing learned."""
    model = dataclasses.replace(SMALL, max_prompt_len=48)
    reading = dataclasses.replace(INSPECTED, fast_vocab=400, fast_scale=4.0)
    subject = open_subject(InspectConfig(data=write_mapping(root, forms), model=model, reading=reading))
    return Inspector(dataclasses.replace(subject, trained=True))


def entry(content: str | None, time: float, style: str = "subtask") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "style": style, "timestamp": time, "tool_calls": ["{}"]}


def entries(episode: int) -> list[dict[str, Any]]:
    """Out of order and among others, as annotators write them."""
    first = 2 if episode == 2 else 0
    return [
        entry("a plan of everything", 0.0, "plan"),
        entry(STEPS[1 + episode % 2], CHANGE / FPS),
        entry(STEPS[0], first / FPS),
        entry("the block is red", 0.1, "memory"),
    ]


def with_annotations(root: Path, told: Callable[[int], Any] = entries, rows: Rows | None = None) -> Path:
    """As LeRobot from 0.6 on: every frame of an episode holds all that is said of it."""
    v30(root, video=False)
    feature = {"dtype": "language", "shape": [1], "names": None}
    add_column(root, "language_persistent", feature, rows or (lambda e, n: [told(e)] * n), pa.list_(ENTRY))
    return root


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stretches() -> list[dict[str, Any]]:
    """What `step_of` says, a line for each stretch of frames."""
    first = {0: 0, 1: 0, 2: 2}
    parts = [(e, first[e], CHANGE, 0) for e in range(3)] + [(e, CHANGE, n, 1 + e % 2) for e, n in enumerate(LENGTHS)]
    return [{"episode": e, "start": a, "stop": b, "subtask": STEPS[step]} for e, a, b, step in parts]
