"""From what a robot sees to what the model reads: one path, for training and for serving.

images {camera: uint8 [h, w, 3]} ─► absent cameras black and masked, another size resized ─┐
state [S], the robot's units ─► normalized ─► padded ──────────────────────────────────────┼─► Observation
task, normalized state ─► tokens (`FASTTokenizer`; in training the FAST suffix with them) ─┘
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from insula.batch import Observation
from insula.data.images import resize_with_pad
from insula.data.robot import Robot
from insula.errors import InputError
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

    def tokenize(self, task: str, state: Float[np.ndarray, "S"], chunk: np.ndarray | None = None) -> Tokenized:
        """The prompt, and behind it the normalized `chunk` [H, D] as FAST tokens where there is one to learn from.

        `state` is normalized. Raises TokenBudgetError and FASTRangeError as the tokenizer does.
        """
        # A robot without a state gets the prompt without one, and not "State: ;" with nothing in it.
        written = state if self.state_in_prompt and self.robot.state_dim > 0 else None
        return self.tokenizer.tokenize(task, written, chunk)

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

    Raises InputError naming what is missing or wrong, what was got and what was expected.
    """
    for key in ("images", "state", "task"):
        if key not in observation:
            raise InputError(f"observation has {sorted(observation)}, expected also {key!r}")

    for name in robot.cameras:
        # Cameras the robot never had are left aside; one that it trained with must be there.
        if observation["images"].get(name) is None:
            raise InputError(f"observation has cameras {sorted(observation['images'])}, expected also {name!r}")

        image = np.asarray(observation["images"][name])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise InputError(f"image {name!r} is {image.dtype}{list(image.shape)}, expected uint8[h, w, 3]")

    # Before any batch or compiled function, whose errors would not name the state.
    state = np.asarray(observation["state"])
    if state.dtype.kind not in "fiu" or state.shape != (robot.state_dim,):
        raise InputError(
            f"state is {state.dtype}{list(state.shape)}, expected {robot.state_dim} numbers, shape [{robot.state_dim}]"
        )

    if not np.isfinite(state).all():
        raise InputError(f"state[{int(np.argmin(np.isfinite(state)))}] is not finite: {state}")

    # None would be read by the model as a word.
    if not isinstance(observation["task"], str):
        raise InputError(f"task is {type(observation['task']).__name__}, expected a string")


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
