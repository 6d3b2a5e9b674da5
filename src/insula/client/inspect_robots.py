"""A policy for inspect-robots (PyPI) that asks a policy server: `inspect-robots run --policy insula …` finds it.

Imported by that package alone, through this one's entry point "inspect_robots.policies".
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from inspect_robots.policy import PolicyBase, PolicyConfig, PolicyInfo
from inspect_robots.scene import Scene
from inspect_robots.spaces import Box, CameraSpec, ObservationSpace
from inspect_robots.types import Action, ActionChunk, Observation

from insula.client.connection import KEY_VARIABLE, Client
from insula.errors import InputError, ServerError


class InsulaPolicy(PolicyBase):
    """Connects when it is made, because its spaces are the server's to tell.

    `state`: the names of the embodiment's state whose numbers, one after another, are the policy's state, as
    "joint_pos,gripper"; unless given, all that the embodiment describes, in its order. `cameras`: the embodiment's name
    for each of the policy's cameras, as "front=top,wrist=hand"; the same names unless given. The API key is the
    environment's INSULA_API_KEY.

    Raises ServerError where no server answers, or one of others that does not describe its policy; InputError for
    cameras that are not the policy's, and for a state that
    is not as long as the policy's.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        state: str = "",
        cameras: str = "",
        control_hz: float | None = None,
        replan_interval: int | None = None,
        certificate: str | None = None,
    ) -> None:
        self.client = Client(url, os.environ.get(KEY_VARIABLE), certificate=certificate)
        told = self.client.metadata
        if told.get("server") != "insula":
            raise ServerError(f"{self.client.url}: does not say what its policy takes, as `insula serve` does")

        self._state_dim = int(told["state_dim"])
        self._state = tuple(name for name in state.split(",") if name)
        self._cameras = _renamed(cameras, told["cameras"])
        self._task = ""

        size = int(told["image_size"])
        self.config = PolicyConfig(action_horizon=int(told["horizon"]), replan_interval=replan_interval)
        self.info = PolicyInfo(
            name=f"insula {told['robot']}",
            action_space=Box(shape=(int(told["action_dim"]),)),
            observation_space=ObservationSpace(
                # Any size will do: the server fits pictures into the policy's own.
                cameras=tuple(CameraSpec(name, size, size) for name in self._cameras.values()),
                state_keys=frozenset(self._state),
            ),
            control_hz=control_hz,
        )

    def bind(self, embodiment_info: Any) -> None:
        """Take the state in the embodiment's own order, where none was given."""
        described = embodiment_info.observation_space.state
        if not self._state and described is not None:
            self._state = tuple(one.key for one in described.fields)

    def reset(self, scene: Scene) -> None:
        """Remember the instruction, and let the server forget: it may know a subtask for as long as a connection."""
        self._task = scene.instruction
        self.client.close()

    def act(self, observation: Observation) -> ActionChunk:
        """Ask the server. Raises as `Client.infer`."""
        reply = self.client.infer(
            {
                "images": {name: observation.images[theirs] for name, theirs in self._cameras.items()},
                "state": self._read_state(observation.state),
                "task": observation.instruction or self._task,
            }
        )
        actions = [Action(row) for row in reply.actions]
        return ActionChunk(actions, self.info.control_hz, inference_latency_s=reply.round_trip_ms / 1000)

    def close(self) -> None:
        """Hang up."""
        self.client.close()

    def _read_state(self, state: Mapping[str, Any]) -> np.ndarray:
        missing = [name for name in self._state if name not in state]
        if missing:
            raise InputError(f"state: no {missing[0]!r}; the embodiment has {', '.join(state)}")

        parts = [np.ravel(state[name]) for name in self._state]
        joined = np.concatenate(parts) if parts else np.zeros(0)
        if len(joined) != self._state_dim:
            raise InputError(
                f"state: {', '.join(self._state) or 'nothing'} has {len(joined)} numbers, the policy takes "
                f"{self._state_dim}; say which with state=NAME,NAME of {', '.join(state)}"
            )
        return joined


def _renamed(text: str, cameras: list[str]) -> dict[str, str]:
    """The embodiment's camera for each of the policy's."""
    renamed = {name: name for name in cameras}
    for pair in filter(None, text.split(",")):
        name, equals, theirs = pair.partition("=")
        if not equals or not theirs or name not in renamed:
            raise InputError(f"cameras: {pair!r}, expected NAME=THEIRS with a NAME of {', '.join(cameras)}")
        renamed[name] = theirs

    return renamed
