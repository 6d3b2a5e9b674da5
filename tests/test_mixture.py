"""Two robots and questions in one batch: masks, frequencies, a whole run, and what each robot is served."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mixtures import MAPPING, SMALL, settings, write_mixture

from insula.checkpoints.store import CheckpointStore
from insula.data.config import DataConfig
from insula.data.lerobot import LeRobotWriter
from insula.data.lerobot.info import Feature
from insula.data.loader import Loader
from insula.data.mixture import Mixture, Order, quarantined
from insula.decode.flow import sample_actions
from insula.errors import DatasetError
from insula.losses import compute_loss
from insula.model.params import abstract_params
from insula.parallel.mesh import ONE_DEVICE, make_mesh
from insula.policy import Policy
from insula.testing import randomize
from insula.train.config import TrainConfig
from insula.train.data import fit_assets, held_out_sources, open_data, training_mixture
from insula.train.run import make_held_out_losses, make_skipped_log, train
from insula.train.step import TrainState

QUARANTINE = DataConfig(fast_vocab=400, fast_scale=4.0, on_bad_sample="quarantine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def made(folder: Path) -> SimpleNamespace:
    config = settings(folder, folder / "unused")
    data = open_data(config)
    assets = fit_assets(config, data)
    mixture = training_mixture(config, assets, data)
    return SimpleNamespace(config=config, data=data, assets=assets, mixture=mixture)


def row_of(made: SimpleNamespace, name: str, row: int = 0) -> jax.Array:
    """A batch of one sample."""
    source = list(made.mixture.sources).index(name)
    return made.mixture.batch(np.array([source]), np.array([row]))


def test_frequencies_are_the_weights() -> None:
    weights = [3.0, 1.0, 0.5]
    sizes, steps = (900, 400, 100), range(60)
    drawn, rows = map(np.concatenate, zip(*map(Order(sizes, weights, 32, seed=0).__getitem__, steps), strict=True))
    expected = np.array(weights) / sum(weights) * len(drawn)
    assert np.abs(np.bincount(drawn) - expected).max() <= 1.0  # interleaved: better than chance
    for source, size in enumerate(sizes):
        counts = np.bincount(rows[drawn == source], minlength=size)
        assert counts.max() - counts.min() <= 1  # each source whole before any of it again


def test_a_batch_pads_and_masks_what_a_robot_lacks(made: SimpleNamespace) -> None:
    arm, cart, asked = (row_of(made, name) for name in ("arm", "cart", "scenes"))
    assert arm.actions.shape == cart.actions.shape == asked.actions.shape == (1, 6, 4)
    assert arm.action_dim_mask[0].tolist() == [True, True, True, False]
    assert cart.action_dim_mask[0].tolist() == [True, True, False, False]
    assert not arm.action_is_pad[0].any() and cart.action_is_pad[0].tolist() == [False] * 4 + [True] * 2
    assert asked.action_is_pad.all() and not asked.action_mask.any()
    assert not arm.actions[..., 3].any() and not cart.actions[:, 4:].any() and not cart.actions[..., 2:].any()
    assert arm.observation.state[0, :3].all() and not arm.observation.state[0, 3:].any()
    assert not cart.observation.state[0, 2:].any()
    assert [bool(arm.observation.image_mask[c][0]) for c in ("front", "wrist")] == [True, True]
    assert [bool(cart.observation.image_mask[c][0]) for c in ("front", "wrist")] == [True, False]
    assert not cart.observation.images["wrist"].any()
    assert {x.observation.images["front"].shape for x in (arm, cart, asked)} == {(1, 32, 32, 3)}
    for batch in (arm, cart, asked):
        assert batch.loss_mask.any()


def test_pictures_of_several_sizes_are_padded_not_stretched(made: SimpleNamespace) -> None:
    rows = made.mixture.sources["scenes"]
    wide = next(n for n in range(len(rows)) if rows.numbers[n] == 5)
    image = row_of(made, "scenes", wide).observation.images["front"][0]
    assert (image[8:24] == 100).all() and not image[:8].any() and not image[24:].any()  # 20×40 into 32×32


def test_statistics_are_each_robots_own(made: SimpleNamespace) -> None:
    arm, cart = made.assets.robots["arm"], made.assets.robots["cart"]
    assert arm.action_dim == 3 and cart.action_dim == 2 and cart.state_dim == 2 and cart.horizon == 4
    assert cart.stats["actions"].kind == "min_max" and arm.units == {"actions": "rad"}
    cart_actions = np.concatenate([row_of(made, "cart", n).actions[0, :4, :2] for n in range(10)])
    assert np.abs(cart_actions).max() <= 1 + 1e-6  # min and max of what is trained on


def test_delta_actions_are_relative_and_come_back(made: SimpleNamespace) -> None:
    source, robot = made.mixture.sources["arm"], made.assets.robots["arm"]
    frame = source.frames.index[0]
    state, actions = source.frames.state[frame], source.frames.actions[frame : frame + 6]
    chunk = robot.normalize_actions(actions, state)
    learned = robot.stats["actions"].unnormalize(chunk)
    np.testing.assert_allclose(learned[:, :2], actions[:, :2] - state[:2], atol=1e-4)
    np.testing.assert_allclose(learned[:, 2], actions[:, 2], atol=1e-4)
    np.testing.assert_allclose(robot.unnormalize_actions(chunk, state), actions, atol=1e-4)
    clipped = np.clip(chunk, -robot.clip, robot.clip)
    np.testing.assert_allclose(row_of(made, "arm").actions[0, :, :3], clipped, atol=1e-6)


@pytest.fixture(scope="module")
def mixed(made: SimpleNamespace) -> SimpleNamespace:
    """Parameters without a comfortable zero, a batch of all sources, and the losses' gradients."""
    params = randomize(abstract_params(SMALL), jax.random.key(0))
    order = made.mixture.order(8, 0)[0]
    batch = made.mixture.batch(*order)
    assert set(order[0].tolist()) == {0, 1, 2}

    @jax.jit
    def losses(params, batch, actions):
        batch = dataclasses.replace(batch, actions=actions)
        _, metrics = compute_loss(params, SMALL, batch, jax.random.key(1))
        return metrics["flow"], metrics

    gradient, weights = (jax.jit(jax.grad(lambda *xs: losses(*xs)[0], argnums=n)) for n in (2, 0))
    return SimpleNamespace(params=params, batch=batch, order=order, losses=losses, gradient=gradient, weights=weights)


