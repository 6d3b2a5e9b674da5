"""A policy with random weights, small enough to compile in a second: its robot is smaller than its model."""

import dataclasses
from typing import Any

import numpy as np
from small import SMALL, model

from insula.data.normalize import NormStats
from insula.data.robot import Robot
from insula.model.config import ModelConfig
from insula.policy import Policy
from insula.runs.assets import Assets
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer
from insula.tokens.text import embedded

SERVED = dataclasses.replace(SMALL, vocab_size=2800, max_prompt_len=32, max_fast_len=40)
STATS = {
    "state": NormStats(np.zeros(2), np.ones(2), np.array([-1.0, -1.0]), np.array([3.0, 1.0])),
    "actions": NormStats(np.zeros(2), np.ones(2), np.array([-1.0, -2]), np.array([1.0, 4])),
}
ROBOT = Robot(STATS, SERVED.cameras, horizon=3, delta=(0,))
"""One step and one dimension fewer than the model; its first action is relative to the state."""


def policy(rtc_max_delay: int = 0, config: ModelConfig = SERVED, robot: Robot = ROBOT) -> Policy:
    chunks = np.random.default_rng(0).uniform(-1, 1, (64, config.horizon, config.action_dim)).astype(np.float32)
    codec = FASTCodec.fit(chunks, 400, 5.0)
    limits = {"max_token_len": config.max_token_len, "max_prompt_len": config.max_prompt_len}
    tokenizer = FASTTokenizer(embedded(), codec, "pi05", **limits)
    assets = Assets(config.with_objective(rtc_max_delay=rtc_max_delay), tokenizer, {"arm": robot})
    return Policy(model(config)[0], assets)


def observation(left: object = None, delay: object = 0, **others: Any) -> dict[str, Any]:
    images = {name: np.full((16, 16, 3), 99, np.uint8) for name in SERVED.cameras}
    seen = {"images": images, "state": np.array([1.0, 0.5], np.float32), "task": "put it there"} | others
    return seen if left is None else seen | {"previous": {"actions": left, "delay": delay}}
