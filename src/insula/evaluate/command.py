"""What `insula evaluate` does."""

import dataclasses
from pathlib import Path

import tyro

from insula.checks import check_integer, check_seed
from insula.evaluate.closed_loop import check_seeds, evaluate
from insula.evaluate.rollout_video import ENDINGS, reel, write_video
from insula.files import check_output_file, write_json
from insula.policy import Policy
from insula.worlds.seeds import EVALUATION


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Run a trained policy in closed loop in the tabletop: success, wrong objects, and swapped instructions."""

    run: tyro.conf.Positional[Path]
    """Folder that `insula train` wrote."""
    episodes: int = 100
    """Scenes; each is tried with its instruction and with another one."""
    first_seed: int = EVALUATION.start
    """Scenes count up from here. A scene evaluated alone (--episodes 1) is the episode it was among others."""
    replan_steps: int = 2
    """Steps of each chunk to execute before the policy looks again."""
    seed: int = 0
    """Of the policy's noise, which depends on it, the scene and the step alone."""
    json: Path | None = None
    """Write the results to this .json file."""
    video: Path | None = None
    """Write the first episodes to this .mp4 or .gif."""
    robot: str | None = None
    """Which one to act for, where the run was trained on several."""

    def __post_init__(self) -> None:
        check_integer("episodes", self.episodes, 1)
        check_integer("replan_steps", self.replan_steps, 1)
        check_seed("seed", self.seed)


def run_evaluate(config: EvaluateConfig) -> None:
    """Run the newest policy of a run, print a table, and write what was asked for.

    Raises, before anything is run, InputError for seeds of another purpose and for outputs of another ending, FileError
    for outputs that cannot be written.
    """
    # `evaluate` checks the seeds, too, but only after a checkpoint is loaded.
    check_seeds(config.episodes, config.first_seed, allow_any_seed=False, used=())
    if config.json is not None:
        check_output_file(config.json, (".json",), "json")
    if config.video is not None:
        check_output_file(config.video, ENDINGS, "video")

    policy = Policy.load(config.run, seed=config.seed, robot=config.robot)
    done = evaluate(policy, config.episodes, config.first_seed, config.replan_steps)
    print(done.summary(), flush=True)  # before any file: a full disk must not cost minutes of episodes

    if config.json is not None:
        write_json(config.json, done.to_json())
    if config.video is not None:
        write_video(config.video, reel(done.recordings))
