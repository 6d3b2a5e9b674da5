"""The same training on any mesh: eight devices made out of one CPU, and every weight really split."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small import SMALL, by_leaf, difference, jit, model, mostly_slow, transformer

from insula.certificate.gradients import prove
from insula.certificate.proof import Outcome
from insula.errors import InputError
from insula.model.config import PI05, LoraConfig, ModelConfig
from insula.model.params import Params, add_lora, weight_table
from insula.parallel import sharding
from insula.parallel.mesh import MeshConfig, check_batch_size, make_mesh, put_batch, put_everywhere
from insula.parallel.sharding import params_sharding, partition, put, shard_like_params
from insula.testing import fake_batch, randomize
from insula.train.optimizer import OptimizerConfig, make_optimizer
from insula.train.step import TrainState, abstract_state, make_train_state, make_train_step

STEPS, BATCH = 20, 8
SETTINGS = OptimizerConfig(warmup_steps=2)
# Four heads and four key heads, so that a tensor axis of two has something to split.
EVEN = dataclasses.replace(SMALL, backbone=transformer(16, 4), expert=transformer(16, 4), action_dim=4)
RECIPES: dict[str, ModelConfig] = {
    "insulated": EVEN,
    "joint": EVEN.with_objective(knowledge_insulation=False),
    "frozen": EVEN.with_objective(freeze_backbone=True),
    "LoRA": dataclasses.replace(EVEN, lora=LoraConfig(rank=2, parts=("backbone", "expert"))),
    "scanned": EVEN.with_compute(scan_layers=True, vocab_chunk=16),
}
MESHES = {"data": MeshConfig(8, 1, 1), "fsdp": MeshConfig(1, 8, 1), "all three": MeshConfig(2, 2, 2)}
ONE = MeshConfig(1, 1, 1)


@pytest.fixture(autouse=True)
def split_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models have no others."""
    monkeypatch.setattr(sharding, "SMALL", 1)


def start(config: ModelConfig) -> tuple[Params, list[Any]]:
    """Parameters without a comfortable zero, and the batches of a few steps, on the host."""
    plain = dataclasses.replace(config, lora=None)
    params, _ = model(plain)
    if config.lora is not None:
        adapted = add_lora(params, config, jax.random.key(5))
        params = jax.tree.map(lambda new, old: old + 0.05 * new, randomize(adapted, jax.random.key(6)), adapted)
    make = jit(lambda key: fake_batch(plain, BATCH, key))
    return jax.device_get((params, [make(jax.random.key(i)) for i in range(4)]))


def train(config: ModelConfig, where: MeshConfig, steps: int = STEPS, parts: int = 1) -> tuple[TrainState, list[float]]:
    """The state after so many steps, still on its devices, and the losses on the way."""
    params, batches = start(config)
    mesh = make_mesh(where)
    optimizer = make_optimizer(SETTINGS, config, 100)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
        state = jit(lambda params: make_train_state(params, optimizer), out_shardings=places)(
            put(params, places.params)
        )
        step = make_train_step(config, optimizer, 0.9, jax.random.key(3), parts=parts, places=places)
        step = jit(step, out_shardings=(places, None))
        losses = []
        for i in range(steps):
            state, metrics = step(state, put_batch(batches[i % len(batches)], mesh, 8))
            losses.append(float(metrics["total"]))
    return state, losses


def split(tree: Any) -> int:
    """How many leaves no device has the whole of."""
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree))


# --- the same numbers ------------------------------------------------------------------------------------------------

ALONE: dict[str, tuple[TrainState, list[float]]] = {}
USUAL = {("insulated", "all three"), ("LoRA", "all three")}
"""Recipes and meshes of `make test`; each of the others compiles a training of its own."""
CASES = [
    pytest.param(recipe, mesh, marks=[] if (recipe, mesh) in USUAL else pytest.mark.slow)
    for recipe in RECIPES
    for mesh in MESHES
]


@pytest.mark.parametrize(("recipe", "mesh"), CASES)
def test_training_is_the_same_on_every_mesh(recipe: str, mesh: str) -> None:
    """Losses and parameters of twenty updates. Control: they moved a thousand times as far."""
    config = RECIPES[recipe]
    if recipe not in ALONE:
        ALONE[recipe] = train(config, ONE)
    (one, losses), (state, found) = ALONE[recipe], train(config, MESHES[mesh])
    assert np.allclose(found, losses, rtol=2e-6, atol=0)
    assert split(state) == 0 if mesh == "data" else split(state) > len(jax.tree.leaves(state)) / 2

    # A key's bias adds the same to every score of a query, which softmax does not see: its gradient is zero but for
    # rounding, and Adam makes full steps of rounding.
    before, wanted, after = (by_leaf(jax.device_get(p)) for p in (start(config)[0], one.params, state.params))
    unseen = {"vision.layers.key.bias"}
    far = {name: np.abs(after[name] - wanted[name]).max() for name in wanted.keys() - unseen}
    assert max(far.values()) < 1e-5, max(far, key=lambda name: far[name])
    moved = {name: np.abs(wanted[name] - before[name]).max() for name in wanted}
    assert max(moved.values()) > 1e-2 and difference(state.ema_params, one.ema_params) < 0.01


