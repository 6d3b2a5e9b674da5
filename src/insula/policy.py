"""From an observation to a chunk of actions: transforms, one backbone pass, Euler steps on the expert."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from insula.batch import Observation
from insula.data.observe import Observer, check_raw, stack_images
from insula.decode.flow import FLOW_STEPS, sample_actions
from insula.errors import NonFiniteError
from insula.model.params import Params
from insula.runs.assets import Assets
from insula.runs.loading import load_model
from insula.shapes import Array, Float, PRNGKeyArray


class Policy:
    """A trained model that acts. Observations are {"images": {camera: uint8[h, w, 3]}, "state": [S], "task": str}.

    `robot` names which one it acts for, where it was trained on several.
    """

    def __init__(
        self, params: Params, assets: Assets, seed: int = 0, steps: int = FLOW_STEPS, robot: str | None = None
    ):
        self.params = params
        self.assets = assets
        self.config = assets.config
        self.robot = assets.robot(robot)
        in_prompt = self.config.state_input == "prompt"
        self.observer = Observer(self.robot, assets.tokenizer, self.config.state_dim, in_prompt)

        self._rng = jax.random.key(seed)
        self._calls = 0
        real = np.zeros((self.config.horizon, self.config.action_dim), bool)
        real[: self.robot.horizon, : self.robot.action_dim] = True
        mask = None if real.all() else real

        def chunk(params: Params, observation: Observation, rng: PRNGKeyArray) -> Array:
            shape = (observation.state.shape[0], self.config.horizon, self.config.action_dim)
            return sample_actions(params, self.config, observation, jax.random.normal(rng, shape), steps, mask)

        self._chunk = jax.jit(chunk)

    @classmethod
    def load(cls, run: str | Path, step: int | None = None, seed: int = 0, robot: str | None = None) -> "Policy":
        """See `load_model`."""
        return cls(*load_model(run, step), seed, robot=robot)

    def act(self, observation: dict[str, Any]) -> Float[np.ndarray, "H D"]:
        """The next actions, as many as the robot's horizon, in its units. Raises ValueError naming what is wrong in the
        observation."""
        return self.act_batch([observation])[0]

    def act_batch(self, observations: list[dict[str, Any]]) -> Float[np.ndarray, "B H D"]:
        """A chunk for each observation. Each batch size compiles once. Raises FloatingPointError for a NaN action."""
        inputs = self.observe(observations)
        self._calls += 1
        chunk = np.asarray(self._chunk(self.params, inputs, jax.random.fold_in(self._rng, self._calls)))
        if not np.isfinite(chunk).all():
            raise NonFiniteError("the policy produced NaN or infinite actions; do not execute them, check the weights")
        chunk = chunk[:, : self.robot.horizon, : self.robot.action_dim]
        return self.robot.unnormalize_actions(chunk, np.stack([o["state"] for o in observations]))

    def observe(self, observations: list[dict[str, Any]]) -> Observation:
        """Check, normalize and tokenize: exactly the prefix of training. Raises InputError naming what is wrong."""
        for observation in observations:
            check_raw(observation, self.robot)

        images = stack_images(observations, self.robot.cameras)
        square = (self.config.vision.image_size,) * 2
        sizes = {c: images[c].shape[1:3] if c in images else square for c in self.config.cameras}

        state = self.observer.normalize_state(np.stack([o["state"] for o in observations]))
        rows = [self.observer.tokenize(o["task"], s) for o, s in zip(observations, state, strict=True)]
        width = self.config.max_prompt_len  # no FAST suffix: its columns are left out
        tokens = np.stack([row.tokens[:width] for row in rows])
        token_mask = np.stack([row.token_mask[:width] for row in rows])

        return self.observer.observe(images, sizes, state, tokens, token_mask)
