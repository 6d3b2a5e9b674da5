"""Our model against code we did not write: `transformers`, random tiny models of the real architectures, float32.

The weights travel through the checkpoints that `save_pretrained` wrote. Relative means the largest difference over the
largest value. Each comparison has a control that fails: another weight, or another mask.
"""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SMALL, jit

from insula import flow
from insula.batch import Observation
from insula.checkpoints.loading import load_params
from insula.decode.flow import read_prefix, sample_actions
from insula.losses import flow_matching_loss, masked_mean
from insula.model.backbone import embed, run_layers
from insula.model.config import ModelConfig, TransformerConfig, VisionConfig
from insula.model.expert import run_expert
from insula.model.params import Params
from insula.model.vision import encode_images

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", "5.4")  # before, embeddings were scaled elsewhere
torch.set_num_threads(1)

RELATIVE = 1e-5
VOCABULARY, BATCH = 61, 3
PROMPTS, SUFFIXES = (2, 5, 4), (4, 3, 6)  # tokens of each sample; the rest is padding, on the right

MQA, GQA, MHA = (dict(num_heads=4, num_kv_heads=n, head_dim=8) for n in (1, 2, 4))
CASES = {
    "one image, one key head": (1, MQA, 14, 3, (24, 3)),
    "two images, two key heads": (2, GQA, 7, 2, (20, 2)),
    "two images, all key heads": (2, MHA, 5, 3, (15, 5)),
}


def config_of(cameras: int, heads: dict[str, int], patch: int, grid: int, vision: tuple[int, int]) -> ModelConfig:
    width, vision_heads = vision
    return dataclasses.replace(
        SMALL,
        name="parity",
        vision=VisionConfig(patch * grid, (patch,), (), width=width, depth=2, mlp_dim=37, num_heads=vision_heads),
        backbone=TransformerConfig(width=22, depth=2, mlp_dim=35, **heads),
        expert=TransformerConfig(width=18, depth=2, mlp_dim=29, **heads),
        vocab_size=VOCABULARY,
        cameras=("left", "right")[:cameras],
        max_prompt_len=max(PROMPTS),
        max_fast_len=max(SUFFIXES),
        horizon=5,
        action_dim=4,
        state_dim=3,
    )


def theirs_of(config: ModelConfig) -> dict[str, Any]:
    """The same sizes as PaliGemma's config wants them."""
    v, t = config.vision, config.backbone
    return {
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": v.width,
            "intermediate_size": v.mlp_dim,
            "num_hidden_layers": v.depth,
            "num_attention_heads": v.num_heads,
            "image_size": v.image_size,
            "patch_size": v.patch_sizes[0],
            "projection_dim": t.width,
            "vision_use_head": False,
        },
        "text_config": gemma(t) | {"vocab_size": VOCABULARY},
        "projection_dim": t.width,
        "image_token_id": VOCABULARY,
    }


def gemma(c: TransformerConfig) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "hidden_size": c.width,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
    }


def randomized(model: Any) -> Any:
    """Every parameter drawn again, norms and offsets too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.lru_cache
def paligemma(case: str) -> tuple[Any, ModelConfig]:
    config = config_of(*CASES[case])
    theirs = transformers.PaliGemmaConfig(**theirs_of(config), attn_implementation="eager")
    return randomized(transformers.PaliGemmaForConditionalGeneration(theirs)), config


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Params, ModelConfig]:
    """Their model, ours from the file they wrote, and the config."""
    theirs, config = paligemma(request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, load_params(tmp_path, config, jax.random.key(0), ["expert.*"])[0], config


def close(ours: Any, theirs: Any) -> float:
    """Relative difference."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def observation(config: ModelConfig, suffix: bool) -> tuple[Observation, jax.Array]:
    """Images, and each sample's prompt (then its suffix), padded on the right; and ar_mask [B, L]."""
    rng = np.random.default_rng(1)
    size, length = config.vision.image_size, config.max_token_len if suffix else config.max_prompt_len
    column = np.arange(length)[None]
    prompt, end = np.array(PROMPTS)[:, None], np.array(PROMPTS)[:, None] + suffix * np.array(SUFFIXES)[:, None]
    seen = Observation(
        images={name: rng.integers(0, 256, (BATCH, size, size, 3), np.uint8) for name in config.cameras},
        image_mask={name: np.ones(BATCH, bool) for name in config.cameras},
        state=rng.uniform(-1, 1, (BATCH, config.state_dim)).astype(np.float32),
        tokens=np.where(column < end, rng.integers(1, VOCABULARY, (BATCH, length)), 0).astype(np.int32),
        token_mask=column < end,
    )
    return jax.tree.map(jnp.asarray, (seen, (column >= prompt) & (column < end)))


