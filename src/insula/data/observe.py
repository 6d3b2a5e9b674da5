"""From what a robot sees to what the model reads: one path, for training and for serving.

images {camera: uint8 [h, w, 3]} ─► absent cameras black and masked, another size resized ─┐
state [S], the robot's units ─► normalized ─► padded ──────────────────────────────────────┼─► Observation
task, normalized state ─► tokens (`FASTTokenizer`; in training the FAST suffix with them) ─┘
what is left of the last chunk ─► relative to this state ─► normalized ─► clipped ─► padded ─► Previous
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.batch import Observation, Previous
from insula.checks import check_integer
from insula.data.images import resize_with_pad
from insula.data.robot import Robot
from insula.data.texts import is_blank
from insula.errors import InputError, ObservationError
from insula.shapes import Bool, Float, Int, UInt8
from insula.tokens.sequence import FASTTokenizer, Tokenized

CameraSizes = Mapping[str, tuple[int, int]]
"""(height, width) of every camera of the model, in its order."""


@dataclass(frozen=True)
class Sizes:
    """What every sample of a run is padded to."""

    horizon: int
    state_dim: int
    action_dim: int
    cameras: dict[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Observer:
    """How one robot's observations are read. `state_in_prompt`: the dialect writes the state as text; otherwise the
    model takes it as a projected token (π0)."""

    robot: Robot
    tokenizer: FASTTokenizer
    state_dim: int
    state_in_prompt: bool

    def normalize_state(self, state: Float[np.ndarray, "B S"]) -> Float[np.ndarray, "B S"]:
        """In the robot's units → to about [−1, 1]. Raises InputError on NaN or infinity."""
        return self.robot.stats["state"].normalize(state)

    def tokenize(
        self,
        task: str,
        state: Float[np.ndarray, "S"],
        chunk: np.ndarray | None = None,
        subtask: str | None = None,
    ) -> Tokenized:
        """The prompt, with the `subtask` where there is one, and behind it the normalized `chunk` [H, D] as FAST tokens
        where there is one to learn from.

        `state` is normalized. Raises TokenBudgetError and FASTRangeError as the tokenizer does.
        """
        return self.tokenizer.tokenize(task, self._written(state), chunk, subtask)

    def think(self, task: str, state: Float[np.ndarray, "S"], subtask: str | None = None) -> Tokenized:
        """The prompt that asks for a subtask, and behind it the `subtask` where there is one to learn. Else as
        `tokenize`."""
        return self.tokenizer.think(task, self._written(state), subtask)

    def _written(self, state: Float[np.ndarray, "S"]) -> Float[np.ndarray, "S"] | None:
        # A robot without a state gets the prompt without one, and not "State: ;" with nothing in it.
        return state if self.state_in_prompt and self.robot.state_dim > 0 else None

    def observe(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B _ _ 3"]],
        sizes: CameraSizes,
        state: Float[np.ndarray, "B S"],
        tokens: Int[np.ndarray, "B L"],
        token_mask: Bool[np.ndarray, "B L"],
    ) -> Observation:
        """`images` of the cameras this robot has; `state` normalized."""
        # Every camera of the model: what is absent is black, and masked, so that nothing attends to it.
        count = len(state)
        shown = {
            camera: resize_all(images[camera], size) if camera in images else np.zeros((count, *size, 3), np.uint8)
            for camera, size in sizes.items()
        }
        return Observation(
            images=shown,
            image_mask={camera: np.full(count, camera in images) for camera in sizes},
            state=pad(state, self.state_dim),
            tokens=tokens,
            token_mask=token_mask,
        )


