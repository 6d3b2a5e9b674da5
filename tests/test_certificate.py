"""The insulation proof: exact zeros beside controls that are not, and no pass for a model that cannot show it."""

import copy
import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from insula import losses
from insula.batch import LossName
from insula.certificate import gradients
from insula.certificate.gradients import prove
from insula.certificate.proof import Outcome, judge, require
from insula.certificate.stored import read_certificate, stored_certificate, write_certificate
from insula.certificate.table import EXPERT_PARTS, Scheme
from insula.errors import InputError, InsulationError, MissingFileError
from insula.model.config import TransformerConfig, preset
from insula.model.params import abstract_params
from insula.testing import fake_batch

PARTS = ["vision", "embedding", "backbone layer 0", "backbone layer 1", "final norm", "expert", "action head"]


@pytest.fixture(scope="module")
def small():
    """Two layers of width 16; parameters with gates at zero, as training starts them, and random ones; a batch."""

    def transformer() -> TransformerConfig:
        return TransformerConfig(width=16, depth=2, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8)

    tiny = preset("tiny")
    vision = dataclasses.replace(
        tiny.vision, image_size=16, patch_sizes=(8,), stem_widths=(), width=16, depth=1, mlp_dim=16, num_heads=2
    )
    config = (
        dataclasses.replace(tiny, vision=vision, backbone=transformer(), expert=transformer(), vocab_size=64)
        .with_objective(flow_samples=1)
        .with_compute(scan_layers=True)
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
        flow, fast = row[LossName.FLOW], row[LossName.FAST]
        assert (flow[Scheme.INSULATED] == 0.0) == (part not in EXPERT_PARTS)
        assert (fast[Scheme.INSULATED] == 0.0) == (fast[Scheme.JOINT] == 0.0) == (part in EXPERT_PARTS)
        assert (flow[Scheme.JOINT] == 0.0) == (part == "final norm")


def test_norms_are_those_of_plain_gradients(small, proof) -> None:
    config, _, params, batch = small
    plain = jax.jit(jax.grad(lambda p: losses.compute_loss(p, config, batch, jax.random.key(3))[1]["fast"]))(params)
    wanted = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(plain.vision)))
    assert proof.table["vision"][LossName.FAST][Scheme.INSULATED] == pytest.approx(float(wanted), rel=1e-4)
    layer = jnp.sqrt(sum(jnp.sum(jnp.square(leaf[1])) for leaf in jax.tree.leaves(plain.backbone.layers)))
    assert proof.table["backbone layer 1"][LossName.FAST][Scheme.INSULATED] == pytest.approx(float(layer), rel=1e-4)


def test_an_untrained_model_is_vacuous(small) -> None:
    config, gateless, _, batch = small
    proof = prove(gateless, config, batch, jax.random.key(3))
    assert proof.outcome == "vacuous" and "flow loss, not insulated does not reach vision either" in proof.findings
    with pytest.raises(InsulationError, match="vacuous"):
        proof.check()


def test_without_insulation_it_does_not_hold_however_well_it_would(small, proof) -> None:
    config, _, params, batch = small
    joint = config.with_objective(knowledge_insulation=False)
    off = prove(params, joint, batch, jax.random.key(3))
    assert off.outcome == "off" and off.table == proof.table
    norm = f"norm {proof.table['vision'][LossName.FLOW][Scheme.JOINT]:.3g}"
    assert off.findings == (
        f"knowledge_insulation is off, γ is 1: the flow loss reaches vision, {norm} with γ = 1, "
        "and all of the backbone",
    )
    with pytest.raises(InsulationError, match="off"):
        off.check()
    frozen = joint.with_objective(freeze_backbone=True)
    assert not frozen.objective.flow_reaches_backbone and joint.objective.flow_reaches_backbone


