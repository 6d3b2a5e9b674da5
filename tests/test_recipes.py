"""Recipes: who learns from what, on randomized weights and on samples that the recipe itself drew. Beside each zero,
its control."""

import dataclasses
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import settings, write_mixture
from small import SMALL, by_leaf, difference, gradients, jit, largest, model

from insula.batch import LossName
from insula.certificate import gradients as measuring
from insula.certificate.gradients import prove
from insula.certificate.table import PROOF_SCHEMES
from insula.cli import execute
from insula.data.mapping import narrowed, read_mapping
from insula.errors import DatasetError, InputError
from insula.losses import count_scored, draw, share_of_loss
from insula.model.objective import ObjectiveConfig
from insula.model.params import abstract_params
from insula.recipes import RECIPES, find_recipe
from insula.runs.folder import SETTINGS_FILE
from insula.testing import randomize
from insula.train.config import TrainConfig, apply_recipe, read_config
from insula.train.data import fit_assets, open_data, training_mixture
from insula.train.optimizer import make_optimizer
from insula.train.run import measured_kinds, train
from insula.train.step import make_train_state, make_train_step

JOINT = {"knowledge_insulation": False}

# --- γ ---------------------------------------------------------------------------------------------------------------


@cache
def scaled():
    """Gradients of the total with γ as a number of the program's input, as where it changes while training."""

    @jit
    def run(params, batch, gamma):
        draws = draw(SMALL, batch.actions.shape[0], jax.random.key(7))
        whole = count_scored(batch, draws)
        return jax.grad(lambda p: share_of_loss(p, SMALL, batch, draws, whole, gamma)[0])(params)

    return run


@pytest.mark.parametrize(("gamma", "same"), [(0.0, SMALL), (1.0, SMALL.with_objective(**JOINT))])
def test_the_ends_of_gamma_are_insulated_and_joint_to_the_last_bit(gamma: float, same) -> None:
    params, batch = model()
    named = SMALL.with_objective(**JOINT, flow_gradient_scale=gamma)
    wanted = gradients(params, same, batch)
    for loss in ("total", "flow", "fast"):
        assert difference(gradients(params, named, batch)[loss], wanted[loss]) == 0.0
    other = SMALL.with_objective(**JOINT, flow_gradient_scale=0.5)
    assert difference(gradients(params, other, batch)["flow"].backbone, wanted["flow"].backbone) > 0  # the control


def test_gamma_scales_what_reaches_the_backbone_and_nothing_else() -> None:
    params, batch = model()
    whole = gradients(params, SMALL.with_objective(**JOINT), batch)["flow"]
    part = gradients(params, SMALL.with_objective(**JOINT, flow_gradient_scale=0.25), batch)["flow"]
    assert difference(part.expert, whole.expert) == 0.0 < largest(whole.expert)
    for name, leaf in by_leaf((whole.vision, whole.backbone)).items():
        found = by_leaf((part.vision, part.backbone))[name]
        np.testing.assert_allclose(found, 0.25 * leaf, rtol=1e-4, atol=1e-6 * largest(whole))


def test_gamma_that_changes_passes_what_it_says_at_each_update() -> None:
    params, batch = model()
    insulated, joint = gradients(params, SMALL, batch), gradients(params, SMALL.with_objective(**JOINT), batch)
    size = largest(joint["total"])
    for gamma, wanted in ((0.0, insulated), (1.0, joint)):
        assert difference(scaled()(params, batch, jnp.float32(gamma)), wanted["total"]) < 1e-5 * size
    half = scaled()(params, batch, jnp.float32(0.5))
    assert difference(half, insulated["total"]) > 1e-3 * size < difference(half, joint["total"])

    # From joint to insulated in two updates: the first moves what the last leaves alone. No token loss beside it.
    config = SMALL.with_objective(**JOINT, flow_gradient_end=0.0, ki_fast_loss_weight=0.0)
    train_config = TrainConfig(run=Path())
    optimizer = make_optimizer(train_config.optimizer, config, 2)
    step = make_train_step(config, optimizer, None, jax.random.key(0), steps=2)
    state = make_train_state(jax.tree.map(jnp.copy, params), optimizer, averaged=False)
    norms = []
    for _ in range(2):
        state, metrics = step(state, batch)
        norms.append(float(metrics["gradient_norm/backbone"]))
    assert norms[0] > 0 == norms[1]


