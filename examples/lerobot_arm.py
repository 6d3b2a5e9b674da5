"""A LeRobot arm driven by a policy server, through the interface of `lerobot.robots.Robot`.

python examples/lerobot_arm.py [RUN]        a made-up arm of that interface
python examples/lerobot_arm.py ADDRESS so101_follower /dev/ttyACM0 "put the cup away"
                                            a real one, with LeRobot installed, and `insula serve` at ADDRESS

LeRobot's robots report {"shoulder.pos": float, …, camera: uint8 [h, w, 3]} and are told {"shoulder.pos": float, …}.
"""

import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from policy_server import serving

from insula.client import Client, Loop, RuntimeConfig, Stitching, Summary
from insula.errors import InputError


class LeRobotRobot(Protocol):
    """Of `lerobot.robots.Robot` (0.6.1) what is used here."""

    observation_features: dict[str, Any]
    action_features: dict[str, Any]

    def connect(self, calibrate: bool = True) -> None: ...

    def get_observation(self) -> dict[str, Any]: ...

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]: ...

    def disconnect(self) -> None: ...


class LeRobotArm:
    """Such a robot for insula's loop. Joints and actions are in the robot's own order, which is the order that
    `lerobot-record` writes. Raises InputError where they are not as many as the policy's."""

    def __init__(self, robot: LeRobotRobot, told: dict[str, Any]) -> None:
        self.robot = robot
        self.cameras = told["cameras"]
        self.joints = [name for name, kind in robot.observation_features.items() if kind is float]
        self.actions = list(robot.action_features)

        missing = [camera for camera in self.cameras if camera not in robot.observation_features]
        if missing:
            raise InputError(f"the robot has no camera {missing[0]!r}; name its cameras as the policy's {self.cameras}")
        for what, names, count in (("joints", self.joints, "state_dim"), ("actions", self.actions, "action_dim")):
            if len(names) != told[count]:
                raise InputError(f"the robot has {len(names)} {what} ({', '.join(names)}), the policy {told[count]}")

    def observe(self) -> dict[str, Any]:
        """Pictures and joints of this moment."""
        seen = self.robot.get_observation()
        state = np.array([seen[name] for name in self.joints], np.float32)
        return {"images": {camera: seen[camera] for camera in self.cameras}, "state": state}

    def act(self, action: np.ndarray) -> None:
        """New targets for its motors."""
        self.robot.send_action(dict(zip(self.actions, map(float, action), strict=True)))

    def hold(self) -> None:
        """Its motors stay at their last targets by themselves."""


class MadeUpArm:
    """Has the interface and no motors: its joints are where they were last told to be."""

    def __init__(self, joints: int, actions: int, cameras: list[str]) -> None:
        self.observation_features = {f"joint_{i}.pos": float for i in range(joints)}
        self.observation_features |= {camera: (48, 64, 3) for camera in cameras}
        self.action_features = {f"joint_{i}.pos": float for i in range(actions)}
        self.targets = dict.fromkeys(self.action_features, 0.0)
        self.is_connected = False

    def connect(self, calibrate: bool = True) -> None:
        """Now it may be asked."""
        self.is_connected = True

    def get_observation(self) -> dict[str, Any]:
        """Joints and gray pictures."""
        assert self.is_connected
        gray = np.full((48, 64, 3), 128, np.uint8)
        return {
            name: self.targets.get(name, 0.0) if kind is float else gray
            for name, kind in self.observation_features.items()
        }

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """What it will really do, as LeRobot's robots answer."""
        assert self.is_connected and action.keys() == self.targets.keys()
        self.targets = dict(action)
        return action

    def disconnect(self) -> None:
        """The end."""
        self.is_connected = False


def drive(client: Client, robot: LeRobotRobot, task: str, hz: float, steps: int) -> Summary:
    """Connect, drive for so many control steps, disconnect whatever happens."""
    robot.connect()
    try:
        config = RuntimeConfig(hz=hz, stitching=Stitching.RTC)
        return Loop(client, LeRobotArm(robot, client.metadata), task, config).run(steps)
    finally:
        robot.disconnect()


def real_arm(kind: str, port: str) -> LeRobotRobot:
    """LeRobot's own, by its name. Add its cameras to the configuration here, named as the policy's."""
    from lerobot.robots import RobotConfig, make_robot_from_config

    return make_robot_from_config(RobotConfig.get_choice_class(kind)(port=port, cameras={}))


def main(given: list[str]) -> None:
    if len(given) == 4:
        address, kind, port, task = given
        print(drive(Client(address), real_arm(kind, port), task, hz=30.0, steps=1800))
        return

    with serving(Path(given[0] if given else "runs/quick/run")) as url, Client(url) as client:
        told = client.metadata
        arm = MadeUpArm(told["state_dim"], told["action_dim"], told["cameras"])
        done = drive(client, arm, "put the red block in the blue bowl", hz=20.0, steps=60)
        print(f"{done.steps} steps, {done.held} held, {done.replies} chunks; joints at {list(arm.targets.values())}")


if __name__ == "__main__":
    main(sys.argv[1:])
