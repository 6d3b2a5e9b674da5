"""A robot and its policy server as two processes: the simulated tabletop in real time, ten control steps a second.

python examples/tabletop_robot.py [RUN] [STEPS]        RUN: runs/quick/run; STEPS: 50, five seconds

The loop asks ahead of need, holds where nothing is due, and logs all of it; `insula replay` shows the log.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from policy_server import serving

from insula.client import Client, Loop, Recorder, RuntimeConfig, Stitching
from insula.report.replay import ReplayConfig, run_replay
from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.environment import CONTROL_HZ

SCENE = 1_000_000


class TabletopRobot:
    """The environment as a robot: what it sees now, what it is told to do now."""

    def __init__(self) -> None:
        self.env = make_tabletop()
        self.seen, _ = self.env.reset(seed=SCENE)
        self.task = self.seen["task"]
        self.gripper = 0.0
        self.success = self.over = False

    def observe(self) -> dict[str, Any]:
        """Pictures and state of this moment."""
        return {"images": self.seen["images"], "state": self.seen["state"]}

    def act(self, action: np.ndarray) -> None:
        """One control step."""
        self.gripper = float(action[-1])
        self._step(action)

    def hold(self) -> None:
        """No movement, and the gripper as it is: it must not drop what it holds because a chunk is late."""
        still = np.zeros(self.env.action_space.shape, np.float32)
        still[-1] = self.gripper
        self._step(still)

    def _step(self, action: np.ndarray) -> None:
        if not self.over:
            self.seen, _, terminated, truncated, info = self.env.step(action)
            self.success, self.over = info["success"], terminated or truncated


def main(run: Path, steps: int, log: Path) -> None:
    config = RuntimeConfig(hz=CONTROL_HZ, stitching=Stitching.SWITCH, replan_steps=2)
    with serving(run) as url, Recorder(log) as recorder:
        robot = TabletopRobot()
        done = Loop(Client(url), robot, robot.task, config, recorder).run(steps, should_stop=lambda: robot.over)

    print(f"{robot.task}: {'done' if robot.success else 'not done'}")
    print(f"{done.steps} steps, {done.held} held, {done.missed} missed, {done.replies} chunks")
    run_replay(ReplayConfig(log))


if __name__ == "__main__":
    given = sys.argv[1:]
    run = Path(given[0] if given else "runs/quick/run")
    main(run, int(given[1]) if len(given) > 1 else 50, Path("runs") / time.strftime("robot-%Y%m%d-%H%M%S"))