def test_the_certificate_reports_gamma_and_calls_nothing_between_insulated(monkeypatch: pytest.MonkeyPatch) -> None:
    # All of these are measured as if insulated, by one and the same programs.
    monkeypatch.setattr(measuring, "_make_measure", cache(measuring._make_measure))
    params, batch = model()
    outcomes = {}
    for gamma in (0.0, 0.1, 1.0):
        config = SMALL.with_objective(**JOINT, flow_gradient_scale=gamma)
        outcomes[gamma] = prove(params, config, batch, jax.random.key(3), PROOF_SCHEMES)
    assert [proof.outcome for proof in outcomes.values()] == ["holds", "off", "off"]
    assert outcomes[0.1].findings[0].startswith("knowledge_insulation is off, γ is 0.1: the flow loss reaches vision")
    annealed = SMALL.with_objective(**JOINT, flow_gradient_scale=0.0, flow_gradient_end=0.5)
    assert "γ is 0 to 0.5:" in prove(params, annealed, batch, jax.random.key(3), PROOF_SCHEMES).findings[0]
    mistaken = SMALL.with_objective(mistake="visible_fast")
    found = prove(params, mistaken, batch, jax.random.key(3), PROOF_SCHEMES)
    assert found.outcome == "off" and found.findings == ("the mistake 'visible_fast' is made, as was asked for",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow_gradient_scale": 0.5}, "flow_gradient_scale is 0.5 .* set knowledge_insulation=False"),
        ({"flow_gradient_end": 0.0}, "flow_gradient_end is 0.0, but knowledge_insulation"),
        ({**JOINT, "flow_gradient_scale": 1.5}, "flow_gradient_scale is 1.5, expected a number from 0 to 1"),
        ({**JOINT, "flow_gradient_end": float("nan")}, "flow_gradient_end is nan"),
        ({"mistake": "stop_at_embeddings"}, "set both to False"),
        ({"mistake": "visible"}, "mistake"),
        ({**JOINT, "flow_gradient_scale": 0.0, "ki_fast_loss_weight": 0.0}, "leaves the backbone without any"),
    ],
)
def test_objectives_that_contradict_themselves(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ObjectiveConfig(**changes)


# --- who learns from what --------------------------------------------------------------------------------------------

# Whether the gradient of each loss arrives: of flow on vision, on the backbone's layers, on the expert; of tokens on
# the backbone; of their sum on the expert.
ARRIVES = {
    "insulated": "..FTE",
    "joint": "VLFTE",
    "gamma-0.1": "VLFTE",
    "gamma-0.3": "VLFTE",
    "gamma-annealed": "VLFTE",
    "flow-only": "VLF.E",
    "flow-only-frozen": "..F.E",
    "tokens-only": "...T.",
    "two-stage": "..F.E",
    "embedding-stop": ".LFTE",
    "hybrid-leaky": "..FTE",
    "no-vlm-data": "..FTE",
    "from-scratch": "..FTE",
    "lora": "..FTE",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("recipes"))


def with_recipe(folder: Path, name: str, **changes) -> TrainConfig:
    # Whether what a second stage starts from is there is looked at when the run starts.
    start = Path("tokens") if RECIPES[name].starts_from else None
    config = settings(folder, folder / name, from_scratch=False, init=start)
    return dataclasses.replace(apply_recipe(config, name), **changes)


@pytest.fixture(scope="module")
def drawn(folder: Path):
    """What a recipe draws first, and what learns from it."""

    @cache
    def of(name: str) -> SimpleNamespace:
        config = with_recipe(folder, name)
        data = open_data(config)
        mixture = training_mixture(config, fit_assets(config, data), data)
        batch = jax.tree.map(jnp.asarray, mixture.batch(*mixture.order(config.batch_size, config.seed)[0]))
        params = randomize(abstract_params(config.model), jax.random.key(0))
        return SimpleNamespace(config=config, mixture=mixture, batch=batch, params=params)

    return of


@pytest.mark.parametrize("name", RECIPES)
def test_who_learns_from_what(drawn, name: str) -> None:
    recipe = drawn(name)
    found = gradients(recipe.params, recipe.config.model, recipe.batch)
    flow, fast = found["flow"], found["fast"]
    arrives = (flow.vision, flow.backbone.layers, flow.expert, (fast.vision, fast.backbone), found["total"].expert)
    assert "".join(c if largest(tree) > 0 else "." for c, tree in zip("VLFTE", arrives, strict=True)) == ARRIVES[name]
    assert largest(fast.expert) == 0.0


def test_every_recipe_is_another(drawn) -> None:
    assert set(ARRIVES) == set(RECIPES)
    said = {dataclasses.replace(recipe, name="", about="", source="") for recipe in RECIPES.values()}
    assert len(said) == len(RECIPES)


def test_only_embedding_stop_drops_the_embedding_and_keeps_the_layers_whole(drawn) -> None:
    recipe = drawn("embedding-stop")
    joint = recipe.config.model.with_objective(mistake="none")
    stopped = gradients(recipe.params, recipe.config.model, recipe.batch)["flow"]
    whole = gradients(recipe.params, joint, recipe.batch)["flow"]
    assert largest(stopped.backbone.embedding) == 0.0 < largest(whole.backbone.embedding)
    assert difference(stopped.backbone.layers, whole.backbone.layers) < 1e-5 * largest(whole.backbone.layers)


def test_only_in_hybrid_leaky_the_answer_is_in_sight(drawn) -> None:
    """Other FAST tokens, another flow loss."""

    def moved(name: str) -> float:
        recipe = drawn(name)
        batch, found = recipe.batch, []
        tokens = batch.observation.tokens
        for shown in (tokens, jnp.where(batch.ar_mask, (tokens + 17) % recipe.config.model.vocab_size, tokens)):
            seen = dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, tokens=shown))
            draws = draw(recipe.config.model, shown.shape[0], jax.random.key(1))
            run = jit(lambda p, b, d: share_of_loss(p, recipe.config.model, b, d, count_scored(b, d))[1]["flow"])
            found.append(float(run(recipe.params, seen, draws)))
        return abs(found[0] - found[1])

    assert moved("hybrid-leaky") > 1e-4 and moved("insulated") == 0.0


