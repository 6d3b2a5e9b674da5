"""Demonstrations of the tabletop, through the same files as anybody's."""

import json
from pathlib import Path

import numpy as np
import pytest

from insula.collect import demonstrations as module
from insula.collect.command import CollectConfig, run_collect
from insula.collect.demonstrations import collect, collect_questions
from insula.data.lerobot import LeRobotDataset
from insula.errors import DatasetError, InputError
from insula.worlds.seeds import DEMONSTRATIONS, EVALUATION
from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.demonstrator import rollout


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_what_is_written_is_what_the_expert_did(tmp_path):
    seen: list[int] = []
    collected = collect(tmp_path / "set", episodes=3, first_seed=10, noise=0.2, processes=1, progress=seen.append)
    dataset = LeRobotDataset(collected.root)
    assert len(dataset.episodes) == len(collected.seeds) == 3 and len(dataset) == collected.frames
    assert seen[-1] == 3 and dataset.fps == 10 and dataset.info.robot_type == "insula_tabletop"
    assert dataset.cameras == ("observation.images.front", "observation.images.wrist")
    assert dataset.feature("action").names == ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")

    env = make_tabletop()
    try:
        episode = rollout(env, np.random.default_rng([collected.seeds[1], 1]), noise=0.2, seed=collected.seeds[1])
    finally:
        env.close()
    rows = slice(int(dataset.episodes.start[1]), int(dataset.episodes.stop[1]))
    assert dataset.episodes.tasks[1] == (episode.task,)
    np.testing.assert_array_equal(dataset.column("action")[rows], episode.labels)
    assert (dataset.column("action")[rows] != episode.executed).any()  # noise was executed, not recorded
    for camera in ("front", "wrist"):
        np.testing.assert_array_equal(
            dataset.images(f"observation.images.{camera}", np.arange(rows.start, rows.stop)),
            np.stack([o["images"][camera] for o in episode.observations]),
        )
    np.testing.assert_array_equal(
        dataset.column("observation.state")[rows], np.stack([o["state"] for o in episode.observations])
    )


def test_pictures_have_the_size_that_was_asked_for(tmp_path: Path) -> None:
    """Control: 64 unless told."""
    for size, flags in ((224, {"image_size": 224}), (64, {})):
        run_collect(CollectConfig(tmp_path / str(size), episodes=1, **flags))
        dataset = LeRobotDataset(tmp_path / str(size))
        assert {dataset.feature(camera).size for camera in dataset.cameras} == {(size, size)}
    with pytest.raises(InputError, match="image_size is 8, expected an integer from 16 to 1024"):
        CollectConfig(tmp_path, image_size=8)


@pytest.mark.slow
def test_processes_change_nothing(tmp_path):
    for processes in (1, 2):
        collect(tmp_path / str(processes), episodes=20, processes=processes)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_failures_are_discarded_counted_and_logged(tmp_path, monkeypatch, caplog):
    honest = module.rollout

    def clumsy(env, rng, noise, seed):
        episode = honest(env, rng, noise=noise, seed=seed)
        return episode if seed % 2 else type(episode)(**{**vars(episode), "success": False})

    monkeypatch.setattr(module, "rollout", clumsy)
    collected = collect(tmp_path / "set", episodes=2, first_seed=4, noise=0.0, processes=1)
    assert collected.seeds == (5, 7) and collected.discarded == (4, 6)
    assert "2 of 4 demonstrations failed" in caplog.text
    assert json.loads((tmp_path / "set/meta/collected.json").read_text())["discarded_seeds"] == [4, 6]
    assert len(LeRobotDataset(tmp_path / "set").episodes) == 2


def test_seeds_kept_for_evaluation_are_refused(tmp_path):
    for first in (EVALUATION.start, DEMONSTRATIONS.stop - 3):
        with pytest.raises(ValueError, match="kept for another purpose"):
            collect(tmp_path / "set", episodes=4, first_seed=first)
    with pytest.raises(ValueError, match="at least 1"):
        collect(tmp_path / "set", episodes=0)
    assert not list(tmp_path.iterdir())


def test_fewer_scenes_than_processes_and_no_picture_of_before(tmp_path: Path) -> None:
    root = tmp_path / "questions"
    assert collect_questions(root, scenes=2, each=1) == 2
    assert collect_questions(root, scenes=1, each=3, overwrite=True) == 3
    rows = [json.loads(line) for line in (root / "questions.jsonl").read_text().splitlines()]
    shown = {path for row in rows for path in row["images"].values()}
    assert {f"images/{path.name}" for path in (root / "images").iterdir()} == shown
    with pytest.raises(DatasetError, match="not empty"):
        collect_questions(root, scenes=1)
