"""The policy for inspect-robots, as that package runs it. Skipped where it is not installed."""
# ruff: noqa: E402 - the first import decides whether there are others

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

inspect_robots = pytest.importorskip("inspect_robots", exc_type=ImportError)

from inspect_robots.compat import check_compatibility
from inspect_robots.conformance import assert_embodiment_conformant
from inspect_robots.embodiment import RESETTABLE, SEEDABLE, EmbodimentInfo
from inspect_robots.policy import Policy as TheirPolicy
from inspect_robots.registry import resolve
from inspect_robots.scene import Scene
from inspect_robots.spaces import ActionSemantics, Box, CameraSpec, ObservationSpace, StateField, StateSpec
from inspect_robots.task import Task
from inspect_robots.types import Action, Observation, StepResult
from live_server import OBSERVATION, Scripted, serving, small_policy

from insula.errors import InputError, InsulaError, ServerError
from insula.policy import Policy
from insula.serve.observations import Request
from insula.serve.policy_backend import PolicyBackend

STEPS = 10


class Arm:
    """An embodiment that notes what it is told; `gripper` and `joint_pos` are its state, in this order."""

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []
        fields = (StateField("gripper", (1,)), StateField("joint_pos", (1,)))
        self.info = EmbodimentInfo(
            name="arm",
            action_space=Box(
                (3,), -9 * np.ones(3), 9 * np.ones(3), ActionSemantics("eef_delta_pos", dim_labels=("x", "y", "z"))
            ),
            observation_space=ObservationSpace(
                cameras=(CameraSpec("top", 48, 64), CameraSpec("wrist", 48, 64)), state=StateSpec(fields)
            ),
            control_hz=10.0,
            is_simulated=True,
            capabilities=frozenset({SEEDABLE, RESETTABLE}),
        )

    def reset(self, scene: Scene, *, seed: int | None = None) -> Observation:
        return self.observe(scene.instruction)

    def step(self, action: Action) -> StepResult:
        self.told.append(action.data)
        return StepResult(self.observe(None))

    def observe(self, instruction: str | None) -> Observation:
        images = {"top": OBSERVATION["images"]["front"], "wrist": OBSERVATION["images"]["wrist"]}
        first, second = OBSERVATION["state"]
        state = {"joint_pos": np.array([second]), "gripper": np.array([first])}
        return Observation(images, state, instruction)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return small_policy(tmp_path_factory.mktemp("inspect"))


@pytest.fixture(scope="module")
def url(policy: Policy) -> Iterator[str]:
    with serving(PolicyBackend(policy, "small", "none")) as url:
        yield url


def test_it_is_found_by_name_and_fits(url: str) -> None:
    arm = Arm()
    assert_embodiment_conformant(arm.info)
    adapter = resolve("policy", "insula", url=url, cameras="front=top")
    assert isinstance(adapter, TheirPolicy)

    report = check_compatibility(adapter, arm)
    assert report.ok, report.errors
    assert (adapter.info.action_space.shape, adapter.config.action_horizon) == ((3,), 4)

    # The control: without its name for the camera it does not fit, and their check says so.
    unnamed = resolve("policy", "insula", url=url)
    assert [issue.code for issue in check_compatibility(unnamed, arm).errors] == ["missing_camera"]
    for one in (adapter, unnamed):
        one.close()


def test_a_whole_evaluation(url: str, tmp_path: Path) -> None:
    arm = Arm()
    task = Task("nothing", [Scene(str(n), OBSERVATION["task"]) for n in range(2)], "success_at_end", max_steps=STEPS)
    adapter = resolve("policy", "insula", url=url, cameras="front=top", control_hz=10.0)
    (log,) = inspect_robots.eval(task, adapter, arm, log_dir=str(tmp_path))
    adapter.close()

    assert log.status == "success"
    assert len(arm.told) == 2 * STEPS
    assert all(action.shape == (3,) and np.isfinite(action).all() for action in arm.told)


def test_it_acts_as_the_policy_itself() -> None:
    """State in the embodiment's order, cameras by its names, the scene's instruction."""
    backend = Scripted(metadata=METADATA)
    arm = Arm()
    with serving(backend) as url:
        adapter = resolve("policy", "insula", url=url, cameras="front=top")
        adapter.bind(arm.info)
        adapter.reset(Scene("0", "put it away"))
        chunk = adapter.act(arm.observe(None))
        adapter.close()

    assert len(chunk) == 4 and chunk.inference_latency_s > 0
    seen = backend.asked[0].observation
    np.testing.assert_allclose(seen["state"], OBSERVATION["state"])
    assert seen["task"] == "put it away"
    for camera in ("front", "wrist"):
        np.testing.assert_array_equal(seen["images"][camera], OBSERVATION["images"][camera])


class Thinking(Scripted):
    """Its subtasks are numbered."""

    def think(self, requests: Sequence[Request], size: int) -> list[str | InsulaError]:
        self.said = getattr(self, "said", 0) + 1
        return [f"subtask {self.said}"] * len(requests)


def test_what_a_server_remembers_ends_with_a_scene() -> None:
    backend = Thinking(metadata=METADATA)
    with serving(backend, subtask_every=1e6) as url:
        adapter = resolve("policy", "insula", url=url, cameras="front=top", state="gripper,joint_pos")
        for number in range(2):
            adapter.reset(Scene(str(number), "put it away"))
            for _ in range(2):
                adapter.act(Arm().observe(None))
        adapter.close()

    said = [request.observation["subtask"] for request in backend.asked]
    assert said == ["subtask 1", "subtask 1", "subtask 2", "subtask 2"]


METADATA = {
    **{"server": "insula", "robot": "arm", "cameras": ["front", "wrist"], "image_size": 16},
    **{"state_dim": 2, "action_dim": 3, "horizon": 4},
}


def test_what_does_not_fit_is_said() -> None:
    arm = Arm()
    with serving(Scripted(metadata=METADATA)) as url:
        with pytest.raises(InputError, match="NAME of front, wrist"):
            resolve("policy", "insula", url=url, cameras="back=top")

        adapter = resolve("policy", "insula", url=url, cameras="front=top", state="gripper")
        with pytest.raises(InputError, match="gripper has 1 numbers, the policy takes 2"):
            adapter.act(arm.observe("go"))
        adapter.close()
    with pytest.raises(ServerError, match="cannot be reached"):
        resolve("policy", "insula", url=url)

    with serving(Scripted(metadata={})) as url, pytest.raises(ServerError, match="does not say what its policy takes"):
        resolve("policy", "insula", url=url)
