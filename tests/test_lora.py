"""LoRA: the same model until trained, the same insulation, and nothing but a and b learns. Beside each zero, its
control."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import train_and_interrupt
from small import CLOSE, FAR, SMALL, VARIANTS, by_leaf, difference, gradients, jit, largest, loss, model, mostly_slow

from insula.batch import LossName
from insula.certificate.gradients import prove
from insula.certificate.table import EXPERT_PARTS, Scheme
from insula.checkpoints.pretrained import load_pretrained
from insula.checkpoints.store import CheckpointStore
from insula.collect.demonstrations import collect
from insula.convert import convert_checkpoint
from insula.data.config import DataConfig
from insula.decode.flow import sample_actions
from insula.errors import CheckpointError
from insula.losses import compute_loss
from insula.model import layers
from insula.model.config import TINY, LoraConfig, ModelConfig, TransformerConfig, VisionConfig, config_from_dict
from insula.model.lora import INPUT_AXES, LoRA, is_lora, merge
from insula.model.params import Params, abstract_params, add_lora, weight_table
from insula.parallel.mesh import ONE_DEVICE
from insula.policy import Policy
from insula.runs.assets import read_assets
from insula.train import run as training
from insula.train.config import TrainConfig
from insula.train.optimizer import OptimizerConfig, make_optimizer
from insula.train.step import make_train_state, make_train_step

BOTH = LoraConfig(rank=3, alpha=6.0, parts=("backbone", "expert"))
ON_BACKBONE = dataclasses.replace(BOTH, parts=("backbone",))
GATES = ("attention_norm", "mlp_norm")
UNDER = dataclasses.replace(SMALL, lora=BOTH)
SCANNED = "one key head, scan"


def updates(part) -> dict[str, np.ndarray]:
    """Every a and b, by path."""
    return {name: leaf for name, leaf in by_leaf(part).items() if name.endswith((".a", ".b"))}


def rest(part) -> dict[str, np.ndarray]:
    return {name: leaf for name, leaf in by_leaf(part).items() if not name.endswith((".a", ".b"))}


def is_zero(leaves: dict[str, np.ndarray]) -> bool:
    assert leaves
    return all(np.all(leaf == 0) for leaf in leaves.values())


def test_an_update_stands_for_each_matrix_and_nothing_else() -> None:
    table = weight_table(UNDER)
    assert not any(map(is_lora, jax.tree.leaves(table.vision, is_leaf=is_lora)))
    for part in (table.backbone, table.expert):
        assert {name for name, leaf in vars(part.layers).items() if is_lora(leaf)} == INPUT_AXES.keys()
    query, out, down = (getattr(table.backbone.layers, name) for name in ("query", "out", "down"))
    assert (query.a.shape, query.a.axes, query.b.shape, query.b.axes) == ((2, 16, 3), "XWr", (2, 3, 4, 8), "XrNE")
    assert (out.a.shape, out.a.axes, out.b.shape, out.b.axes) == ((2, 4, 8, 3), "XNEr", (2, 3, 16), "XrW")
    assert [w.a.std for w in (query, out, down)] == pytest.approx([16**-0.5, 32**-0.5, 24**-0.5])
    assert {leaf.b.init for leaf in (query, out, down)} == {"zeros"} and query.scale == BOTH.alpha / BOTH.rank

    alone = weight_table(dataclasses.replace(SMALL, lora=ON_BACKBONE))
    assert is_lora(alone.backbone.layers.query) and not is_lora(alone.expert.layers.query)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_the_merged_matrix(dtype: str) -> None:
    """Also with heads on either side. With b = 0 it is the base's to the last bit; control: b as it is."""
    layer = jax.tree.map(lambda leaf: leaf[0], model(UNDER)[0].backbone.layers)
    merged = jax.tree.map(lambda leaf: leaf[0], merge(model(UNDER)[0]).backbone.layers)
    x = jax.random.normal(jax.random.key(2), (3, 5, 16))
    heads = layers.matmul(x, layer.query, dtype)
    assert heads.shape == (3, 5, 4, 8)
    for multiply, y, name in ((layers.matmul, x, "query"), (layers.merge_heads, heads, "out")):
        weight = getattr(layer, name)
        found = multiply(y, weight, dtype)
        wanted = multiply(y, getattr(merged, name), "float32")
        assert difference(found, wanted) < (0.02 if dtype == "bfloat16" else 1e-5) * largest(wanted)
        fresh = dataclasses.replace(weight, b=jnp.zeros_like(weight.b))
        assert difference(multiply(y, fresh, dtype), multiply(y, weight.base, dtype)) == 0.0
        assert difference(found, multiply(y, weight.base, dtype)) > 0.1


