"""From an observation to a chunk of actions: transforms, one backbone pass, Euler steps on the expert.

The noise of an observation depends on the policy's seed and on a seed of its own, on nothing else: neither on what was
asked before nor on what is beside it in the batch. So any chunk can be replayed from its seeds.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from insula.batch import LossName, Observation, Previous
from insula.data.observe import Observer, check_raw, stack_images, stack_previous
from insula.decode.flow import FLOW_STEPS, sample_actions
from insula.errors import InputError, NonFiniteError, did_you_mean
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.runs.assets import Assets
from insula.runs.loading import load_model
from insula.shapes import AnyArray, Array, Float, Shaped
from insula.tokens.dialects import Form
from insula.tokens.sequence import Tokenized

Seed = Sequence[int]
"""Integers that name one draw of noise. (1, 2), (1, 2, 0) and (12,) are different ones."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Rows that a policy acts on. `state` [B, S] is as observed, in the robot's units."""

    observation: Observation
    previous: Previous | None
    state: np.ndarray


def join(rows: Sequence[Inputs]) -> Inputs:
    """One batch of several. Rows without a previous chunk have nothing left of one where others do."""

    def together(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts)

    previous = None
    if given := [row.previous for row in rows if row.previous is not None]:
        nothing = jax.tree.map(np.zeros_like, given[0])
        previous = jax.tree.map(together, *(row.previous or nothing for row in rows))

    return Inputs(
        observation=jax.tree.map(together, *(row.observation for row in rows)),
        previous=previous,
        state=np.concatenate([row.state for row in rows]),
    )