def test_no_loss_and_no_gradient_where_there_is_no_action(mixed: SimpleNamespace) -> None:
    batch, asked = mixed.batch, mixed.order[0] == 2
    gradient = np.asarray(mixed.gradient(mixed.params, batch, jnp.asarray(batch.actions)))
    assert np.abs(gradient[np.asarray(batch.action_mask)]).min() > 0
    assert asked.any() and not gradient[asked].any()
    loud, control = np.array(batch.actions), np.array(batch.actions)
    loud[asked], control[~asked] = 99, 99
    flow = [float(mixed.losses(mixed.params, batch, actions)[0]) for actions in (batch.actions, loud, control)]
    assert flow[0] == flow[1] != flow[2]


@pytest.mark.parametrize(("name", "dims"), [("arm", 3), ("cart", 2), ("scenes", 0)])
def test_padded_dimensions_teach_nothing(mixed: SimpleNamespace, made: SimpleNamespace, name: str, dims: int) -> None:
    """Not one bit of gradient on what produces them, beside dimensions that are taught."""
    batch = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), row_of(made, name))
    gradient = mixed.weights(mixed.params, batch, batch.actions).expert.action_out
    for leaf in (np.asarray(gradient.kernel), np.asarray(gradient.bias)):
        assert not leaf[..., dims:].any() and (np.abs(leaf[..., :dims]) > 0).any(axis=tuple(range(leaf.ndim - 1))).all()


def test_padded_steps_are_not_scored(mixed: SimpleNamespace, made: SimpleNamespace) -> None:
    """The cart's chunks have 4 steps: were the other two real, the loss would differ."""
    batch = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), row_of(made, "cart"))
    unmasked = dataclasses.replace(batch, action_is_pad=np.zeros_like(batch.action_is_pad))
    scored, wrong = (float(mixed.losses(mixed.params, b, b.actions)[0]) for b in (batch, unmasked))
    assert scored > 0 and abs(scored - wrong) > 1e-3


def test_each_kind_of_sample_has_its_losses(mixed: SimpleNamespace, made: SimpleNamespace) -> None:
    def of(name: str) -> dict[str, float]:
        batch = jax.tree.map(lambda x: np.repeat(x, 8, axis=0), row_of(made, name))  # the shape compiled above
        found = mixed.losses(mixed.params, batch, batch.actions)[1]
        return {key: float(value) for key, value in found.items()}

    assert of("scenes")["flow"] == 0 and of("scenes")["fast"] > 0
    assert of("arm")["flow"] > 0 and of("arm")["fast"] > 0