def resize_all(images: UInt8[np.ndarray, "B _ _ 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "B _ _ 3"]:
    """Unchanged where they have that size already."""
    # The usual case in training: a camera of one size is resized on the device, for all samples at once.
    if images.shape[1:3] == size:
        return images

    return np.stack([resize_with_pad(image, size) for image in images])


def pad(values: Float[np.ndarray, "n _"], width: int) -> Float[np.ndarray, "n _"]:
    """Zeros behind, up to `width`."""
    # Behind, so that a dimension has one number whatever the model's width.
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def check_raw(observation: Mapping[str, Any], robot: Robot) -> None:
    """What a caller hands to a policy: {"images": {camera: uint8[h, w, 3]}, "state": [S], "task": str}.

    Raises ObservationError naming what is missing or wrong, what was got and what was expected.
    """
    for key in ("images", "state", "task"):
        if key not in observation:
            raise ObservationError(f"observation has {sorted(observation)}, expected also {key!r}", key)

    for name in robot.cameras:
        # Cameras the robot never had are left aside; one that it trained with must be there.
        if observation["images"].get(name) is None:
            there = sorted(observation["images"])
            raise ObservationError(f"observation has cameras {there}, expected also {name!r}", f"images.{name}")

        image = as_array(observation["images"][name], f"images.{name}")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            said = f"image {name!r} is {image.dtype}{list(image.shape)}, expected uint8[h, w, 3]"
            hint = "; move the colors last" if image.ndim == 3 and image.shape[0] == 3 else ""
            raise ObservationError(said + hint, f"images.{name}")
        if 0 in image.shape:
            raise ObservationError(
                f"image {name!r} is {image.dtype}{list(image.shape)}, it has no pixel", f"images.{name}"
            )

    # Before any batch or compiled function, whose errors would not name the state.
    state = as_array(observation["state"], "state")
    if state.dtype.kind not in "fiu" or state.shape != (robot.state_dim,):
        said = f"state is {state.dtype}{list(state.shape)}"
        raise ObservationError(f"{said}, expected {robot.state_dim} numbers, shape [{robot.state_dim}]", "state")

    if not np.isfinite(state).all():
        raise ObservationError(f"state[{int(np.argmin(np.isfinite(state)))}] is not finite: {state}", "state")

    # None would be read by the model as a word.
    for key in ("task", *(["subtask"] if "subtask" in observation else [])):
        if not isinstance(observation[key], str):
            raise ObservationError(f"{key} is {type(observation[key]).__name__}, expected a string", key)
    if is_blank(observation.get("subtask", "a")):
        raise ObservationError(f"subtask is {observation['subtask']!r}, which says nothing; leave it out", "subtask")


def as_array(value: Any, field: str) -> np.ndarray:
    """Raises ObservationError for lists of lists of several lengths, which no array can hold."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise ObservationError(f"{field} is no array, expected numbers in rows of one length", field) from None


def stack_images(
    observations: Sequence[Mapping[str, Any]], cameras: Sequence[str]
) -> dict[str, UInt8[np.ndarray, "B _ _ 3"]]:
    """Each camera's pictures of several observations. Raises InputError where they differ in size."""
    stacked = {}
    for camera in cameras:
        images = [np.asarray(observation["images"][camera]) for observation in observations]
        # `np.stack` would refuse them too, without saying which camera it was.
        if len(shapes := {image.shape for image in images}) > 1:
            raise InputError(f"images of camera {camera!r} have sizes {sorted(shapes)}; expected one size in a batch")

        stacked[camera] = np.stack(images)

    return stacked


def check_previous(previous: Any, robot: Robot, max_delay: int) -> None:
    """What an observation may hold for real-time chunking: {"actions": [n, D], "delay": int}. The actions are in the
    robot's units: what is left of the last chunk from this observation on, the first `delay` of which will have been
    executed when the new chunk arrives. `max_delay`: the model's `rtc_max_delay`, 0 where any delay will do.

    Raises ObservationError naming what is missing or wrong, what was got and what was expected.
    """
    if not isinstance(previous, Mapping) or not {"actions", "delay"} <= previous.keys():
        got = sorted(previous) if isinstance(previous, Mapping) else type(previous).__name__
        raise ObservationError(f"previous is {got}, expected a dict with 'actions' and 'delay'", "previous")

    expected = f"expected numbers of shape [n, {robot.action_dim}], n from 0 to {robot.horizon}"
    try:
        actions = np.asarray(previous["actions"])
    except ValueError:  # rows of several lengths are no array
        said = f"previous: actions are {previous['actions']!r:.80}, {expected}"
        raise ObservationError(said, "previous.actions") from None

    shape_fits = actions.ndim == 2 and actions.shape[1] == robot.action_dim and len(actions) <= robot.horizon
    if actions.dtype.kind not in "fiu" or not shape_fits:
        said = f"previous: actions are {actions.dtype}{list(actions.shape)}, {expected}"
        raise ObservationError(said, "previous.actions")

    finite = np.isfinite(actions)
    if not finite.all():
        step, dim = np.argwhere(~finite)[0].tolist()
        said = f"previous: actions[{step}, {dim}] is not finite: {actions[step, dim]}"
        raise ObservationError(said, "previous.actions")

    # numpy's integers count as such: a delay is often the difference of two of them.
    delay = previous["delay"]
    try:
        check_integer("previous: delay", int(delay) if isinstance(delay, np.integer) else delay, 0, len(actions))
    except InputError as error:
        raise ObservationError(str(error), "previous.delay") from None
    if max_delay and delay > max_delay:
        said = (
            f"previous: delay is {delay}, expected at most {max_delay}, the rtc_max_delay this model was trained with"
        )
        remedy = "execute fewer steps before the new chunk arrives, or train with a larger one"
        raise ObservationError(f"{said}; {remedy}", "previous.delay")


def stack_previous(
    observations: Sequence[Mapping[str, Any]], robot: Robot, shape: tuple[int, int], max_delay: int
) -> Previous | None:
    """What is left of the last chunks, as the model reads it: chunks of `shape` (H, D). None where no observation has a
    "previous"; one without it among others has nothing left. Raises InputError as `check_previous` does."""
    given = [observation.get("previous") for observation in observations]
    if all(previous is None for previous in given):
        return None

    actions = np.zeros((len(given), *shape), np.float32)
    delay, length = np.zeros((2, len(given)), np.int32)
    for row, previous in enumerate(given):
        if previous is None:
            continue

        check_previous(previous, robot, max_delay)

        # Against the state of now: a relative action of the last chunk was relative to the state before it.
        left = robot.normalize_actions(np.asarray(previous["actions"]), np.asarray(observations[row]["state"]))
        delay[row], length[row] = previous["delay"], len(left)
        actions[row, : len(left), : robot.action_dim] = np.clip(left, -robot.clip, robot.clip)  # as in training

    return Previous(actions, delay, length)
