"""LeRobot's own PI05 reads an exported directory with the network off, and acts as the policy does here.

It needs Python 3.12 and LeRobot (`make lerobot PYTHON=PATH`); elsewhere it is skipped. Both are made small, and their
code is left as it is.
"""
# ruff: noqa: E402 - the first import decides whether there are others

import dataclasses
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

modeling = pytest.importorskip("lerobot.policies.pi05.modeling_pi05", exc_type=ImportError)

import torch
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file
from test_convert import OBSERVATION, POLICY, STATS, folder_of_run, small_is_pi05, wide_state

from insula.convert import convert_checkpoint
from insula.policy import Policy, noise_key

__all__ = ["small_is_pi05"]

pytestmark = pytest.mark.usefixtures("small_is_pi05", "small_lerobot")
SEED = (7, 0)
ROUNDING = 5e-5
"""Of actions of some units, float32 in two frameworks."""


@pytest.fixture
def small_lerobot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def size(variant: str) -> types.SimpleNamespace:
        ours = POLICY.backbone if variant == "gemma_2b" else POLICY.expert
        names = {"num_heads": "num_heads", "num_kv_heads": "num_kv_heads", "head_dim": "head_dim", "depth": "depth"}
        return types.SimpleNamespace(
            width=ours.width, mlp_dim=ours.mlp_dim, **{name: getattr(ours, name) for name in names}
        )

    def shrunk(model: Any) -> Any:
        def build(config: Any) -> Any:
            if hasattr(config, "vision_config"):
                vision, tower = config.vision_config, POLICY.vision
                vision.hidden_size, vision.intermediate_size = tower.width, tower.mlp_dim
                vision.num_hidden_layers, vision.num_attention_heads = tower.depth, tower.num_heads
                vision.patch_size, vision.projection_dim = tower.patch_sizes[0], POLICY.backbone.width
                config.projection_dim = POLICY.backbone.width
                config.text_config.vocab_size = POLICY.vocab_size
            else:
                config.vocab_size = POLICY.vocab_size
            return model(config=config)

        return build

    monkeypatch.setattr(modeling, "get_gemma_config", size)
    for name in ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM"):
        monkeypatch.setattr(modeling, name, shrunk(getattr(modeling, name)))
    yield


def answer_there(folder: Path, observation: dict[str, Any], noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and actions of LeRobot's own pipeline."""
    policy = modeling.PI05Policy.from_pretrained(folder)
    stored, loaded = load_file(folder / "model.safetensors"), policy.state_dict()
    assert stored.keys() == loaded.keys()  # LeRobot itself would only print what is missing
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)

    before, after = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    pictures = {
        f"observation.images.{name}": torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32) / 255)
        for name, picture in observation["images"].items()
    }
    state = {"observation.state": torch.from_numpy(observation["state"])}
    batch = before({**pictures, **state, "task": observation["task"]})
    chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(noise))
    return batch["observation.language.tokens"].numpy()[0], after(chunk).numpy()[0]


def noise_of(policy: Policy) -> np.ndarray:
    key = jax.random.wrap_key_data(noise_key(policy.seed, *SEED), impl="threefry2x32")
    return np.array(jax.random.normal(key, (1, policy.config.horizon, policy.config.action_dim)))


def pictures(height: int, width: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(0, 256, (height, width, 3), np.uint8) for name in POLICY.cameras}


@pytest.mark.parametrize("relative", [(), (0, 2)])
def test_it_reads_the_directory_and_acts_the_same(relative: tuple[int, ...], tmp_path: Path) -> None:
    stats = wide_state() if relative else STATS
    run = folder_of_run(tmp_path / "run", stats, relative)
    convert_checkpoint(run, tmp_path / "out", "lerobot")

    policy = Policy.load(run)
    state = stats["state"].mean + 0.3 * np.arange(stats["state"].dim)
    state[-1] = stats["state"].bounds()[0][-1]  # the dimension that never moves
    seen = OBSERVATION | {"state": state.astype(np.float32), "images": pictures(16, 16)}
    tokens, actions = answer_there(tmp_path / "out", seen, noise_of(policy))

    np.testing.assert_array_equal(tokens, policy.observe([seen]).tokens[0])
    ours = policy.act(seen, seed=SEED)
    np.testing.assert_allclose(actions, ours, rtol=ROUNDING, atol=ROUNDING)
    assert np.abs(ours - policy.act(seen, seed=(8, 0))).max() > 0.01  # the control: other noise, other actions


@pytest.mark.parametrize(("size", "agree"), [((16, 16), True), ((12, 16), True), ((30, 40), False)])
def test_only_pictures_that_shrink_are_seen_otherwise(size: tuple[int, int], agree: bool, tmp_path: Path) -> None:
    """LeRobot takes the nearest four pixels of a larger picture, openpi and this package average over all of them."""
    run = folder_of_run(tmp_path / "run", STATS)
    convert_checkpoint(run, tmp_path / "out", "lerobot")
    policy = Policy.load(run)
    seen = OBSERVATION | {"images": pictures(*size)}
    _, actions = answer_there(tmp_path / "out", seen, noise_of(policy))
    distance = np.abs(actions - policy.act(seen, seed=SEED)).max()
    assert (distance < 2 * ROUNDING) == agree, distance


def test_a_wrong_weight_would_be_seen(tmp_path: Path) -> None:
    """The control of all of the above."""
    run = folder_of_run(tmp_path / "run", STATS)
    convert_checkpoint(run, tmp_path / "out", "lerobot")
    policy = Policy.load(run)
    policy.params = dataclasses.replace(policy.params, expert=jax.tree.map(lambda x: x * 1.01, policy.params.expert))
    seen = OBSERVATION | {"images": pictures(16, 16)}
    _, actions = answer_there(tmp_path / "out", seen, noise_of(policy))
    assert np.abs(actions - policy.act(seen, seed=SEED)).max() > 1e-3
