"""What a program costs, against counts by hand; and `insula plan`, which puts them together."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from small import SMALL, jit

from insula.errors import InputError
from insula.losses import compute_loss
from insula.model.config import PI05, TINY_BFLOAT16, ModelConfig, TransformerConfig
from insula.model.params import abstract_params, init_params
from insula.parallel.cost import count_flops, count_messages
from insula.parallel.devices import DEVICES
from insula.parallel.mesh import MeshConfig, make_mesh, put_batch, split_batch
from insula.parallel.sharding import put
from insula.testing import fake_batch
from insula.train.optimizer import DEFAULT, OptimizerConfig, make_optimizer
from insula.train.plan import Needs, PlanConfig, abstract_batch, estimate, local_bytes, measure, remedies
from insula.train.step import abstract_state, make_train_state, make_train_step

A, B = jax.ShapeDtypeStruct((3, 5), "float32"), jax.ShapeDtypeStruct((5, 7), "float32")
PRODUCT = 2 * 3 * 5 * 7


def test_products_are_counted_wherever_they_are() -> None:
    def looped(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.scan(lambda carry, _: (carry + a @ b, None), jnp.zeros((3, 7)), length=11)[0]

    def summed(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(a @ b)

    assert count_flops(jnp.matmul, A, B) == count_flops(jax.jit(jnp.matmul), A, B) == PRODUCT
    assert count_flops(looped, A, B) == 11 * PRODUCT
    assert count_flops(jax.grad(summed, argnums=(0, 1)), A, B) == 3 * PRODUCT  # itself, and one for each input
    assert count_flops(jax.grad(jax.checkpoint(lambda a, b: jnp.sum(jnp.sin(a @ b))), argnums=0), A, B) == 3 * PRODUCT
    assert count_flops(jnp.add, A, A) == 0
    with pytest.raises(NotImplementedError):
        count_flops(lambda a, b: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + a @ b, jnp.zeros((3, 7))), A, B)


def by_hand(config: ModelConfig) -> float:
    """FLOPs of one sample's products in a train step with `remat` "all": layers forwards, again, and twice as much
    backwards, and so with logits; the last product of a layer has no need of the second time. No norms, no stem, no
    heads."""
    vision, backbone, expert = config.vision, config.backbone, config.expert
    patches, tokens = vision.num_patches, config.num_image_tokens + config.max_token_len
    seen = patches * (4 * 4 * vision.width**2 + (4 + 3) * vision.width * vision.mlp_dim)
    seen += 4 * 2 * patches**2 * vision.width

    def layer(rows: int, columns: int, c: TransformerConfig) -> float:
        heads, shared = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        weights = c.width * (4 * (2 * heads + 2 * shared + 2 * c.mlp_dim) + 3 * c.mlp_dim)
        return rows * weights + 4 * 2 * rows * columns * heads

    read = layer(tokens, tokens, backbone)
    acted = layer(config.horizon, config.num_memory + config.horizon, expert)
    walked = len(config.cameras) * vision.depth * seen + backbone.depth * (read + acted)
    return 2 * (walked + 4 * config.max_fast_len * backbone.width * config.vocab_size)


def test_a_step_of_pi05_has_the_products_it_must_have() -> None:
    """Within five percent of a count by hand. Control: without computing layers again it has a quarter less."""
    batch = abstract_batch(PI05, 2)

    def flops(config: ModelConfig) -> float:
        gradient = jax.grad(lambda p, b: compute_loss(p, config, b, jax.random.key(0))[0])
        return count_flops(gradient, abstract_params(config), batch) / 2

    found = flops(PI05)
    assert found == pytest.approx(by_hand(PI05), rel=0.05)
    assert flops(PI05.with_compute(remat="none")) < 0.85 * found


def test_messages_are_counted_with_the_loops_they_are_in() -> None:
    """A product over an axis that eight devices share is one sum of results; in a loop of five, five."""
    mesh = make_mesh(MeshConfig(1, 8, 1))
    shared = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    a = jax.ShapeDtypeStruct((4, 64), "float32", sharding=shared)
    b = jax.ShapeDtypeStruct((64, 16), "float32", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())

    once = jit(jnp.matmul, out_shardings=whole).lower(a, b).compile().as_text()
    found = count_messages(once)
    assert list(found) == ["all-reduce"] and found["all-reduce"].count == 1
    assert found["all-reduce"].sent == pytest.approx(2 * 7 / 8 * 4 * 16 * 4)

    def looped(a: jax.Array, b: jax.Array) -> jax.Array:
        def body(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(c + lax.with_sharding_constraint((a + c[0, 0]) @ b, whole)), None

        return lax.scan(body, jnp.zeros((4, 16)), length=5)[0]

    text = jit(looped, out_shardings=whole).lower(a, b).compile().as_text()
    assert count_messages(text)["all-reduce"].count == 5
    assert count_messages(jit(jnp.matmul).lower(A, B).compile().as_text()) == {}


def test_memory_is_what_the_compiler_says() -> None:
    """What stays between steps and the batch are its arguments, to one part in fifty; split, they are less."""
    config = PlanConfig(count=8, model=SMALL, batch_size=8)
    one, many = (measure(config, make_mesh(mesh)) for mesh in (MeshConfig(1, 1, 1), MeshConfig(1, 8, 1)))
    state = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract_params(SMALL)))
    assert one.kept["parameters"] == one.kept["average"] == state
    assert one.kept["moments"] == pytest.approx(2 * state, rel=0.01)
    assert many.batch * 8 == one.batch and many.working < one.working and many.flops == one.flops
    assert not one.messages and many.messages


def test_a_plan_agrees_with_the_step_that_trains() -> None:
    """Within a tenth of what XLA says of the step compiled for a real state and a real batch: its arguments, and what
    it makes and frees. Control: without what it makes it does not."""
    config, size = TINY_BFLOAT16, 8
    mesh, optimizer = make_mesh(MeshConfig(1, 1, 1)), make_optimizer(DEFAULT, config, 1000)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
        state = make_train_state(put(init_params(config, jax.random.key(0)), places.params), optimizer)
        batch = put_batch(jax.device_get(fake_batch(config, size, jax.random.key(1))), mesh, size)
        step = make_train_step(config, optimizer, DEFAULT.ema_decay, jax.random.key(2), places=places)
        said = step.lower(state, batch).compile().memory_analysis()  # type: ignore[attr-defined]
    needed = said.argument_size_in_bytes + said.temp_size_in_bytes

    planned = measure(PlanConfig(model=config, batch_size=size), mesh)
    assert planned.memory == pytest.approx(needed, rel=0.1)
    assert planned.memory - planned.working == pytest.approx(said.argument_size_in_bytes, rel=0.01)
    assert planned.memory - planned.working < 0.9 * needed


def test_what_is_not_kept_is_not_planned() -> None:
    """No average, half a moment, and no second copy of what is frozen."""
    mesh = make_mesh(MeshConfig(1, 1, 1))
    usual = measure(PlanConfig(model=SMALL, batch_size=8), mesh).kept
    optimizer = OptimizerConfig(ema_decay=None, moment_dtype="bfloat16")
    lean = measure(PlanConfig(model=SMALL, batch_size=8, optimizer=optimizer), mesh).kept
    assert lean["average"] == 0 and lean["parameters"] == usual["parameters"] == usual["average"]
    assert lean["moments"] == pytest.approx(0.75 * usual["moments"], rel=0.01)

    frozen = SMALL.with_objective(freeze_backbone=True)
    kept = measure(PlanConfig(model=frozen, batch_size=8), mesh).kept
    assert 2 * kept["average"] == pytest.approx(kept["moments"], rel=0.01) and kept["average"] < kept["parameters"] / 2


def test_shapes_of_a_batch_are_those_of_a_batch() -> None:
    real = jax.eval_shape(lambda key: fake_batch(SMALL, 4, key), jax.random.key(0))
    ours = abstract_batch(SMALL, 4, split_batch(make_mesh(MeshConfig(4, 1, 1))))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), real) == jax.tree.map(lambda x: (x.shape, x.dtype), ours)
    assert local_bytes(ours) * 4 == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(real))


KEPT = {"parameters": 40 * 10**9}
NEEDS = Needs(
    parameters=10,
    kept=KEPT,
    batch=0,
    working=20 * 10**9,
    gradients=8 * 10**9,
    logits=10**9,
    flops=10**15,
    messages={},
    samples=4,
)


def test_what_follows_for_a_device() -> None:
    """Four samples take 20 GB beside 40 GB that stay: on 80 GB less eight percent, six fit; on 48 GB none does."""
    smallest = dataclasses.replace(NEEDS, working=5 * 10**9, samples=1)
    config = PlanConfig(device="h100", count=2, batch_size=8, mesh=MeshConfig(2, 1, 1))
    found = estimate(config, NEEDS, smallest)
    assert found.fits and found.largest_batch == 2 * 6  # 73.6 = 40 + 5 + 5.72 · 5
    assert found.computing == pytest.approx(1e15 / 2 / (0.4 * 989e12)) and found.seconds == found.computing

    none = estimate(dataclasses.replace(config, device="rtx5090"), NEEDS, smallest)
    assert not none.fits and none.largest_batch == 0
    said = "; ".join(remedies(config, make_mesh(MeshConfig(2, 1, 1)), NEEDS))
    assert "--accumulate 4" in said and "--mesh.data 1 --mesh.fsdp 2" in said
    assert "--optimizer.ema-decay None" in said and "--optimizer.moment-dtype bfloat16" in said
    bare = dataclasses.replace(config, optimizer=OptimizerConfig(ema_decay=None, moment_dtype="bfloat16"))
    assert "optimizer" not in "; ".join(remedies(bare, make_mesh(MeshConfig(2, 1, 1)), NEEDS))


def test_devices_have_their_published_figures() -> None:
    for name, device in DEVICES.items():
        assert 10e9 < device.memory < 200e9 and 1e14 < device.peak < 1e15 and device.source, name
        assert 10 < device.peak / device.bandwidth < 1000 and device.link < device.bandwidth, name
    with pytest.raises(InputError, match=r"no device 'h10' \(did you mean 'h100'\?\)"):
        PlanConfig(device="h10")


def test_the_command(tmp_path: Path) -> None:
    """On devices that this machine does not have, from settings as training takes them."""
    sizes = ["--model.vision.depth", "1", "--model.backbone.depth", "1", "--model.expert.depth", "1"]
    flags = ["--device", "v5e", "--count", "4", "--batch-size", "4", "--json", str(tmp_path / "plan.json"), *sizes]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-m", "insula", "plan", *flags], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "fits; the largest batch that does is about" in done.stdout and "v5e" in done.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and written["memory"] > 0 and written["fits"]