class Policy:
    """A trained model that acts. Observations are {"images": {camera: uint8[h, w, 3]}, "state": [S], "task": str}, and
    where it was trained on subtasks "subtask": str, the step of the task that it is to do now.

    With a "previous", {"actions": [n, D], "delay": int}, the new chunk goes on from what is left of the last one
    (real-time chunking: `insula.decode.realtime` says how, `check_previous` what it holds).

    `robot` names which one it acts for, where it was trained on several. Raises InputError for a robot that is not
    known, or where there are several and none is named.
    """

    def __init__(
        self, params: Params, assets: Assets, seed: int = 0, steps: int = FLOW_STEPS, robot: str | None = None
    ):
        self.params = params
        self.assets = assets
        self.config = assets.config
        self.robot = assets.robot(robot)
        self.seed = seed
        in_prompt = self.config.state_input == "prompt"
        self.observer = Observer(self.robot, assets.tokenizer, self.config.state_dim, in_prompt)

        self._calls = 0

        # Steps and dimensions that this robot lacks: trained only as noise that shrinks, so they must shrink here, too.
        real = np.zeros((self.config.horizon, self.config.action_dim), bool)
        real[: self.robot.horizon, : self.robot.action_dim] = True
        mask = None if real.all() else real

        # Parameters come in as an argument: closed over, they would be constants of every compiled program.
        def chunk(
            params: Params, observation: Observation, keys: Shaped[Array, "B 2"], previous: Previous | None
        ) -> Array:
            noise = draw_noise(keys, self.config)
            return sample_actions(params, self.config, observation, noise, steps, mask, previous)

        self._chunk = jax.jit(chunk)

    @classmethod
    def load(cls, run: str | Path, step: int | None = None, seed: int = 0, robot: str | None = None) -> "Policy":
        """See `load_model`."""
        return cls(*load_model(run, step), seed, robot=robot)

    def act(self, observation: dict[str, Any], seed: Seed | None = None) -> Float[np.ndarray, "H D"]:
        """The next actions in the robot's units, one for each step of its horizon. `seed` and errors as in
        `act_batch`."""
        return self.act_batch([observation], None if seed is None else [seed])[0]

    def act_batch(
        self, observations: list[dict[str, Any]], seeds: Sequence[Seed] | None = None
    ) -> Float[np.ndarray, "B H D"]:
        """A chunk for each observation, in the robot's units. Each batch size compiles once, and once more where any
        of its observations has a "previous".

        `seeds` [B]: integers that noise is drawn by, together with the policy's seed; such as (scene, step). Without
        them it is (number of this call, row), so that no two draws are the same.

        Raises InputError naming what is wrong in an observation, NonFiniteError for an action that is NaN or infinite.
        """
        self._calls += 1
        if seeds is None:
            seeds = [(self._calls, row) for row in range(len(observations))]
        if len(seeds) != len(observations):
            raise InputError(f"act_batch: got {len(seeds)} seeds for {len(observations)} observations")

        actions = self.sample(self.read(observations), seeds)
        if not np.isfinite(actions).all():
            raise NonFiniteError("the policy produced NaN or infinite actions; do not execute them, check the weights")

        return actions

    def read(self, observations: list[dict[str, Any]]) -> Inputs:
        """What the model is given for these observations. Raises InputError naming what is wrong in one."""
        shape = (self.config.horizon, self.config.action_dim)
        observation = self.observe(observations)
        previous = stack_previous(observations, self.robot, shape, self.config.objective.rtc_max_delay)

        # The raw state too, since relative actions are added to it where the robot has them.
        return Inputs(observation, previous, np.stack([o["state"] for o in observations]))

    def sample(self, inputs: Inputs, seeds: Sequence[Seed]) -> Float[np.ndarray, "B H D"]:
        """A chunk for each row of `inputs`, in the robot's units, not yet looked at: it may be NaN. Raises InputError
        where the expert has learned nothing."""
        self.require(LossName.FLOW, "act in mode tokens")
        keys = np.stack([noise_key(self.seed, *seed) for seed in seeds])
        chunk = np.asarray(self._chunk(self.params, inputs.observation, keys, inputs.previous))

        chunk = chunk[:, : self.robot.horizon, : self.robot.action_dim]
        return self.robot.unnormalize_actions(chunk, inputs.state)

    def observe(self, observations: list[dict[str, Any]]) -> Observation:
        """Check, normalize and tokenize: exactly the prefix of training, with the "subtask" of those that bring one.
        Raises InputError naming what is wrong."""
        for observation in observations:
            self._refuse_untrained(Form.ACTIONS if "subtask" in observation else Form.FLAT)
        return self._show(observations, lambda o, s: self.observer.tokenize(o["task"], s, None, o.get("subtask")))

    def wonder(self, observations: list[dict[str, Any]]) -> Observation:
        """As `observe`, with prompts that ask for the subtask."""
        self._refuse_untrained(Form.SUBTASK)
        return self._show(observations, lambda o, s: self.observer.think(o["task"], s))

    def require(self, loss: LossName, remedy: str) -> None:
        """Raises InputError where this robot's samples never taught a loss: what it teaches is still as it began."""
        if self.robot.losses is not None and loss not in self.robot.losses:
            raise InputError(f"this policy was trained without the loss {loss!s}; {remedy}")

    def _refuse_untrained(self, form: Form) -> None:
        """Raises InputError where this robot had no samples of a form: the model would act all the same, on a prompt
        that it has never seen."""
        trained = self.robot.forms
        if trained is None or form in trained:
            return

        remedy = {
            Form.FLAT: "give a subtask, or act in mode subtask, which says it",
            Form.ACTIONS: "leave the subtask out, or train on them (docs/data.md, subtasks)",
            Form.SUBTASK: "act in another mode, or train on subtasks (docs/data.md, subtasks)",
        }[form]
        raise InputError(f"this policy was trained on {', '.join(trained)}, and this needs {form}; {remedy}")

    def _show(
        self, observations: list[dict[str, Any]], write: Callable[[dict[str, Any], np.ndarray], Tokenized]
    ) -> Observation:
        for observation in observations:
            check_raw(observation, self.robot)

        # Normalized before it is written: the prompt holds the state in bins of [−1, 1].
        state = self.observer.normalize_state(np.stack([o["state"] for o in observations]))
        rows = [write(o, s) for o, s in zip(observations, state, strict=True)]
        return self.show(stack_images(observations, self.robot.cameras), state, rows)

    def show(
        self, images: Mapping[str, np.ndarray], state: Float[np.ndarray, "B S"], prompts: Sequence[Tokenized]
    ) -> Observation:
        """Pictures of some cameras [B, h, w, 3], a normalized state and prompts, as the model reads them: the other
        cameras are masked. Raises InputError for a camera that the model does not have."""
        for camera in images:
            if camera not in self.config.cameras:
                known = ", ".join(self.config.cameras)
                hint = did_you_mean(camera, self.config.cameras)
                raise InputError(f"no camera {camera!r} in this model{hint}; known: {known}")

        square = (self.config.vision.image_size,) * 2
        sizes = {c: images[c].shape[1:3] if c in images else square for c in self.config.cameras}
        width = self.config.max_prompt_len  # no suffix: its columns are left out
        tokens = np.stack([row.tokens[:width] for row in prompts])
        token_mask = np.stack([row.token_mask[:width] for row in prompts])
        return self.observer.observe(images, sizes, state, tokens, token_mask)


def noise_key(*seed: int) -> np.ndarray:
    """The data uint32 [2] of a random key, different for different tuples of integers, the same on every machine."""
    # On the host: folding in one integer after another would be a small program on the device for each row.
    text = ",".join(str(int(number)) for number in seed)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), "<u4").astype(np.uint32)


def draw_noise(keys: Shaped[AnyArray, "B 2"], config: ModelConfig) -> Float[Array, "B H D"]:
    """The noise that chunks start from, of the keys that `noise_key` made."""
    shape = (config.horizon, config.action_dim)
    draw = jax.vmap(lambda key: jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), shape))
    return draw(keys)