def test_parts_of_a_batch_add_up_on_a_mesh() -> None:
    state, losses = train(EVEN, MESHES["all three"], 3, parts=2)
    one, wanted = train(EVEN, ONE, 3)
    assert np.allclose(losses, wanted, rtol=2e-6, atol=0)
    assert difference(state.params.expert, one.params.expert) < 1e-5 and split(state) > len(jax.tree.leaves(state)) / 2


@pytest.mark.parametrize("mesh", mostly_slow(MESHES, "all three"))
def test_insulation_is_exact_on_every_mesh(mesh: str) -> None:
    """Beside its own control, the joint scheme, on the same mesh."""
    where, (params, batches) = make_mesh(MESHES[mesh]), start(EVEN)
    with jax.set_mesh(where):
        params = put(params, params_sharding(EVEN, where))
        proof = prove(params, EVEN, put_everywhere(batches[0], where), jax.random.key(0))
    assert proof.outcome is Outcome.HOLDS
    assert (split(params) > 10) == (mesh != "data")


# --- what lives where ------------------------------------------------------------------------------------------------


def test_large_weights_are_split_by_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of `insula.parallel.sharding`, at π0.5's sizes."""
    monkeypatch.undo()
    mesh = make_mesh(MeshConfig(1, 4, 2))
    table, spec = weight_table(PI05), PartitionSpec
    backbone, expert, vision = table.backbone.layers, table.expert.layers, table.vision
    wanted = [
        (backbone.query, spec(None, "fsdp", "tensor", None)),
        (backbone.key, spec(None, "fsdp", None, None)),  # one key head cannot be split
        (backbone.out, spec(None, "tensor", None, "fsdp")),
        (backbone.gate, spec(None, "fsdp", "tensor")),
        (backbone.down, spec(None, "tensor", "fsdp")),
        (backbone.attention_norm, spec(None, "fsdp")),
        (table.backbone.embedding, spec("tensor", "fsdp")),
        (expert.attention_norm.kernel, spec(None, "fsdp", None)),
        (table.expert.action_out.bias, spec()),
        (vision.layers.query.kernel, spec(None, "fsdp", "tensor", None)),
        (vision.position, spec(None, "fsdp")),
    ]
    for weight, expected in wanted:
        assert partition(weight, mesh) == expected, weight


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8), (1, 3, 2)])
def test_every_axis_that_is_split_is_split_evenly(sizes: tuple[int, int, int]) -> None:
    """Of all presets' weights, whatever divides; nothing large is copied where an axis of it divides."""
    mesh = make_mesh(MeshConfig(*sizes))
    for weight in jax.tree.leaves(weight_table(PI05), is_leaf=lambda x: hasattr(x, "axes")):
        found = partition(weight, mesh)
        for size, axis in zip(weight.shape, found, strict=False):
            assert axis is None or size % mesh.shape[axis] == 0
        if sizes == (1, 8, 1) and math.prod(weight.shape) > 10**6:
            assert "fsdp" in found, weight


def test_moments_and_averages_live_where_their_parameters_do() -> None:
    mesh = make_mesh(MeshConfig(1, 8, 1))
    optimizer = make_optimizer(SETTINGS, EVEN, 10)
    state = abstract_state(EVEN, optimizer, mesh)
    one = split(state.params)
    assert split(state.ema_params) == one > 10 and split(state.optimizer) == 2 * one
    assert shard_like_params({"count": jnp.zeros(8)}, EVEN, mesh)["count"].is_fully_replicated


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_all_devices_share_the_model_unless_told() -> None:
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(ONE).size == 1 and dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape)["fsdp"] == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(16), "data 16 × fsdp 1 × tensor 1 = 16 devices, but there are 8"),
        (MeshConfig(3), "data 3 × fsdp 2 × tensor 1 = 6 devices, but there are 8"),
        (MeshConfig(1, 4, 4), "= 16 devices, but there are 8"),
    ],
)
def test_numbers_that_are_no_mesh_of_these_devices(config: MeshConfig, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_mesh(config)


@pytest.mark.parametrize("wrong", [0, -1, True, 1.0, "2"])
def test_a_number_of_devices_is_a_positive_integer(unchecked: None, wrong: Any) -> None:
    with pytest.raises(InputError, match="mesh: data"):
        MeshConfig(data=wrong)


def test_every_device_gets_as_many_samples() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batch_size(mesh, 32)
    with pytest.raises(InputError, match=r"30 does not divide into 4 equal parts .* the nearest that does is 32"):
        check_batch_size(mesh, 30)
