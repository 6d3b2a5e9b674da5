"""Notes on data that can be read and makes no sense: each is planted, beside something alike that is right."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from insula.data.lerobot import LeRobotWriter
from insula.data.lerobot.doctor import examine
from insula.data.lerobot.info import Feature, image_feature
from insula.data.lerobot.remedies import NOTES, REMEDIES
from insula.data.lerobot.sanity import sanity_notes

CAMERA, STATE, ACTION = "observation.images.front", "observation.state", "action"
FEATURES = {
    CAMERA: image_feature(12, 16),
    STATE: Feature("float32", (2,), ("shoulder", "grip")),
    ACTION: Feature("float32", (3,), ("shoulder", "wrist", "grip")),
}
LENGTH = 60
Episode = dict[str, np.ndarray]


def episode(seed: int) -> Episode:
    t = np.arange(LENGTH)[:, None]
    rng = np.random.default_rng(seed)
    return {
        CAMERA: rng.integers(0, 255, (LENGTH, 12, 16, 3)).astype(np.uint8),
        STATE: np.sin(0.2 * t + np.arange(2) + seed).astype(np.float32),
        ACTION: np.cos(0.2 * t + np.arange(3) + seed).astype(np.float32),
    }


def notes(root: Path, change: Callable[[int, Episode], object], tasks: tuple[str, ...] = ("push",) * 3) -> list[str]:
    """Of a data set of an episode for each task, changed."""
    with LeRobotWriter(root, fps=10, features=FEATURES, robot_type="arm") as writer:
        for number, task in enumerate(tasks):
            made = episode(number)
            change(number, made)
            writer.add_episode(made, task=task)
    return [f"{note.fault}: {note.place}: {note.message}" for note in sanity_notes(root)]


def set_dim(name: str, dim: int, values: Callable[[np.ndarray], np.ndarray]) -> Callable[[int, Episode], None]:
    """Another course of one dimension, as a function of the time."""

    def change(number: int, made: Episode) -> None:
        made[name][:, dim] = values(np.arange(LENGTH, dtype=np.float64) + number)

    return change


def wrapped(turn: float, speed: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: (t * speed * turn) % turn - turn / 2


WRONG = {
    "a joint that never moves": (
        set_dim(ACTION, 1, lambda t: 0 * t + 0.3),
        "constant: data set: 'action': wrist is 0.3 in every",
    ),
    "one at zero": (set_dim(ACTION, 1, lambda t: 0 * t), "constant: data set: 'action': wrist is 0 in every"),
    "an angle that wraps": (
        set_dim(STATE, 0, wrapped(2 * np.pi, 0.03)),
        "jump: episode 0, frame 34: 'observation.state', shoulder jumps by 2π",
    ),
    "an angle in degrees": (set_dim(ACTION, 1, wrapped(360, 0.03)), "'action', wrist jumps by 360°"),
    "a glitch": (
        lambda number, made: made[ACTION].__setitem__((5, 1), 1e6 if number == 2 else 0.0),
        "spike: episode 2, frame 5: 'action', wrist is 1e",
    ),
    "a black camera": (
        lambda number, made: made[CAMERA].fill(0) if number == 1 else None,
        "black pictures: episode 1: 'observation.images.front': pictures are black in episode 1",
    ),
    "a frozen camera": (
        lambda number, made: made[CAMERA].__setitem__(slice(None), made[CAMERA][0]) if number else None,
        "frozen pictures: episode 1: 'observation.images.front': pictures are all the same in 2 episodes (1, 2)",
    ),
}
RIGHT = {
    "all as it should be": lambda *_: None,
    "tiny units": lambda _, made: made.update({ACTION: made[ACTION] * np.float32(1e-7)}),
    "an angle that is not wrapped": set_dim(STATE, 0, lambda t: t * 0.2),
    "a joint that is faster than a turn can tell": set_dim(STATE, 0, lambda t: 3 * np.sin(t * 2.1)),
    "a gripper that closes once": set_dim(ACTION, 2, lambda t: (t == 30).astype(float)),
    "a gripper that rests at noise": set_dim(ACTION, 2, lambda t: 1e-7 * np.sin(t) + (t > 56)),
    "a still robot": lambda _, made: [made[name].__setitem__(slice(None), made[name][0]) for name in (CAMERA, STATE)],
    "a camera that is black at first": lambda _, made: made[CAMERA].__setitem__(slice(0, 20), 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_sense_is_noted_once(name: str, tmp_path: Path) -> None:
    change, said = WRONG[name]
    (note,) = notes(tmp_path / "set", change)
    assert said in note


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_only_alike_is_not_noted(name: str, tmp_path: Path) -> None:
    change = RIGHT[name]
    found = notes(tmp_path / "set", change)
    assert found == [] or (name == "a still robot" and all("frozen" not in note for note in found))


def test_actions_that_are_the_state_of_the_same_frame(tmp_path: Path) -> None:
    features = FEATURES | {STATE: Feature("float32", (3,), None)}

    def copy(shift: int) -> list[str]:
        root = tmp_path / f"set{shift}"
        with LeRobotWriter(root, fps=10, features=features, robot_type="arm") as writer:
            for number in range(2):
                made = episode(number)
                made[STATE] = np.roll(made[ACTION], shift, axis=0)
                writer.add_episode(made, task="push")
        return [note.fault for note in sanity_notes(root)]

    assert copy(0) == ["copy"] and copy(1) == []


def test_tasks_that_say_nothing(tmp_path: Path) -> None:
    root = tmp_path / "set"
    notes(root, RIGHT["all as it should be"], ("", "  \n", "nan", "push the nan bread"))
    (note,) = [finding for finding in examine(root) if finding.fault == "no text"]
    assert note.is_note and f"in {3 * LENGTH} of {4 * LENGTH} frames" in note.message


def test_several_dimensions_are_one_note(tmp_path: Path) -> None:
    (note,) = notes(tmp_path / "set", lambda _, made: made[ACTION].__setitem__((slice(None), slice(0, 2)), 0.5))
    assert note.endswith("'action': 2 of 3 dimensions never move: shoulder, wrist")


def test_infinity_and_what_cannot_be_read_are_for_the_doctor(tmp_path: Path) -> None:
    root = tmp_path / "set"
    assert notes(root, RIGHT["all as it should be"]) == []
    (file,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(file)
    values = [[np.inf, np.nan], *table[STATE].to_pylist()[1:]]
    infinite = pa.array(values, table[STATE].type)
    pq.write_table(table.set_column(table.column_names.index(STATE), STATE, infinite), file)
    assert list(sanity_notes(root)) == []
    texts = pa.array(["x"] * table.num_rows)
    pq.write_table(table.set_column(table.column_names.index(STATE), STATE, texts), file)
    assert list(sanity_notes(root)) == [] and list(sanity_notes(tmp_path / "nowhere")) == []


def test_each_is_a_note_with_a_remedy() -> None:
    faults = {"constant", "jump", "spike", "copy", "black pictures", "frozen pictures"}
    assert faults <= NOTES and faults <= REMEDIES.keys()