def pixels(seen: Observation, config: ModelConfig) -> Any:
    """[B, cameras, 3, h, w] in [−1, 1]."""
    stacked = np.stack([np.asarray(seen.images[name]) for name in config.cameras], axis=1)
    return torch.from_numpy(stacked.astype(np.float32) / 127.5 - 1).permute(0, 1, 4, 2, 3)


def ids(seen: Observation, config: ModelConfig) -> tuple[Any, Any]:
    """input_ids and attention_mask [B, T], image tokens first."""
    images = np.full((BATCH, config.num_image_tokens), VOCABULARY)
    tokens = np.concatenate([images, np.asarray(seen.tokens)], axis=1)
    real = np.concatenate([np.ones(images.shape, bool), seen.token_mask], axis=1)
    return torch.from_numpy(tokens).long(), torch.from_numpy(real).long()


def test_siglip_and_projector(pair: tuple[Any, Params, ModelConfig]) -> None:
    theirs, params, config = pair
    seen, _ = observation(config, suffix=False)
    run = jit(lambda vision: encode_images(vision, config, seen.images))
    with torch.no_grad():
        expected = theirs.model.get_image_features(pixels(seen, config).flatten(0, 1)).pooler_output
    expected = expected.reshape(BATCH, config.num_image_tokens, -1)
    assert close(run(params.vision), expected) <= RELATIVE
    blind = dataclasses.replace(params.vision, position=params.vision.position[::-1])
    assert close(run(blind), expected) > 1e-2


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_gemma(pair: tuple[Any, Params, ModelConfig], bidirectional: bool) -> None:
    theirs, params, config = pair
    rng = np.random.default_rng(2)
    x = rng.normal(size=(BATCH, 9, config.backbone.width)).astype(np.float32)
    real = np.arange(9)[None] < np.array([[9], [6], [1]])
    kind = {"token_type_ids": torch.zeros(BATCH, 9).long()} if bidirectional else {}
    with torch.no_grad():
        expected = theirs.model(inputs_embeds=torch.from_numpy(x), attention_mask=torch.from_numpy(real).long(), **kind)
    run = jit(lambda backbone, ar: run_layers(backbone, config, jnp.asarray(x), jnp.asarray(real), ar).hidden)
    causal = jnp.full((BATCH, 9), not bidirectional)
    assert close(run(params.backbone, causal)[real], expected.last_hidden_state[real]) <= RELATIVE
    assert close(run(params.backbone, ~causal)[real], expected.last_hidden_state[real]) > 1e-2


def test_paligemma_logits_and_gradients(pair: tuple[Any, Params, ModelConfig]) -> None:
    """Prefix bidirectional, suffix causal, padding; and the gradient of the suffix's cross-entropy with respect to the
    embeddings of images and tokens."""
    theirs, params, config = pair
    seen, ar = observation(config, suffix=True)
    tokens, attention = ids(seen, config)
    suffix = torch.cat([torch.zeros(BATCH, config.num_image_tokens), torch.from_numpy(np.array(ar))], dim=1).long()
    kind = {"attention_mask": attention, "token_type_ids": torch.where(attention == 1, suffix, 1)}
    with torch.no_grad():
        whole = theirs(input_ids=tokens, pixel_values=pixels(seen, config).flatten(0, 1), **kind).logits
        features = theirs.model.get_image_features(pixels(seen, config).flatten(0, 1)).pooler_output
        words = theirs.get_input_embeddings()(torch.from_numpy(np.array(seen.tokens)).long())
        both = torch.cat([features.reshape(BATCH, config.num_image_tokens, -1), words], dim=1)
    both.requires_grad_()
    logits = theirs(inputs_embeds=both, **kind).logits
    assert close(logits.detach(), whole) <= RELATIVE  # so theirs is one function of the embeddings
    labels = torch.where(suffix[:, 1:] == 1, tokens[:, 1:], -100)
    expected_loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    (expected_gradient,) = torch.autograd.grad(expected_loss, both)

    x, token_mask, block = jit(lambda p: embed(p.vision, p.backbone, config, seen, ar))(params)
    assert close(x[np.asarray(token_mask)], both[attention == 1]) <= RELATIVE
    right, scored = np.maximum(labels.numpy(), 0), labels.numpy() != -100

    def loss(x: jax.Array, backbone: Any) -> tuple[jax.Array, jax.Array]:
        out = run_layers(backbone, config, x, token_mask, block).hidden @ backbone.embedding.T
        own = jnp.take_along_axis(jax.nn.log_softmax(out[:, :-1]), right[..., None], axis=-1)[..., 0]
        return -jnp.sum(own * scored) / scored.sum(), out

    run = jit(jax.value_and_grad(loss, has_aux=True))
    (value, out), gradient = run(x, params.backbone)
    real = attention.numpy() == 1
    assert close(out[real], whole[attention == 1]) <= RELATIVE
    assert close(value, expected_loss) <= RELATIVE
    assert close(gradient[real], expected_gradient[attention == 1]) <= RELATIVE
    assert not np.any(np.asarray(gradient)[~real])
    swapped = dataclasses.replace(
        params.backbone.layers, gate=params.backbone.layers.up, up=params.backbone.layers.gate
    )
    (_, out), gradient = run(x, dataclasses.replace(params.backbone, layers=swapped))
    assert close(out[real], whole[attention == 1]) > 1e-2 < close(gradient[real], expected_gradient[attention == 1])


