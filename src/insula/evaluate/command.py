"""What `insula evaluate` does."""

from pathlib import Path

from insula.evaluate.closed_loop import evaluate
from insula.evaluate.rollout_video import reel, write_video
from insula.files import write_json
from insula.policy import Policy
from insula.worlds.seeds import EVALUATION


def evaluate_run(
    run: Path,
    episodes: int,
    first_seed: int | None,
    replan_steps: int,
    results: Path | None,
    video: Path | None,
    robot: str | None = None,
) -> str:
    """Run the newest policy of `run` in closed loop, write what was asked for, and return a table."""
    policy = Policy.load(run, robot=robot)
    done = evaluate(policy, episodes, EVALUATION.start if first_seed is None else first_seed, replan_steps)
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, done.to_json())
    if video is not None:
        write_video(video, reel(done.recordings))
    return done.summary()