@pytest.mark.parametrize("variant", mostly_slow(["grouped queries", SCANNED], SCANNED))
def test_fresh_updates_change_nothing(variant: str) -> None:
    """Whatever a is, while b is zero, to the last bit. Control: another b."""
    plain = dataclasses.replace(SMALL, **VARIANTS[variant])
    under = dataclasses.replace(plain, lora=BOTH)
    params, batch = model(plain)
    one, other = (add_lora(params, under, jax.random.key(seed)) for seed in (5, 6))
    assert all(np.any(leaf) == name.endswith(".a") for name, leaf in updates(one).items())
    assert all(np.any(leaf != by_leaf(other)[name]) for name, leaf in updates(one).items() if name.endswith(".a"))
    assert difference(merge(one), params) == 0.0

    (_, before), (_, after), (_, again) = loss(params, plain, batch), loss(one, under, batch), loss(other, under, batch)
    assert difference(after, again) == 0.0 and difference(before, after) < CLOSE
    _, control = loss(jax.tree.map(lambda leaf: leaf + 0.1, one), under, batch)
    assert difference((control["flow"], control["fast"]), (after["flow"], after["fast"])) > FAR


def actions(params: Params, config: ModelConfig, batch) -> jax.Array:
    noise = jax.random.normal(jax.random.key(9), (2, config.horizon, config.action_dim))
    prompt = dataclasses.replace(
        batch.observation,
        tokens=batch.observation.tokens[:, : config.max_prompt_len],
        token_mask=(batch.observation.token_mask & ~batch.ar_mask)[:, : config.max_prompt_len],
    )
    return jit(lambda p: sample_actions(p, config, prompt, noise, 4))(params)


@pytest.mark.parametrize("variant", mostly_slow(["grouped queries", SCANNED], SCANNED))
def test_merged_parameters_act_alike(variant: str) -> None:
    """Control: merged with another scale."""
    plain = dataclasses.replace(SMALL, **VARIANTS[variant])
    under = dataclasses.replace(plain, lora=BOTH)
    params, batch = model(under)
    merged = merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract_params(plain))
    assert all(leaf.dtype == np.float32 for leaf in by_leaf(merged).values())
    query, out = params.backbone.layers.query, params.expert.layers.out
    by_hand = query.base + 2.0 * np.einsum("dwr,drne->dwne", query.a, query.b)
    assert difference(merged.backbone.layers.query, by_hand) < 1e-5
    assert difference(merged.expert.layers.out, out.base + 2.0 * np.einsum("dner,drw->dnew", out.a, out.b)) < 1e-5

    wanted = actions(params, under, batch)
    assert difference(actions(merged, plain, batch), wanted) < CLOSE

    def rescaled(leaf):
        return dataclasses.replace(leaf, scale=1.5 * leaf.scale) if is_lora(leaf) else leaf

    other = merge(jax.tree.map(rescaled, params, is_leaf=is_lora))
    assert difference(actions(other, plain, batch), wanted) > FAR


@pytest.mark.parametrize("variant", mostly_slow(["grouped queries", SCANNED], SCANNED))
def test_no_gradient_crosses(variant: str) -> None:
    """Invariants 1 and 2 on a and b. Un-insulated, flow reaches the backbone's; each loss reaches its own."""
    config = dataclasses.replace(SMALL, **VARIANTS[variant], lora=BOTH)
    params, batch = model(config)
    found = gradients(params, config, batch)
    flow, fast = found["flow"], found["fast"]
    assert is_zero(updates(flow.backbone)) and largest(flow.vision) == 0.0
    assert is_zero(updates(fast.expert))
    assert all(np.any(leaf) for leaf in (updates(flow.expert) | updates(fast.backbone)).values())

    leak = gradients(params, config.with_objective(knowledge_insulation=False), batch)["flow"]
    assert largest(leak.vision) > 0
    for name, leaf in updates(leak.backbone).items():
        assert np.any(leaf[:-1]), name  # of the last layer, only keys and values are read
    assert np.any(leak.backbone.layers.key.a[-1]) and np.any(leak.backbone.layers.value.b[-1])


def test_only_updates_of_a_part_under_lora_learn() -> None:
    """Controls: parts not under LoRA, and the very same parts without it."""
    params, batch = model(UNDER)
    total = gradients(params, UNDER, batch)["total"]
    assert is_zero(rest(total.backbone)) and is_zero(rest(total.expert))
    for name, leaf in (updates(total.backbone) | updates(total.expert) | by_leaf(total.vision)).items():
        assert np.any(leaf), name

    half = dataclasses.replace(SMALL, lora=ON_BACKBONE)
    params, batch = model(half)
    total = gradients(params, half, batch)["total"]
    assert is_zero(rest(total.backbone)) and not is_zero(updates(total.backbone))
    assert all(np.any(leaf) for leaf in by_leaf(total.expert).values())
    free = gradients(params, SMALL, batch)["total"]  # the tree is under LoRA, but nothing says to freeze
    assert all(np.any(leaf) for leaf in rest(free.backbone).values())


