"""Subtasks read from every place where data sets keep them, and what a mapping says of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, FPS, LENGTHS, TASKS, v30
from subtask_files import (
    CHANGE,
    STEPS,
    add_column,
    entries,
    entry,
    expected,
    lines,
    numbers,
    stretches,
    with_annotations,
    with_index,
)

from insula.data.describe import describe
from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.mapping import Mapping, RobotData, mapping_to_json, parse_mapping, read_mapping
from insula.data.subtasks import _from_numbers, read_subtasks
from insula.errors import DatasetError, InputError
from insula.train.data import moved_mapping

FRAMES = np.arange(sum(LENGTHS))

# --- reading ---------------------------------------------------------------------------------------------------------


def read(root: Path, subtasks: str | Path, frames: np.ndarray = FRAMES) -> list[str | None]:
    return read_subtasks(LeRobotDataset(root), RobotData(root, {}, subtasks=subtasks)).of(frames)


def with_texts(root: Path) -> Path:
    """A column of text, null or empty where there is none."""
    v30(root, video=False)
    texts = {frame: text for frame, text in enumerate(expected())}
    first = np.cumsum([0, *LENGTHS])
    rows = lambda e, n: [texts[first[e] + i] if i else texts[first[e]] or "" for i in range(n)]  # noqa: E731
    add_column(root, "step", {"dtype": "string", "shape": [1], "names": None}, rows, pa.string())
    return root


def test_every_place_says_the_same(tmp_path: Path) -> None:
    assert read(with_index(tmp_path / "index"), "subtask_index") == expected()
    annotated = with_annotations(tmp_path / "annotations")
    assert read(annotated, "language_persistent") == expected()
    info = annotated / "meta" / "info.json"
    info.write_text(info.read_text().replace('"v3.0"', '"v3.1"'))  # as the same is called by some
    assert read(annotated, "language_persistent") == expected()
    assert read(with_texts(tmp_path / "texts"), "step") == expected()
    assert read(tmp_path / "texts", lines(tmp_path / "labels.jsonl", *stretches())) == expected()
    assert {None, *STEPS} == set(expected())


def test_whole_numbers_point_into_the_subtasks_or_else_the_tasks(tmp_path: Path) -> None:
    root = with_index(tmp_path / "set", rows=lambda e, n: [-1, *[e % 2] * (n - 1)], name="annotation.step")
    assert read(root, "annotation.step", np.array([0, 1, 8])) == [None, STEPS[0], STEPS[1]]
    (root / "meta" / "subtasks.parquet").unlink()
    assert read(root, "annotation.step", np.array([0, 1, 8])) == [None, *TASKS]
    assert read(root, "task_index", np.array([0, 8])) == list(TASKS)
    # A task that says nothing is none, as everywhere.
    blank = LeRobotDataset(root)
    blank.tasks = (" ", *TASKS[1:])
    assert _from_numbers(blank, "task_index").number[[0, 8]].tolist() == [-1, 0]


def test_an_annotation_holds_from_the_nearest_frame_on(tmp_path: Path) -> None:
    for name, off, frame in (("early", 0.04, CHANGE), ("late", 0.06, CHANGE + 1)):
        told = [entry("first", 0.0), entry("then", CHANGE / FPS + off), entry("then", CHANGE / FPS + off)]
        root = with_annotations(tmp_path / name, lambda _, told=told: told)
        found = read(root, "language_persistent")
        assert found[: LENGTHS[0]] == ["first"] * frame + ["then"] * (LENGTHS[0] - frame)


def broken_table(**columns: Any) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        with_index(root)
        pq.write_table(pa.table(columns), root / "meta" / "subtasks.parquet")
        return root

    return make


def without_table(root: Path) -> Path:
    (with_index(root) / "meta" / "subtasks.parquet").unlink()
    return root


def told(*rows: dict[str, Any]) -> Callable[[Path], Path]:
    return lambda root: with_annotations(root, lambda _: list(rows))


def events(root: Path) -> Path:
    kind = pa.list_(pa.struct([pa.field("style", pa.string()), pa.field("content", pa.string())]))
    feature = {"dtype": "language", "shape": [1], "names": None}
    add_column(v30(root, video=False), "language_events", feature, lambda e, n: [[]] * n, kind)
    return root


def changing(root: Path) -> Path:
    return with_annotations(root, rows=lambda e, n: [*[entries(e)] * (n - 1), [] if e == 1 else entries(e)])


WRONG: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "a name": (with_index, "subtask_idx", r"no column 'subtask_idx' .did you mean 'subtask_index'.*in subtask_index"),
    "numbers": (with_index, ACTION, "'action' holds float32 values of shape .3.; subtasks are a column of text"),
    "a camera": (with_index, CAMERA, "holds image values"),
    "no table": (without_table, "subtask_index", r"subtasks\.parquet: missing, .*'subtask_index' mean"),
    "outside": (
        lambda root: with_index(root, rows=lambda e, n: [*numbers(e, n)[:-1], 7 if e == 1 else 0]),
        "subtask_index",
        r"episode 1, frame 11: 'subtask_index' is 7, .*subtasks\.parquet has 0 to 2 .1 such frames",
    ),
    "below": (lambda root: with_index(root, rows=lambda e, n: [-2] * n), "subtask_index", "'subtask_index' is -2"),
    "none at all": (lambda root: with_index(root, rows=lambda e, n: [-1] * n), "subtask_index", "no frame has a subt"),
    "a text": (
        lambda root: with_index(root, (STEPS[0], "None", STEPS[2])),
        "subtask_index",
        "episode 0, frame 3: the subtask in 'subtask_index' is 'None', which stands for a missing text .6 of 24",
    ),
    "null": (broken_table(subtask=["a", None], subtask_index=[0, 1]), "subtask_index", "row 1: 'subtask' is null"),
    "twice": (broken_table(subtask=["a", "b"], subtask_index=[0, 0]), "subtask_index", "subtask_index 0 is both"),
    "a column": (broken_table(subtask=["a"], subtask_idx=[0]), "subtask_index", r"did you mean 'subtask_idx'"),
    "no subtask": (told(entry("a plan", 0.0, "plan")), "language_persistent", "no frame has a subtask"),
    "no content": (told(entry(None, 0.3)), "language_persistent", "the subtask at 0.30 s is null, expected a text"),
    "nan": (told(entry("nan", 0.3)), "language_persistent", 'the subtask at 0.30 s is "nan"'),
    "no time": (told(entry("go", np.nan)), "language_persistent", "episode 0, frame 0: an entry has no time"),
    "two at once": (told(entry("a", 0.2), entry("b", 0.2)), "language_persistent", "two .* at 0.20 s, 'a' and 'b'"),
    "another clock": (told(entry("a", 9.0)), "language_persistent", "'a' begins at 9.00 s, .* ends at 0.60 s"),
    "changing": (changing, "language_persistent", "episode 1, frame 11: holds other annotations"),
    "events": (events, "language_events", r"expected lists of .style, content, timestamp.: no timestamp"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_column_is_named(tmp_path: Path, wrong: str) -> None:
    make, name, message = WRONG[wrong]
    with pytest.raises(DatasetError, match=message):
        read(make(tmp_path / "set"), name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"episode": 7}, r"labels.jsonl, line 2: no episode 7; .* has 0 to 2"),
        ({"start": 2}, r"line 2: overlaps .*labels.jsonl, line 1"),
        ({"stop": 8}, r"line 2: frames 3 to 8 of episode 0; expected start < stop ≤ 7"),
        ({"stop": 3}, "line 2: frames 3 to 3"),
        ({"start": -1}, "line 2: 'start' is -1, expected a whole number from 0 on"),
        ({"stop": 4.5}, "line 2: 'stop' is 4.5"),
        ({"subtask": "none"}, "line 2: the subtask is 'none'"),
        ({"subtask": " "}, "line 2: the subtask is ' '"),
        ({"subtask": 3}, "line 2: 'subtask' is 3, expected a text"),
        ({"subtask": ...}, "line 2: expected an object with episode, start, stop, subtask"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    root = v30(tmp_path / "set", video=False)
    first = {"episode": 0, "start": 0, "stop": 3, "subtask": "go"}
    second = {key: value for key, value in (first | {"start": 3, "stop": 7} | row).items() if value is not ...}
    with pytest.raises(DatasetError, match=message):
        read(root, lines(tmp_path / "labels.jsonl", first, second))
    assert read(root, lines(tmp_path / "labels.jsonl", first), np.array([2, 3])) == ["go", None]
    with pytest.raises(DatasetError, match=r"other\.jsonl: no such file"):
        read(root, tmp_path / "other.jsonl")


def test_the_doctor_says_what_training_would(tmp_path: Path) -> None:
    """A fault where a column is malformed; nothing where it is sound, or merely says nothing."""
    for wrong in ("no table", "a text", "two at once"):
        root = WRONG[wrong][0](tmp_path / wrong)
        (found,) = [finding for finding in examine(root) if finding.fault == "subtasks"]
        assert not found.is_note and found.subject == WRONG[wrong][1]
        with pytest.raises(DatasetError) as error:
            read(root, WRONG[wrong][1])
        assert found.message == str(error.value)
    for sound in (with_index, with_annotations, WRONG["none at all"][0]):
        assert all(finding.is_note for finding in examine(sound(tmp_path / f"sound {sound}")))


def test_describe_offers_them_and_convert_keeps_them(tmp_path: Path) -> None:
    for make, name in ((with_index, "subtask_index"), (with_annotations, "language_persistent")):
        said = describe(make(tmp_path / name), ("front",))
        assert f'# subtasks = "{name}"' in said and f'cannot be read: "{name}"' not in said
        (tmp_path / "data.toml").write_text(said.replace("# subtasks", "subtasks"))
        (robot,) = read_mapping(tmp_path / "data.toml", ("front",)).robots.values()
        assert robot.subtasks == name
    assert "subtasks" not in describe(v30(tmp_path / "none", video=False), ("front",))
    convert_dataset(tmp_path / "subtask_index", tmp_path / "converted")
    assert read(tmp_path / "converted", "subtask_index") == expected()


# --- mapping ---------------------------------------------------------------------------------------------------------


def mapped(extra: str, folder: Path = Path("/data")) -> Mapping:
    robot: dict[str, Any] = {"path": "set", "cameras": {"front": CAMERA}, "weight": 2}
    return parse_mapping({"robots": {"arm": robot | json.loads(extra)}}, folder, "data.toml")


def test_forms_and_their_shares() -> None:
    assert mapped("{}").weights == [2.0] and list(mapped("{}").sources) == ["arm"]
    usual = mapped('{"subtasks": "subtask_index"}')
    assert list(usual.sources) == ["arm:subtask", "arm:actions"] and usual.weights == [0.5, 1.5]
    all_three = mapped('{"subtasks": "labels.jsonl", "forms": {"flat": 1, "actions": 2, "subtask": 1}}')
    assert list(all_three.sources) == ["arm", "arm:actions", "arm:subtask"] and all_three.weights == [0.5, 1.0, 0.5]
    assert all_three.robots["arm"].subtasks == Path("/data/labels.jsonl")
    stored = json.loads(json.dumps(mapping_to_json(all_three)))
    assert parse_mapping(stored, Path("/elsewhere"), "stored") == all_three


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('{"forms": {"actions": 1}}', r'robots.arm.forms: actions needs subtasks; .*subtasks = "subtask_index"'),
        ('{"subtasks": "s", "forms": {"action": 1}}', r"no form 'action' .did you mean 'actions'"),
        ('{"subtasks": "s", "forms": {"actions": 0}}', "forms.actions is 0, expected a number > 0"),
        ('{"subtasks": "s", "forms": {"actions": "1"}}', "forms.actions is '1'"),
        ('{"subtasks": "s", "forms": {"actions": true}}', "forms.actions is True"),
        ('{"subtasks": "s", "forms": ["actions"]}', "forms is .'actions'., expected dict"),
        ('{"subtasks": 3}', "subtasks is 3, expected str"),
        ('{"subtasks": "s", "losses": ["flow"]}', "the form subtask is scored by the loss 'fast' alone"),
        ('{"subtask": "s"}', "no setting 'subtask' .did you mean 'subtasks'"),
    ],
)
def test_forms_that_cannot_be(extra: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        mapped(extra)
    assert mapped('{"subtasks": "s", "losses": ["flow"], "forms": {"actions": 1}}').weights == [2.0]


def test_a_file_of_lines_may_move_with_its_mapping(tmp_path: Path) -> None:
    """As the data set may, while a run goes on; another column is another training."""
    cameras = f'cameras = {{ front = "{CAMERA}" }}'

    def write(name: str, subtasks: str) -> Path:
        (tmp_path / name).mkdir()
        text = f'[robots.arm]\npath = "set"\n{cameras}\nsubtasks = "{subtasks}"\n'
        (tmp_path / name / "data.toml").write_text(text)
        return tmp_path / name / "data.toml"

    stored = read_mapping(write("before", "labels.jsonl"), ("front",))
    moved = moved_mapping(stored, write("after", "labels.jsonl"), read_mapping)
    assert moved.robots["arm"].subtasks == tmp_path / "after" / "labels.jsonl"
    with pytest.raises(InputError, match=r"robots\.arm\.subtasks is 'step', the run was started with .*labels\.jsonl"):
        moved_mapping(stored, write("other", "step"), read_mapping)
