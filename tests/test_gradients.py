"""The insulation proof: exact zeros beside controls that are not, and no pass for a model that cannot show it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insula import losses
from insula.inspection import gradients
from insula.inspection.gradients import InsulationError, gradient_table, judge, prove
from insula.model import abstract_params
from insula.model.config import TransformerConfig, preset
from insula.testing import fake_batch

PARTS = ["vision", "embedding", "backbone layer 0", "backbone layer 1", "final norm", "expert"]


@pytest.fixture(scope="module")
def small():
    """Two layers of width 16; parameters with gates at zero, as training starts them, and random ones; a batch."""

    def transformer() -> TransformerConfig:
        return TransformerConfig(width=16, depth=2, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)

    tiny = preset("tiny")
    vision = dataclasses.replace(
        tiny.vision, image_size=16, patch_sizes=(8,), stem_widths=(), width=16, depth=1, mlp_dim=16, num_heads=2
    )
    config = dataclasses.replace(
        tiny, vision=vision, backbone=transformer(), expert=transformer(), vocab_size=64, flow_samples=1, layers="scan"
    )
    rng = np.random.default_rng(0)  # JAX's generator would take longer to compile than all else here
    params = jax.tree.map(lambda leaf: np.float32(0.25 * rng.normal(size=leaf.shape)), abstract_params(config))
    expert = params.expert
    zero = jax.tree.map(np.zeros_like, expert.layers.attention_norm)
    layers = dataclasses.replace(expert.layers, attention_norm=zero, mlp_norm=zero)
    gateless = dataclasses.replace(params, expert=dataclasses.replace(expert, layers=layers))
    return config, gateless, params, fake_batch(config, 2, jax.random.key(0))


@pytest.fixture(scope="module")
def proof(small):
    config, _, params, batch = small
    return prove(params, config, batch, jax.random.key(3))


def test_zeros_are_exact_and_controls_are_not(proof) -> None:
    assert list(proof.table) == PARTS and proof.check() is proof and proof.findings == ()
    for part, row in proof.table.items():
        assert (row["flow"] == 0.0) == (part != "expert")
        assert (row["fast"] == 0.0) == (row["fast_control"] == 0.0) == (part == "expert")
        assert (row["flow_control"] == 0.0) == (part == "final norm")
    assert json.loads(json.dumps(proof.to_json()))["outcome"] == "holds"


def test_norms_are_those_of_plain_gradients(small, proof) -> None:
    config, _, params, batch = small
    plain = jax.jit(jax.grad(lambda p: losses.compute_loss(p, config, batch, jax.random.key(3))[1]["fast"]))(params)
    wanted = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(plain.vision)))
    assert proof.table["vision"]["fast"] == pytest.approx(float(wanted), rel=1e-4)
    layer = jnp.sqrt(sum(jnp.sum(jnp.square(leaf[1])) for leaf in jax.tree.leaves(plain.backbone.layers)))
    assert proof.table["backbone layer 1"]["fast"] == pytest.approx(float(layer), rel=1e-4)


def test_an_untrained_model_is_vacuous(small) -> None:
    config, gateless, _, batch = small
    proof = prove(gateless, config, batch, jax.random.key(3))
    assert proof.outcome == "vacuous" and "flow_control on vision is zero, too" in proof.findings
    with pytest.raises(InsulationError, match="vacuous"):
        proof.check()


def test_a_leak_is_found(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Insulation that stops nothing: what a mistake in the model would look like."""
    config, _, params, batch = small
    insulate = losses.insulate
    monkeypatch.setattr(losses, "insulate", lambda prefix, columns, stop: insulate(prefix, columns, stop=False))
    proof = prove(params, config, batch, jax.random.key(3))
    assert proof.outcome == "leaks" and any("flow reaches backbone layer 0" in f for f in proof.findings)
    with pytest.raises(InsulationError, match="leaks"):
        proof.check()


def test_freezing_and_settings_do_not_make_the_zeros(small, proof) -> None:
    config, _, params, batch = small
    changes = {"freeze_backbone": True, "knowledge_insulation": False, "ki_fast_loss_weight": 0.0}
    assert gradient_table(params, dataclasses.replace(config, **changes), batch, jax.random.key(3)) == proof.table


def test_not_finite_is_no_proof(proof) -> None:
    for column, bad in (("flow", float("nan")), ("fast_control", float("inf"))):
        table = {part: dict(row) for part, row in proof.table.items()}
        table["embedding"][column] = bad
        assert judge(table)[0] == "not finite"


def test_small_gradients_are_not_zero() -> None:
    """Their squares are, in float32."""
    assert float(gradients._norm({"a": jnp.full(4, 1e-30), "b": jnp.zeros(2)})) == pytest.approx(2e-30)
    assert float(gradients._norm(jnp.zeros(3))) == 0.0