@pytest.mark.parametrize(("losses", "silent"), [(["flow"], "fast"), (["fast"], "flow")])
def test_a_robot_may_teach_one_part_only(folder: Path, tmp_path: Path, losses: list[str], silent: str) -> None:
    text = MAPPING.replace("horizon = 4", f"horizon = 4\nlosses = {json.dumps(losses)}")
    (folder / "one.toml").write_text(text)
    config = settings(folder, tmp_path, data=folder / "one.toml")
    data = open_data(config)
    mixture = training_mixture(config, fit_assets(config, data), data)
    batch = mixture.batch(np.array([1]), np.array([0]))
    assert batch.loss_mask.any() == (silent != "fast") and batch.action_mask.any() == (silent != "flow")


def test_a_mixture_trains_and_serves_each_robot(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(settings(folder, run), quiet=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = next(row for row in rows if any(key.startswith("held_out") for key in row))
    assert {"held_out/arm/flow", "held_out/cart/fast", "held_out/scenes/token_accuracy"} <= set(held_out)
    assert "held_out/scenes/flow" not in held_out
    with pytest.raises(ValueError, match=r"several robots; choose one with robot=: arm, cart"):
        Policy.load(run)
    with pytest.raises(ValueError, match="did you mean 'cart'"):
        Policy.load(run, robot="crat")
    images = {"front": np.zeros((24, 24, 3), np.uint8)}
    cart = Policy.load(run, robot="cart")
    assert cart.act({"images": images, "state": np.zeros(2), "task": "task 0"}).shape == (4, 2)
    arm = Policy.load(run, robot="arm")
    seen = {"images": images | {"wrist": images["front"]}, "task": "task 0"}
    here, there = (arm.act_batch([seen | {"state": np.array([x, 0, 0])}])[0] for x in (0.0, 0.0))
    assert here.shape == (6, 3) and not np.array_equal(here, there)  # another draw of noise
    with pytest.raises(ValueError, match=r"state is float(32|64)\[2\], expected 3 numbers"):
        arm.act(seen | {"state": np.zeros(2)})


def test_a_resumed_mixture_does_not_read_the_mapping_again(folder: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "copy.toml"
    mapping.write_text(MAPPING.replace('path = "', f'path = "{folder}/'))
    config = settings(folder, tmp_path / "run", data=mapping, held_out_fraction=0.0)
    assert train(dataclasses.replace(config, steps=2), quiet=True)
    stored = json.loads((config.run / "train.json").read_text())
    (config.run / "train.json").write_text(json.dumps(stored | {"steps": 4}))
    mapping.write_text("nothing like it")
    assert train(TrainConfig(run=config.run, resume=True), quiet=True)
    with CheckpointStore(config.run / "checkpoints") as store:
        assert store.latest() == 4


def test_values_a_robot_lacks_go_straight_to_zero_when_sampling(mixed: SimpleNamespace) -> None:
    """As in training, where their noisy value is t · noise: whatever the expert says about them changes nothing."""
    observation = jax.tree.map(lambda x: jnp.asarray(x[:2]), mixed.batch.observation)
    noise = jax.random.normal(jax.random.key(5), (2, 6, 4))
    real = np.zeros((6, 4), bool)
    real[:4, :2] = True
    sample = jax.jit(lambda params, real: sample_actions(params, SMALL, observation, noise, 10, real))
    masked = np.asarray(sample(mixed.params, real))
    assert np.abs(masked[:, ~real]).max() < 1e-5
    weight = mixed.params.expert.action_out
    louder = dataclasses.replace(weight, bias=weight.bias.at[2:].add(9.0))
    params = dataclasses.replace(mixed.params, expert=dataclasses.replace(mixed.params.expert, action_out=louder))
    wider = np.zeros((6, 4), bool)
    wider[:, :2] = True
    np.testing.assert_allclose(sample(params, wider), sample(mixed.params, wider), atol=1e-5)
    assert np.abs(np.asarray(sample(params, np.ones((6, 4), bool))) - np.asarray(sample(mixed.params, wider))).max() > 1


# --- bad samples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder: Path, made: SimpleNamespace) -> Iterator[int]:
    """The row of a sample whose picture is cut short."""
    numbers = made.mixture.sources["scenes"].numbers
    row = next(row for row in range(len(numbers)) if numbers[row] < 12)
    path = folder / "questions" / f"{numbers[row]}.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    yield row
    path.write_bytes(whole)


def test_a_bad_sample_fails_by_name_or_is_quarantined(
    made: SimpleNamespace, damaged: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {"scenes": training_mixture(made.config, made.assets, made.data).sources["scenes"]}
    number = sources["scenes"].numbers[damaged] + 1
    every = (np.zeros(len(sources["scenes"]), int), np.arange(len(sources["scenes"])))
    with pytest.raises(DatasetError, match=rf"questions.jsonl, row {number}: unreadable image"):
        Mixture(sources).batch(*every)
    healed = Mixture(sources, on_bad="quarantine", quarantine=tmp_path / "q.jsonl")
    for _ in range(2):
        batch = healed.batch(*every)
    after = (damaged + 1) % len(sources["scenes"])
    np.testing.assert_array_equal(batch.observation.tokens[damaged], batch.observation.tokens[after])
    (line,) = (tmp_path / "q.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == damaged and f"row {number}" in json.loads(line)["where"]
    assert quarantined(healed) == 1 and "quarantined" in caplog.text


def test_workers_quarantine_as_the_thread_does(made: SimpleNamespace, damaged: int, tmp_path: Path) -> None:
    sources = {"scenes": training_mixture(made.config, made.assets, made.data).sources["scenes"]}
    tokens = []
    for workers in (0, 2):
        mixture = Mixture(sources, on_bad="quarantine", quarantine=tmp_path / f"{workers}.jsonl")
        with Loader(mixture, 4, seed=0, workers=workers) as batches:
            tokens.append([next(batches).observation.tokens for _ in range(6)])
        assert quarantined(mixture) == 1
    np.testing.assert_array_equal(*tokens)


def test_a_bad_sample_among_the_held_out_ones(folder: Path, made: SimpleNamespace, tmp_path: Path) -> None:
    unseen = held_out_sources(made.config, made.assets, made.data)
    row = next(n for n in range(len(unseen["scenes"])) if unseen["scenes"].numbers[n] < 12)
    path = folder / "questions" / f"{unseen['scenes'].numbers[row]}.png"
    whole = path.read_bytes()
    path.write_bytes(b"")
    config = dataclasses.replace(made.config, run=tmp_path, reading=QUARANTINE)
    try:
        chosen, mesh = {"scenes": unseen["scenes"]}, make_mesh(ONE_DEVICE)
        look = make_held_out_losses(config, made.data.mapping, chosen, jax.random.key(0), mesh)
        params = randomize(abstract_params(SMALL), jax.random.key(0))
        found = look(TrainState(np.zeros((), np.int32), params, params, ()))
    finally:
        path.write_bytes(whole)
    assert np.isfinite(found["held_out/scenes/fast"])
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["source"] == "held_out/scenes" and json.loads(line)["row"] == row


def test_the_samples_of_a_skipped_update_are_named(made: SimpleNamespace, tmp_path: Path) -> None:
    config = dataclasses.replace(made.config, run=tmp_path)
    mixture = training_mixture(config, made.assets, made.data)
    make_skipped_log(config, mixture)(3)
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    found = json.loads(line)
    source, rows = mixture.order(config.batch_size, config.seed)[2]  # counted from 0
    first = list(mixture.sources.values())[source[0]].where(int(rows[0]))
    assert found["step"] == 3 and len(found["samples"]) == config.batch_size and found["samples"][0] == first


def test_numbers_that_are_no_numbers(tmp_path: Path, folder: Path) -> None:
    rng = np.random.default_rng(0)
    features = {"observation.state": Feature("float32", (2,)), "action": Feature("float32", (2,))}
    with LeRobotWriter(tmp_path / "nan", 10, features) as writer:
        for _ in range(4):
            writer.add_episode({key: rng.normal(size=(8, 2)).astype(np.float32) for key in features}, "task")
    (file,) = (tmp_path / "nan" / "data").rglob("*.parquet")
    table = pq.read_table(file)
    actions = table["action"].to_pylist()
    actions[21][1] = math.nan
    column = table.schema.get_field_index("action")
    pq.write_table(table.set_column(column, "action", pa.array(actions, table.schema.field(column).type)), file)
    (tmp_path / "data.toml").write_text('[robots.r]\npath = "nan"\ncameras = {}\n')
    config = settings(folder, tmp_path / "run", data=tmp_path / "data.toml", held_out_fraction=0.0, steps=1)
    with pytest.raises(ValueError, match=r"episode 2, frame 5: action\[1\] is nan"):
        train(config, quiet=True)
    kept = dataclasses.replace(config, run=tmp_path / "kept", reading=QUARANTINE)
    assert train(kept, quiet=True)
    row = json.loads((kept.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["quarantined"] == 6  # frames 0 to 5: their chunks reach the NaN


def drawn_from(source) -> list[int]:
    """The scenes' pictures or the table's rows."""
    return (source.numbers if hasattr(source, "numbers") else source.frames.index).tolist()


def test_held_out_rows_are_never_drawn(made: SimpleNamespace) -> None:
    unseen = held_out_sources(made.config, made.assets, made.data)
    for name, source in made.mixture.sources.items():
        assert not set(drawn_from(source)) & set(drawn_from(unseen[name]))