def test_losses_and_questions_decide_what_is_drawn(drawn) -> None:
    assert "scenes" in drawn("insulated").mixture.sources
    for name in ("flow-only", "flow-only-frozen", "no-vlm-data", "two-stage"):
        assert list(drawn(name).mixture.sources) == ["arm", "cart"]
    assert not drawn("flow-only").batch.loss_mask.any() and drawn("flow-only").batch.action_mask.any()
    assert drawn("tokens-only").batch.loss_mask.any() and not drawn("tokens-only").batch.action_mask.any()


def test_what_is_not_taught_is_not_measured(folder: Path) -> None:
    """A loss of zero for want of anything to score would look like a very good one."""
    for name, kinds in (
        ("insulated", ["flow", "fast", "token_accuracy"]),
        ("flow-only", ["flow"]),
        ("tokens-only", ["fast", "token_accuracy"]),
    ):
        mapping = open_data(with_recipe(folder, name)).mapping
        assert measured_kinds(mapping, "arm") == kinds
    assert measured_kinds(open_data(with_recipe(folder, "insulated")).mapping, "scenes") == kinds


def test_lora_leaves_the_matrices_as_they_are(drawn) -> None:
    recipe = drawn("lora")
    total = by_leaf(gradients(recipe.params, recipe.config.model, recipe.batch)["total"].backbone)
    moving = {name for name, leaf in total.items() if np.any(leaf != 0)}
    assert moving and all("lora" in name or name.split(".")[-1] in ("a", "b") for name in moving), moving


def test_narrowing_a_mapping_says_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    mapping = read_mapping(folder / "data.toml")
    assert narrowed(mapping, tuple(LossName), questions=True) == mapping
    (tmp_path / "data.toml").write_text('[robots.arm]\npath = "arm"\ncameras = {}\nlosses = ["fast"]\n')
    with pytest.raises(DatasetError, match=r"robots\.arm\.losses is fast, and this training has flow alone"):
        narrowed(read_mapping(tmp_path / "data.toml"), (LossName.FLOW,), questions=False)


# --- as settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "joined"], r"no recipe 'joined' .did you mean 'joint'"),
        (
            ["--recipe", "joint", "--model.objective.knowledge-insulation"],
            "recipe 'joint': model.objective.knowl",
        ),
        (["--recipe", "no-vlm-data", "--questions"], "recipe 'no-vlm-data': questions is False, got True; drop one"),
        (
            ["--recipe", "tokens-only", "--losses", "flow", "fast"],
            "recipe 'tokens-only': losses is fast, got flow",
        ),
        (["--recipe", "two-stage"], "starts from a run of 'tokens-only'; train that one first"),
        (["--episodes", "400"], "episodes is 400, but data set .* has 3 that are not held out"),
    ],
)
def test_what_contradicts_a_recipe_is_one_line(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    try:
        code = execute(["train", "--data", str(folder / "data.toml"), "--run", str(tmp_path / "run"), *flags])
    except SystemExit as ended:  # a command line that makes no config is told by tyro
        code = ended.code
    told = capfd.readouterr().err
    assert code in (1, 2) and "Traceback" not in told and not (tmp_path / "run" / SETTINGS_FILE).exists()
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", told).split())), told


def test_a_recipe_is_kept_with_its_run(folder: Path, tmp_path: Path) -> None:
    config = with_recipe(folder, "no-vlm-data", run=tmp_path / "run", from_scratch=True, steps=1, episodes=2)
    assert train(config, quiet=True)
    stored = read_config(tmp_path / "run" / SETTINGS_FILE)
    assert stored.recipe == "no-vlm-data" and stored.episodes == 2 and not stored.questions
    assert stored.losses == tuple(LossName)
    with pytest.raises(InputError, match="recipe"):
        train(dataclasses.replace(stored, recipe="insulated", questions=True, resume=True, steps=2), quiet=True)


def test_fewer_episodes_are_the_first_and_the_held_out_stay(folder: Path) -> None:
    few, all_of_them = (open_data(settings(folder, folder / "few", episodes=n)) for n in (1, None))
    for name in ("arm", "cart"):
        assert few.trained_on(name).tolist() == all_of_them.trained_on(name)[:1].tolist()
        assert few.parts[name].held_out.tolist() == all_of_them.parts[name].held_out.tolist()
    assert len(few.trained_on("scenes")) == len(all_of_them.trained_on("scenes"))


def test_the_list_shows_each(capfd: pytest.CaptureFixture) -> None:
    assert execute(["recipes"]) == 0
    shown = capfd.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" and recipe.about[:30] in shown for name, recipe in RECIPES.items())
    with pytest.raises(InputError, match="did you mean 'insulated'"):
        find_recipe("insulate")