def test_frozen_matrices_cost_no_gradient() -> None:
    """Floating-point operations of one loss and its gradient."""

    def flops(config: ModelConfig, params: Params, batch) -> float:
        step = jit(jax.grad(lambda p: compute_loss(p, config, batch, jax.random.key(0))[0]))
        return step.lower(params).compile().cost_analysis()["flops"]

    params, batch = model(UNDER)
    assert flops(UNDER, params, batch) < 0.9 * flops(SMALL, params, batch)


def test_the_proof_is_of_insulation_not_of_freezing() -> None:
    """Embedding and norms are frozen under LoRA; the token loss reaches them in the table all the same."""
    config = UNDER.with_compute(scan_layers=True)
    params, batch = model(config)
    proof = prove(params, config, batch, jax.random.key(3)).check()
    assert all(
        row[LossName.FAST][Scheme.INSULATED] > 0 for part, row in proof.table.items() if part not in EXPERT_PARTS
    )


def test_training_moves_updates_and_keeps_moments_for_them_alone() -> None:
    config = dataclasses.replace(SMALL, lora=ON_BACKBONE)
    params, batch = model(config)
    settings = OptimizerConfig(warmup_steps=1, ema_decay=0.9)
    optimizer = make_optimizer(settings, config, 10)
    state = make_train_state(jax.tree.map(jnp.copy, params), optimizer)
    moments = by_leaf(state.optimizer)
    learning = updates(params.backbone) | by_leaf((params.vision, params.expert))
    held = [leaf for leaf in moments.values() if leaf.ndim]
    assert sum(leaf.size for leaf in held) == 2 * sum(leaf.size for leaf in learning.values())

    step = jit(make_train_step(config, optimizer, settings.ema_decay, jax.random.key(1)))
    for _ in range(3):
        state, _ = step(state, batch)
    for tree in (state.params, state.ema_params):
        before, after = by_leaf(params), by_leaf(tree)
        frozen = {f"backbone.{name}" for name in rest(params.backbone)}
        assert {name for name in before if np.array_equal(before[name], after[name])} == frozen


def test_pretrained_weights_are_the_bases() -> None:
    """Control: from scratch."""
    config = dataclasses.replace(TINY, lora=LoraConfig(rank=2))
    params = training.start_params(TrainConfig(run=Path("r"), model=config), jax.random.key(0))
    stored = load_pretrained(TINY, jax.random.key(0))
    assert difference(merge(params.backbone), stored.backbone) == difference(params.vision, stored.vision) == 0.0
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
    fresh = training.start_params(TrainConfig(run=Path("r"), model=config, from_scratch=True), jax.random.key(0))
    assert difference(merge(fresh.backbone), stored.backbone) > FAR


def test_lora_on_a_fresh_expert_is_refused_as_it_could_not_learn() -> None:
    """Gates of zero, frozen, hide a and b from the flow loss. Control: randomized gates."""
    with pytest.raises(ValueError, match=r"expert that starts from random weights.*lora.parts \('backbone',\)"):
        training.start_params(TrainConfig(run=Path("r"), model=UNDER, from_scratch=True), jax.random.key(0))
    params, batch = model(UNDER)
    shut = {name: jax.tree.map(jnp.zeros_like, getattr(params.expert.layers, name)) for name in GATES}
    gateless = dataclasses.replace(params.expert.layers, **shut)
    fresh = dataclasses.replace(params, expert=dataclasses.replace(params.expert, layers=gateless))
    assert largest(gradients(fresh, UNDER, batch)["total"].expert) == 0.0
    assert largest(gradients(params, UNDER, batch)["total"].expert) > 0


