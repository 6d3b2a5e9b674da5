"""A model small enough to compile in a second, in every shape that could matter, and ways to look at its gradients."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insula.batch import Batch
from insula.losses import compute_loss
from insula.model.backbone import BackboneOutput, run_backbone
from insula.model.config import TINY, ComputeConfig, ModelConfig, TransformerConfig, VisionConfig
from insula.model.expert import run_expert
from insula.model.insulation import Memory, insulate
from insula.model.objective import ObjectiveConfig
from insula.model.params import Params, abstract_params
from insula.testing import fake_batch, randomize


def transformer(width: int, kv_heads: int) -> TransformerConfig:
    return TransformerConfig(width=width, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=kv_heads, head_dim=8)


SMALL = (
    dataclasses.replace(
        TINY,
        name="small",
        vision=VisionConfig(
            image_size=16, patch_sizes=(8,), stem_widths=(), width=16, depth=1, mlp_dim=16, num_heads=2
        ),
        backbone=transformer(16, 2),
        expert=transformer(12, 2),
        vocab_size=48,
        max_prompt_len=5,
        max_fast_len=6,
        horizon=4,
        action_dim=3,
        state_dim=2,
    )
    .with_objective(flow_samples=1)
    .with_compute(dtype="float32")
)
"""Grouped queries, 8 image tokens and up to 5 + 6 text tokens, chunks of 4 steps."""

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head, scan": {
        "backbone": transformer(16, 1),
        "expert": transformer(12, 1),
        "compute": ComputeConfig(scan_layers=True),
    },
    "all key heads, state token, time as in π0, 3 flow samples, bfloat16": {
        "backbone": transformer(16, 4),
        "expert": transformer(12, 4),
        "state_input": "token",
        "time_input": "mlp",
        "objective": ObjectiveConfig(flow_samples=3),
        "compute": ComputeConfig(dtype="bfloat16", vocab_chunk=16),
    },
}


def mostly_slow(cases: Iterable[str], *usual: str) -> list[Any]:
    """Cases for `parametrize`, of which `make test` runs the usual ones alone: each compiles programs of its own."""
    return [case if case in usual else pytest.param(case, marks=pytest.mark.slow) for case in cases]


# Programs that run once are compiled in an eighth of the time, rather than well.
HASTE = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit: Callable = partial(jax.jit, compiler_options=HASTE)


@functools.lru_cache
def model(config: ModelConfig = SMALL, batch_size: int = 2, seed: int = 0) -> tuple[Params, Batch]:
    """Parameters without a comfortable zero, and a batch."""
    key = jax.random.key(seed)
    make = jit(lambda k: fake_batch(config, batch_size, k))
    return jit(lambda k: randomize(abstract_params(config), k))(key), make(jax.random.fold_in(key, 1))


@functools.lru_cache
def _loss(config: ModelConfig) -> Callable:
    return jit(lambda params, batch: compute_loss(params, config, batch, jax.random.key(7)))


def loss(params: Params, config: ModelConfig, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    return _loss(config)(params, batch)


@functools.lru_cache
def _gradients(config: ModelConfig) -> Callable:
    @jit
    def run(params: Params, batch: Batch) -> dict[str, Params]:
        def losses(params: Params) -> dict[str, jax.Array]:
            total, metrics = compute_loss(params, config, batch, jax.random.key(7))
            return {"total": total} | metrics

        values, pull = jax.vjp(losses, params)
        names = ("total", "flow", "fast")
        seeds = {name: jnp.array([float(name == wanted) for wanted in names]) for name in values}
        (stacked,) = jax.vmap(pull)(seeds)  # one backward program for all
        return {name: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i, name in enumerate(names)}

    return run


def gradients(params: Params, config: ModelConfig, batch: Batch, afresh: bool = False) -> dict[str, Params]:
    """The gradients of "total", "flow" and "fast". `afresh` where the package was changed under our feet."""
    return (_gradients.__wrapped__ if afresh else _gradients)(config)(params, batch)


def largest(tree: Any) -> float:
    """The largest magnitude in a tree. Fails where anything is not finite."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    return max((float(np.abs(leaf).max()) for leaf in leaves), default=0.0)


def by_leaf(tree: Any) -> dict[str, np.ndarray]:
    """Leaves by their path, such as "backbone.layers.query"."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in paths}


CLOSE, FAR = 1e-3, 1e-2
"""Of outputs about 1: between two programs for the same numbers (the fastest of the time embedding's waves turns
1,500 radians, so its float32 phase is good to 1e-4), and between different numbers."""


def difference(a: Any, b: Any) -> float:
    """The largest difference between two trees: 0.0 only where they are the same numbers."""
    return largest(jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), a, b))


@functools.lru_cache
def _prefix(config: ModelConfig) -> Callable:
    return jit(lambda p, b: run_backbone(p.vision, p.backbone, config, b.observation, b.ar_mask))


def prefix(params: Params, config: ModelConfig, batch: Batch) -> BackboneOutput:
    """One backbone pass over all of the sequence."""
    return _prefix(config)(params, batch)


def draws(config: ModelConfig, batch: Batch, samples: int = 1, seed: int = 3) -> tuple[jax.Array, jax.Array]:
    """Noisy chunks [B, K, H, D] and a time of its own for each, [B, K]."""
    noise, time = jax.random.split(jax.random.key(seed))
    shape = (batch.actions.shape[0], samples)
    return jax.random.normal(noise, (*shape, config.horizon, config.action_dim)), jax.random.uniform(time, shape)


@functools.lru_cache
def _velocity(config: ModelConfig) -> Callable:
    return jit(lambda expert, *inputs: run_expert(expert, config, *inputs))


def velocity(
    params: Params, config: ModelConfig, batch: Batch, noisy: jax.Array, time: jax.Array, memory: Memory | None = None
) -> jax.Array:
    """What the expert answers to noisy chunks, from the batch's own memory unless another is given."""
    memory = memory or insulate(prefix(params, config, batch), config.num_memory)
    return _velocity(config)(params.expert, memory, batch.observation.state, noisy, time)


def replace_observation(batch: Batch, **fields: Any) -> Batch:
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, **fields))
