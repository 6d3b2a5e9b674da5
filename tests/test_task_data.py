"""What is made of the tabletop's tasks: questions with true answers, data sets with a subtask for each frame."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from task_worlds import OUT, TOWER, block, table, tower, undrawn_worlds

from insula.collect.demonstrations import collect
from insula.collect.scenes import KIND_WEIGHTS, TASK_KIND_WEIGHTS, render_scenes
from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.info import Feature
from insula.data.lerobot.writer import LeRobotWriter
from insula.errors import DatasetError, InputError
from insula.worlds.seeds import PRETRAINING
from insula.worlds.tabletop import demonstrator
from insula.worlds.tabletop.facts import Table
from insula.worlds.tabletop.goals import Goal
from insula.worlds.tabletop.instructions import instruction
from insula.worlds.tabletop.quiz import KINDS
from insula.worlds.tabletop.task_quiz import TASK_KINDS, task_questions
from insula.worlds.tabletop.tasks import TASKS
from insula.worlds.tabletop.tasks.pairs import pair_goal
from insula.worlds.tabletop.tasks.unseen_pairs import HELD_OUT_PAIRS, asks_held_out


@pytest.fixture(scope="module")
def worlds():
    with undrawn_worlds() as made:
        yield made


# --- questions ------------------------------------------------------------------------------------------------------


def answers(where: Table, goal: Goal, kind: str) -> dict[str, str]:
    return dict(task_questions(where, goal, kind))


def test_questions_of_tables_made_by_hand():
    assert answers(table(*tower()), TOWER, "stacked") == {
        "what is on the green block": "the blue block",
        "what is on the blue block": "the red block",
        "is the blue block on the green block": "yes",
        "is the red block on the blue block": "yes",
    }  # red is above green, yet not on it: neither yes nor no is plain
    apart = answers(table(*OUT), TOWER, "stacked")
    assert apart["what is on the red block"] == "nothing" and apart["is the red block on the blue block"] == "no"
    assert not answers(table(*OUT, held="red"), TOWER, "stacked")
    assert not answers(table(block("red", 0, 0.2, speed=0.2), *OUT[1:]), TOWER, "stacked")

    assert not answers(table(*OUT), TOWER, "size")  # all alike
    sizes = table(block("red", 0.0, half=0.016), block("blue", 0.1, half=0.02), block("green", 0.1, 0.1, half=0.024))
    assert answers(sizes, TOWER, "size") == {
        "which block is the largest": "the green block",
        "which block is the smallest": "the red block",
    }
    places = table(block("red", -0.17), block("blue", 0.03, 0.1), block("green", 0.19))
    assert answers(places, TOWER, "beside") == {
        "which block is left of the red bowl": "the red block",
        "which block is right of the blue bowl": "the green block",
    }
    assert answers(places, TOWER, "distance")["which block is nearest to the red bowl"] == "the red block"
    assert not answers(table(*places.blocks, held="red"), TOWER, "beside")

    assert answers(table(*OUT), TOWER, "next") == {"stack: what is next": TOWER.placements[0].text}
    assert not answers(table(*tower()), TOWER, "next")  # all done
    with pytest.raises(InputError, match="did you mean 'stacked'"):
        task_questions(table(*OUT), TOWER, "stackd")


def test_the_new_kinds_have_weights_of_their_own():
    assert set(TASK_KIND_WEIGHTS) == set(TASK_KINDS) and set(KIND_WEIGHTS) == set(KINDS)
    assert not set(KINDS) & set(TASK_KINDS)


# --- data sets ------------------------------------------------------------------------------------------------------


def test_all_tasks_in_turn_with_a_subtask_for_each_frame(tmp_path, worlds):
    done = collect(tmp_path / "set", 7, 28, task="all", image_size=16, processes=1)
    dataset = LeRobotDataset(done.root)
    note = json.loads((done.root / "meta" / "collected.json").read_text())
    assert note["tasks"] == list(TASKS) and note["split"] == "train"
    assert [tuple(pair) for pair in note["held_out_pairs"]] == list(HELD_OUT_PAIRS)

    texts = pq.read_table(done.root / "meta" / "subtasks.parquet")
    pandas = json.loads(texts.schema.metadata[b"pandas"])
    assert pandas["index_columns"] == ["subtask"]
    assert texts["subtask_index"].to_pylist() == list(range(len(texts)))
    known = texts["subtask"].to_pylist()
    assert dataset.feature("subtask_index").dtype == "int64"
    numbers = dataset.column("subtask_index").astype(int).reshape(-1)

    for episode, (name, seed) in enumerate(zip(TASKS, done.seeds, strict=True)):
        made = demonstrator.rollout(worlds[name], np.random.default_rng([seed, 1]), 0.3, seed=seed)
        rows = slice(int(dataset.episodes.start[episode]), int(dataset.episodes.stop[episode]))
        assert [known[number] for number in numbers[rows]] == made.subtasks
        assert dataset.episodes.tasks[episode] == (made.task,)
        assert not asks_held_out(worlds[name].unwrapped.goal)


def test_pairs_that_are_held_out_are_in_no_data_set_of_all_tasks(tmp_path):
    """Seeds of `put` that ask for one are left out there, and only there."""
    whose = [seed for seed in range(0, 400, len(TASKS)) if list(TASKS)[seed % len(TASKS)] == "put"]
    first = next(s for s in whose if asks_held_out(TASKS["put"].draw(np.random.default_rng(s), "train").goal))
    assert first in collect(tmp_path / "put", 1, first, image_size=16, processes=1).seeds
    assert first not in collect(tmp_path / "all", 1, first, task="all", image_size=16, processes=1).seeds


def test_no_question_tells_what_is_next_of_a_pair_that_is_held_out():
    """Beside `unseen-pairs`: it would be the very sentence to say. Alone, other tasks ask for all pairs."""
    seeds = PRETRAINING.take(60, 500)
    held_out = [f"put the {block} block in the {bowl} bowl" for block, bowl in HELD_OUT_PAIRS]

    def told(tasks: tuple[str, ...]) -> list[str]:
        asked = render_scenes(seeds, 30, 16, processes=1, tasks=tasks).questions
        return [answer for one in asked for kind, _, answer in one if kind == "next"]

    assert set(told(("distractors",))) & set(held_out)
    beside = told(("distractors", "unseen-pairs"))
    assert len(beside) > 50 and not set(beside) & set(held_out)


def test_all_episodes_have_subtasks_or_none(tmp_path):
    values = {"action": np.zeros((2, 1), np.float32)}

    def writer(name: str, **features: Feature) -> LeRobotWriter:
        return LeRobotWriter(tmp_path / name, 10, {"action": Feature("float32", (1,)), **features})

    with writer("with") as made:
        made.add_episode(values, "t", ["a", "b"])
        made.add_episode(values, "t", "b")
    assert LeRobotDataset(tmp_path / "with").column("subtask_index").reshape(-1).tolist() == [0, 1, 1, 1]
    with writer("without") as made:
        made.add_episode(values, "t")
    assert "subtask_index" not in LeRobotDataset(tmp_path / "without").features
    assert not (tmp_path / "without" / "meta" / "subtasks.parquet").exists()

    with pytest.raises(DatasetError, match="episode 1 has no subtasks, unlike those before"), writer("mixed") as made:
        made.add_episode(values, "t", "a")
        made.add_episode(values, "t")
    with pytest.raises(DatasetError, match="3 subtasks for 2 frames"), writer("three") as made:
        made.add_episode(values, "t", ["a", "b", "c"])
    with pytest.raises(DatasetError, match="episode 0, frame 1: the subtask is ' '"), writer("blank") as made:
        made.add_episode(values, "t", ["a", " "])
    own = {"subtask_index": Feature("int64", (1,))}
    with pytest.raises(InputError, match="filled in from the subtasks"), writer("own", **own) as made:
        made.add_episode(values | {"subtask_index": np.zeros(2, np.int64)}, "t", "a")


def test_a_pair_can_be_named(worlds):
    for name in ("put", "unseen-pairs", "distractors", "moving"):
        worlds[name].reset(seed=2)
        seen = worlds[name].unwrapped.table()
        pair = seen.blocks[2].color, seen.bowls[1].color
        observation, _ = worlds[name].reset(seed=2, options={"task": pair})
        assert worlds[name].unwrapped.goal == pair_goal(pair) and observation["task"] == instruction(*pair)