def test_a_leak_is_found(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Insulation that stops nothing: what a mistake in the model would look like."""
    config, _, params, batch = small
    insulate = losses.insulate
    monkeypatch.setattr(losses, "insulate", lambda prefix, columns, scale: insulate(prefix, columns, 1.0))
    proof = prove(params, config, batch, jax.random.key(3))
    assert proof.outcome == "leaks" and any("flow loss reaches backbone layer 0" in f for f in proof.findings)
    with pytest.raises(InsulationError, match="leaks"):
        proof.check()


def test_freezing_and_settings_do_not_make_the_zeros(small, proof) -> None:
    config, _, params, batch = small
    changes = {"freeze_backbone": True, "knowledge_insulation": False, "ki_fast_loss_weight": 0.0}
    assert prove(params, config.with_objective(**changes), batch, jax.random.key(3)).table == proof.table


def test_every_scheme_is_measured_on_the_same_model(small, proof, tmp_path) -> None:
    """Stopping at the embeddings looks like insulation to whoever looks at embeddings and pixels only."""
    config, _, params, batch = small
    found = prove(params, config, batch, jax.random.key(3), tuple(Scheme)).check()
    for part, row in found.table.items():
        flow, fast = row[LossName.FLOW], row[LossName.FAST]
        for loss, columns in proof.table[part].items():
            assert {scheme: row[loss][scheme] for scheme in columns} == pytest.approx(columns, rel=1e-5)
        assert (flow[Scheme.EMBEDDINGS] == 0.0) == (part in ("vision", "embedding", "final norm"))
        assert (flow[Scheme.FROZEN] == 0.0) == (part not in EXPERT_PARTS) and fast[Scheme.FROZEN] == 0.0
        assert Scheme.EMBEDDINGS not in fast  # where the flow's gradient stops is nothing to the token loss
        if part.startswith("backbone layer"):  # the layers' gradient is whole: all of it leaks
            assert flow[Scheme.EMBEDDINGS] == pytest.approx(flow[Scheme.JOINT], rel=1e-4)
    assert found.cosine["expert"] is None and found.cosine["final norm"] is None  # one of the two is zero there
    assert all(0 < abs(found.cosine[part]) < 1 for part in PARTS[:4])


def test_cosines_are_those_of_plain_gradients() -> None:
    a, b = {"x": jnp.array([3e-30, 4e-30])}, {"x": jnp.array([4e20, 3e20])}
    assert float(gradients._cosine(a, b)) == pytest.approx(0.96)
    assert np.isnan(float(gradients._cosine(a, {"x": jnp.zeros(2)})))


def test_not_finite_is_no_proof(proof) -> None:
    for loss, scheme, bad in (("flow", "insulated", float("nan")), ("fast", "joint", float("inf"))):
        table = copy.deepcopy(proof.table)
        table["embedding"][LossName(loss)][Scheme(scheme)] = bad
        outcome, findings = judge(table)
        assert outcome is Outcome.NOT_FINITE and f"the norm on embedding is {bad}" in findings[0]


def test_small_gradients_are_not_zero() -> None:
    """Their squares are, in float32."""
    assert float(gradients._l2_norm({"a": jnp.full(4, 1e-30), "b": jnp.zeros(2)})) == pytest.approx(2e-30)
    assert float(gradients._l2_norm(jnp.zeros(3))) == 0.0


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_certificate_reads_back(small, proof, tmp_path) -> None:
    path = tmp_path / "new" / "certificate.json"
    write_certificate(path, proof, small[0], {"step": 7})
    written = read_certificate(path)
    assert written == stored_certificate(path) == json.loads(path.read_text())
    assert written["step"] == 7 and written["trained_with"]["knowledge_insulation"] and written["outcome"] == "holds"
    assert written["table"]["vision"]["flow"]["insulated"] == 0 < written["table"]["vision"]["flow"]["joint"]
    assert [found.name for found in path.parent.iterdir()] == [path.name]  # nothing unfinished stays behind


def test_no_certificate_is_said_plainly(tmp_path) -> None:
    path = tmp_path / "certificate.json"
    with pytest.raises(MissingFileError, match=r"certificate.json: not certified.*insula inspect --run RUN"):
        read_certificate(path)
    shown = stored_certificate(path)
    assert shown["outcome"] == "not certified" and "there is no such file" in shown["findings"][0]
    with pytest.raises(InsulationError, match=r"knowledge insulation: not certified; .*certificate.json"):
        require(shown["outcome"], shown["findings"])


SOUND: dict[str, Any] = {
    "format": 2,
    "outcome": "holds",
    "findings": [],
    "table": {"vision": {"flow": {"insulated": 0.0, "joint": 0.3}, "fast": {"insulated": 1.0}}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "written by an older version of insula (format 1, expected 2); measure it again"),
        ({"format": 3}, "written by another version of insula (format 3, expected 2)"),
        ({"format": "new"}, "written by another version of insula (format new, expected 2)"),
        ({"outcome": None}, "no 'outcome'"),
        ({"outcome": "fine"}, "outcome is 'fine', expected one of holds, off, leaks"),
        ({"findings": "none"}, "findings is 'none', expected a list"),
        ({"table": {}}, "the table is {}, expected a row"),
        ({"table": {"vision": {"flow": 0.0}}}, "the table's 'vision' is {'flow': 0.0}, expected norms"),
        ({"table": {"vision": {"flow": {"insulated": "no"}, "fast": {}}}}, "the table's 'vision' is"),
        ({"table": {"vision": {"flow": {"control": 1.0}, "fast": {}}}}, "the table's 'vision' is"),
    ],
)
def test_what_cannot_be_read_is_one_line(change: dict[str, Any], message: str, tmp_path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(SOUND))
    assert read_certificate(path) == SOUND  # the control

    written = {name: value for name, value in (SOUND | change).items() if value is not None}
    path.write_text(json.dumps(written))
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        read_certificate(path)
    assert "\n" not in str(refused.value)
    assert stored_certificate(path)["outcome"] == "not certified"


def test_a_certificate_cut_short_is_no_certificate(tmp_path) -> None:
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(SOUND)[:40])
    assert "not JSON" in stored_certificate(path)["findings"][0]