# π0


@pytest.fixture(params=["two images, two key heads", "one image, one key head"])
def pi0(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Params, ModelConfig]:
    config = dataclasses.replace(config_of(*CASES[request.param]), state_input="token", time_input="mlp")
    theirs = transformers.PI0Config(
        vlm_config=theirs_of(config) | {"model_type": "paligemma"},
        dit_config=gemma(config.expert),
        chunk_size=config.horizon,
        max_state_dim=config.state_dim,
        max_action_dim=config.action_dim,
        attn_implementation="eager",
    )
    model = randomized(transformers.PI0ForConditionalGeneration(theirs))
    model.save_pretrained(tmp_path)
    return model, load_params(tmp_path, config, jax.random.key(0))[0], config


def inputs(seen: Observation, config: ModelConfig) -> dict[str, Any]:
    tokens, attention = ids(seen, config)
    return {
        "state": torch.from_numpy(np.array(seen.state)),
        "input_ids": tokens,
        "attention_mask": attention,
        "pixel_values": pixels(seen, config),
        "pixel_attention_mask": torch.ones(BATCH, len(config.cameras)).bool(),
    }


def test_pi0_flow_loss(pi0: tuple[Any, Params, ModelConfig]) -> None:
    """For the same noise and a time of its own for each sample."""
    theirs, params, config = pi0
    seen, _ = observation(config, suffix=False)
    rng = np.random.default_rng(3)
    actions, noise = rng.normal(size=(2, BATCH, config.horizon, config.action_dim)).astype(np.float32)
    time = np.array([0.1, 0.6, 0.95], np.float32)

    def loss(params: Params, actions: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        memory = read_prefix(params, config, seen)
        noisy = flow.add_noise(actions, noise, time)
        velocity = run_expert(params.expert, config, memory, seen.state, noisy[:, None], time[:, None])
        mask = jnp.ones((BATCH, 1, config.horizon, config.action_dim), bool)
        return masked_mean(flow_matching_loss(velocity, flow.target_velocity(actions, noise)[:, None], mask), mask)

    with torch.no_grad():
        given = {"actions": torch.from_numpy(actions), "noise": torch.from_numpy(noise)}
        expected = theirs(**inputs(seen, config), **given, timestep=torch.from_numpy(time)).loss
    run = jit(loss)
    assert close(run(params, actions, noise, time), expected) <= RELATIVE
    stateless = dataclasses.replace(params.expert.state_in, kernel=0 * params.expert.state_in.kernel)
    changed = dataclasses.replace(params, expert=dataclasses.replace(params.expert, state_in=stateless))
    assert close(run(changed, actions, noise, time), expected) > 1e-3


def test_pi0_samples(pi0: tuple[Any, Params, ModelConfig]) -> None:
    """Ten Euler steps from the same noise."""
    theirs, params, config = pi0
    seen, _ = observation(config, suffix=False)
    noise = np.random.default_rng(4).normal(size=(BATCH, config.horizon, config.action_dim)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.sample_actions(**inputs(seen, config), noise=torch.from_numpy(noise), num_steps=10)
    run = jit(lambda params, steps: sample_actions(params, config, seen, jnp.asarray(noise), steps), static_argnums=1)
    assert close(run(params, 10), expected) <= RELATIVE
    assert close(run(params, 9), expected) > 1e-3