def test_lora_is_added_once() -> None:
    params, _ = model()
    with pytest.raises(ValueError, match="lora=None"):
        add_lora(params, SMALL, jax.random.key(0))
    added = add_lora(params, UNDER, jax.random.key(0))
    with pytest.raises(ValueError, match="under LoRA already"):
        add_lora(added, UNDER, jax.random.key(0))
    assert isinstance(add_lora(merge(added), UNDER, jax.random.key(0)).backbone.layers.query, LoRA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0, expected an integer ≥ 1"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"parts": ("backbon",)}, "'backbon'.*did you mean 'backbone'"),
        ({"parts": ("vision",)}, "'vision', expected any of"),
        ({"parts": ()}, "expected at least one"),
        ({"parts": ("expert", "expert")}, "each once"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BOTH, **changes)


def test_freezing_contradicts_lora_on_the_backbone() -> None:
    with pytest.raises(ValueError, match=r"freeze_backbone contradicts lora\.parts"):
        dataclasses.replace(SMALL, lora=ON_BACKBONE).with_objective(freeze_backbone=True)
    allowed = dataclasses.replace(SMALL, lora=LoraConfig(parts=("expert",))).with_objective(freeze_backbone=True)
    params, batch = model(allowed)
    total = gradients(params, allowed, batch)["total"]
    assert largest((total.vision, total.backbone)) == 0.0 and not is_zero(updates(total.expert))


def test_settings_survive_json() -> None:
    raw = json.loads(json.dumps(dataclasses.asdict(UNDER)))
    assert config_from_dict(raw) == UNDER != config_from_dict(raw | {"lora": None}) == SMALL
    assert config_from_dict({name: value for name, value in raw.items() if name != "lora"}) == SMALL  # older ones
    with pytest.raises(ValueError, match=r"config: lora: unknown field 'ranc'.*did you mean 'rank'"):
        config_from_dict(raw | {"lora": {"ranc": 3}})


# A run: trained, interrupted, resumed, served.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The settings of a run that is done."""
    folder = tmp_path_factory.mktemp("lora")
    size = TransformerConfig(16, 1, 16, 2, 1, 8)
    settings = TrainConfig(
        run=folder / "whole",
        data=collect(folder / "demos", episodes=2, processes=1).root,
        model=dataclasses.replace(
            TINY,
            vision=VisionConfig(64, (16,), (), width=16, depth=1, mlp_dim=16, num_heads=2),
            backbone=size,
            expert=size,
            max_fast_len=40,
            lora=ON_BACKBONE,
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        steps=4,
        batch_size=2,
        mesh=ONE_DEVICE,
        from_scratch=True,
        held_out_fraction=0.0,
        reading=DataConfig(fast_vocab=512),
        certify=False,  # two more programs to compile
    )
    assert training.train(settings, quiet=True)
    return settings


def test_a_run_resumes_and_serves(finished: TrainConfig) -> None:
    """Interrupted and resumed equals uninterrupted; both load as policies; merged, the policy acts the same."""
    cut = dataclasses.replace(finished, run=finished.run.parent / "cut")
    train_and_interrupt(cut, after=2)
    assert training.train(TrainConfig(run=cut.run, resume=True), quiet=True)

    policy, resumed = Policy.load(finished.run), Policy.load(cut.run)
    assert policy.config.lora == ON_BACKBONE
    assert difference(policy.params, resumed.params) == 0.0
    start = training.start_params(finished, jax.random.split(jax.random.key(0), 3)[0])
    base, trained = rest(start.backbone), by_leaf(policy.params.backbone)
    assert all(np.array_equal(leaf, trained[name]) for name, leaf in base.items())
    assert not any(np.array_equal(leaf, trained[name]) for name, leaf in updates(start.backbone).items())

    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("front", "wrist")}
    seen = {"images": images, "state": np.array([0.0, 0.0, 0.1, 0.0, 1.0], np.float32), "task": "put it there"}
    chunk = policy.act(seen)
    plain = dataclasses.replace(policy.assets, config=dataclasses.replace(policy.config, lora=None))
    assert difference(Policy(merge(policy.params), plain).act(seen), chunk) < CLOSE
    assert np.ptp(chunk) > FAR

    convert_checkpoint(finished.run, finished.run.parent / "exported", "insula")  # merged on the way out
    exported = Policy.load(finished.run.parent / "exported")
    assert exported.config.lora is None and difference(exported.act(seen), chunk) < CLOSE

    both = dataclasses.replace(
        finished,
        run=finished.run.parent / "expert",
        model=dataclasses.replace(exported.config, lora=BOTH),
        from_scratch=False,
        init=finished.run.parent / "exported",
        steps=1,
    )
    both.run.mkdir()
    started = training.start_params(both, jax.random.key(0))  # an expert that was trained may be under LoRA
    assert is_lora(started.expert.layers.query)


def test_a_checkpoint_of_another_rank_is_refused(finished: TrainConfig) -> None:
    with CheckpointStore(finished.run / "checkpoints") as store:
        assets = read_assets(store.assets())
        other = dataclasses.replace(assets.config, lora=dataclasses.replace(ON_BACKBONE, rank=5))
        for config in (other, dataclasses.replace(assets.config, lora=None)):
            with pytest.raises(CheckpointError):
                store.restore("params", abstract_params(config))
