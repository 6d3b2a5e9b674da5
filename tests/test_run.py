"""A whole run on a small data set: train, interrupt, resume, act, and every way it can be asked for wrongly."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from interrupted import train_and_interrupt
from small import by_leaf, difference

from insula import losses
from insula.certificate.stored import read_certificate
from insula.checkpoints.store import CheckpointStore
from insula.collect.demonstrations import collect
from insula.convert import convert_checkpoint
from insula.data.config import DataConfig
from insula.errors import CheckpointError, DatasetError, InputError, InsulaError, InsulationError
from insula.model.config import TINY, ModelConfig, TransformerConfig, VisionConfig
from insula.model.params import Params, abstract_params, count_params
from insula.parallel.mesh import ONE_DEVICE, MeshConfig, make_mesh
from insula.policy import Policy
from insula.runs.assets import read_assets
from insula.runs.folder import CERTIFICATE_FILE
from insula.train import run as training
from insula.train.config import TrainConfig, read_config, training_preset
from insula.train.data import open_data
from insula.train.optimizer import OptimizerConfig, averaged, make_optimizer
from insula.train.step import abstract_state

SMALL = dataclasses.replace(
    TINY,
    name="small",
    vision=VisionConfig(64, (16,), (), width=16, depth=1, mlp_dim=16, num_heads=2),
    backbone=TransformerConfig(16, 1, 16, 2, 1, 8),
    expert=TransformerConfig(16, 1, 16, 2, 1, 8),
    max_fast_len=40,
)
STEPS = 6
READING = DataConfig(fast_vocab=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(tmp_path_factory.mktemp("data") / "demos", episodes=4, processes=1).root


def settings(data: Path | None, run: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        run=run,
        data=data,
        model=SMALL,
        optimizer=OptimizerConfig(warmup_steps=2),
        steps=STEPS,
        batch_size=4,
        mesh=ONE_DEVICE,
        from_scratch=True,
        held_out_fraction=0.25,
        evaluate_every=3,
        checkpoint_every=3,
        log_every=2,
        reading=READING,
        certify=False,  # two more programs to compile
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert training.train(settings(data, run, certify=True), quiet=True)
    return run


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_params(run: Path, config: ModelConfig) -> Params:
    with CheckpointStore(run / "checkpoints") as store:
        return jax.device_get(store.restore("params", abstract_params(config)))


def test_metrics_hold_losses_norms_and_held_out_figures(finished: Path) -> None:
    found = rows(finished)
    trained = [row for row in found if "flow" in row]
    assert [row["step"] for row in trained] == [2, 3, 4, 6]  # every 2, and before a hook
    assert {"fast", "total", "gradient_norm/vision", "gradient_norm/backbone", "gradient_norm/expert"} <= set(
        trained[0]
    )
    assert all(row["scored_tokens"] > 0 and row["gradient_norm/backbone"] > 0 for row in trained)
    held_out = [row for row in found if "held_out/flow" in row]
    assert [row["step"] for row in held_out] == [3, 6]
    assert held_out[0]["held_out/flow"] != held_out[1]["held_out/flow"]


def test_interrupted_and_resumed_equals_uninterrupted(finished: Path, data: Path, tmp_path: Path) -> None:
    train_and_interrupt(settings(data, tmp_path / "run"), after=4)
    assert training.train(TrainConfig(run=tmp_path / "run", resume=True), quiet=True)
    resumed, whole = final_params(tmp_path / "run", SMALL), final_params(finished, SMALL)
    assert difference(resumed, whole) == 0.0
    with CheckpointStore(finished / "checkpoints") as store:  # the control: not all of it was before the interruption
        assert difference(store.restore("params", abstract_params(SMALL), 3), whole) > 0


def test_a_run_without_an_average(data: Path, tmp_path: Path, finished: Path) -> None:
    """It is trained as one with an average, interrupted or not, and serves its own parameters. No average can be made
    up for it later; one that is there can be dropped, on the way."""
    optimizer = OptimizerConfig(warmup_steps=2, ema_decay=None)
    config = settings(data, tmp_path / "run", optimizer=optimizer)
    train_and_interrupt(config, after=4)
    asked = dataclasses.replace(optimizer, ema_decay=0.9)
    with pytest.raises(InputError, match=r"--optimizer.ema-decay: stored None, got 0.9; this run has no average"):
        training.train(TrainConfig(run=config.run, resume=True, optimizer=asked), quiet=True)
    assert training.train(TrainConfig(run=config.run, resume=True), quiet=True)

    served = final_params(config.run, SMALL)
    assert difference(served, kept_params(finished)) == difference(served, kept_params(config.run)) == 0.0
    assert difference(served, final_params(finished, SMALL)) > 0

    run = tmp_path / "dropped"
    shutil.copytree(finished, run)
    dropped = TrainConfig(run=run, resume=True, optimizer=OptimizerConfig(ema_decay=None), steps=STEPS + 1)
    assert training.train(dropped, quiet=True)
    assert difference(final_params(run, SMALL), kept_params(run)) == 0.0


def kept_params(run: Path) -> Params:
    """Those that are trained, not their average, of a run's newest checkpoint."""
    settings = read_config(run / "train.json")
    mesh, optimizer = make_mesh(ONE_DEVICE), make_optimizer(settings.optimizer, SMALL, settings.steps)
    like = abstract_state(SMALL, optimizer, mesh, averaged(settings.optimizer, SMALL))
    with CheckpointStore(run / "checkpoints") as store:
        return jax.device_get(store.restore("train_state", like).params)


def test_the_preset_small_starts_from_random_weights(tmp_path: Path) -> None:
    """Of 300 M parameters. Control: asked for the embedded backbone it is told that there is none of its size."""
    preset = training_preset("small", tmp_path)
    assert 250e6 < count_params(abstract_params(preset.model)) < 350e6 and preset.from_scratch
    with pytest.raises(CheckpointError, match=r"fits the sizes of the preset 'tiny' only: .*--from-scratch"):
        training.start_params(dataclasses.replace(preset, from_scratch=False), jax.random.key(0))
    with pytest.raises(InputError, match=r"drop one of them \(--no-from-scratch"):
        dataclasses.replace(preset, init=tmp_path)


@pytest.mark.slow  # three trainings to compile
def test_a_run_goes_on_with_other_devices(finished: Path, data: Path, tmp_path: Path) -> None:
    """On four that share the model, then on two that each have it: what one device alone would have trained."""
    run = tmp_path / "run"
    train_and_interrupt(settings(data, run, mesh=MeshConfig(fsdp=4)), after=4)
    assert training.train(TrainConfig(run=run, resume=True, mesh=MeshConfig(data=2, fsdp=1)), quiet=True)

    many, one = (by_leaf(final_params(folder, SMALL)) for folder in (run, finished))
    far = {name: np.abs(many[name] - one[name]).max() for name in one if name != "vision.layers.key.bias"}
    assert max(far.values()) < 2e-5, max(far, key=lambda name: far[name])  # see tests/test_sharding.py

    with pytest.raises(InputError, match="batch_size 4 does not divide into 8 equal parts"):
        training.train(settings(data, tmp_path / "uneven", mesh=MeshConfig()))


@pytest.mark.parametrize("file", ["assets/config.json", "train_state"])
def test_a_damaged_checkpoint_is_set_aside(
    finished: Path, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A run goes on from the one before it, to the same weights; the damaged one is kept. Serving refuses it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "6" / file
    path = path if path.is_file() else max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    if file == "assets/config.json":
        with pytest.raises(InsulaError):
            Policy.load(run)
    assert training.train(TrainConfig(run=run, resume=True), quiet=True)
    assert f"{path.relative_to(run / 'checkpoints' / '6')} has changed; going on from step 3" in caplog.text
    assert difference(final_params(run, SMALL), final_params(finished, SMALL)) == 0.0
    assert (run / "damaged" / "6" / file).exists() and (run / "checkpoints" / "6").is_dir()


def test_where_every_checkpoint_is_damaged_nothing_is_moved(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in ("3", "6"):
        (run / "checkpoints" / step / "assets" / "config.json").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is as it was written: step 6: assets/config\.json has changed; step 3"
    ):
        training.train(TrainConfig(run=run, resume=True), quiet=True)
    assert (run / "checkpoints" / "6").is_dir() and not (run / "damaged").exists()


def test_a_checkpoint_alone_serves(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    (moved / "checkpoints").parent.mkdir()
    (finished / "checkpoints").rename(moved / "checkpoints")
    try:
        policy = Policy.load(moved)
        chunk = policy.act(observation())
        assert chunk.shape == (SMALL.horizon, SMALL.action_dim) and chunk.dtype == np.float32
        assert np.isfinite(chunk).all() and np.ptp(chunk[:, :3]) > 0
        assert np.array_equal(chunk, Policy.load(moved).act(observation()))  # same seed, same first call
        both = policy.act_batch([observation(), observation("put the blue block in the green bowl")])
        assert both.shape == (2, *chunk.shape)
    finally:
        (moved / "checkpoints").rename(finished / "checkpoints")


def observation(task: str = "put the red block in the blue bowl") -> dict:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("front", "wrist")}
    return {"images": images, "state": np.array([0.0, 0.0, 0.1, 0.0, 1.0], np.float32), "task": task}


def test_serving_tokens_are_the_prefix_of_training(finished: Path) -> None:
    policy = Policy.load(finished)
    seen = policy.observe([observation()])
    state = policy.robot.stats["state"].normalize(observation()["state"])
    trained = policy.assets.tokenizer.tokenize(observation()["task"], state, np.zeros((6, 7)))
    prefix = trained.tokens[trained.token_mask & ~trained.ar_mask]
    assert np.array_equal(seen.tokens[0][seen.token_mask[0]], prefix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.array([0, 0, np.nan, 0, 1], np.float32)}, r"state\[2\] is not finite"),
        ({"state": np.zeros(4, np.float32)}, r"state is float32\[4\], expected 5 numbers"),
        ({"images": {"front": np.zeros((64, 64, 3), np.uint8)}}, "'wrist'"),
        ({"images": {n: np.zeros((64, 64, 3), np.float32) for n in ("front", "wrist")}}, r"float32.*expected uint8"),
        ({"task": 3}, "task is int"),
    ],
)
def test_bad_observations_are_refused_by_name(finished: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.load(finished).act(observation() | change)


def test_bad_runs_are_refused_by_name(finished: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data set; give --data"):
        training.train(settings(None, tmp_path / "a"))
    with pytest.raises(DatasetError, match=r"nowhere"):
        training.train(settings(tmp_path / "nowhere", tmp_path / "b"))
    with pytest.raises(CheckpointError, match=r"nothing to resume"):
        training.train(TrainConfig(run=tmp_path / "c", resume=True))
    with pytest.raises(CheckpointError, match=r"resume it, or choose another folder"):
        training.train(settings(data, finished))
    with pytest.raises(ValueError, match=r"state has 5 dimensions.*at most 4.*state_dim=5"):
        training.train(settings(data, tmp_path / "d", model=dataclasses.replace(SMALL, state_dim=4)))
    with pytest.raises(ValueError, match=r"raise it, or lower fast_vocab"):
        training.train(settings(data, tmp_path / "e", model=dataclasses.replace(SMALL, vocab_size=2200)))
    with pytest.raises(DatasetError, match=r"episode \d+, frame \d+.*limit is 4"):
        training.train(settings(data, tmp_path / "f", model=dataclasses.replace(SMALL, max_fast_len=4)))
    with pytest.raises(CheckpointError, match=r"no checkpoints here"):
        Policy.load(tmp_path)


def test_dropping_token_losses_is_counted(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = dataclasses.replace(SMALL, max_fast_len=4)
    config = settings(
        data,
        tmp_path / "run",
        model=model,
        reading=dataclasses.replace(READING, on_overflow="drop_token_loss"),
        steps=2,
    )
    assert training.train(config, quiet=True)
    assert "have no token loss" in caplog.text
    assert np.isfinite(rows(config.run)[0]["flow"])


def test_training_without_a_camera_is_said(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mapping that leaves every camera out is legal, and mostly a mistake."""
    open_data(settings(data, tmp_path / "run"))
    assert "learns to act without seeing" not in caplog.text  # the control
    (tmp_path / "blind.toml").write_text(f'[robots.arm]\npath = "{data}"\ncameras = {{}}\n')
    open_data(settings(tmp_path / "blind.toml", tmp_path / "run"))
    assert "gives arm no camera, so the model learns to act without seeing" in caplog.text


def test_assets_round_trip(finished: Path, tmp_path: Path) -> None:
    with CheckpointStore(finished / "checkpoints") as store:
        assets = read_assets(store.assets())
    assets.write(tmp_path)
    again = read_assets(tmp_path)
    assert again.config == assets.config == SMALL
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["model"]["horizn"] = raw["model"].pop("horizon")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"unknown field 'horizn' .did you mean 'horizon'"):
        read_assets(tmp_path)


def test_a_run_starts_from_a_checkpoint(data: Path, finished: Path, tmp_path: Path) -> None:
    """Its weights, its tokenizers; what is initialized afresh is asked for and recorded."""
    convert_checkpoint(finished, tmp_path / "weights", "insula")
    tokenizers = read_assets(tmp_path / "weights").tokenizer
    config = settings(
        data,
        tmp_path / "run",
        from_scratch=False,
        init=tmp_path / "weights",
        fresh=("expert.action_out.*",),
        reading=DataConfig(
            text_tokenizer=tmp_path / "weights" / "tokenizer" / "text",
            fast=tmp_path / "weights" / "tokenizer" / "fast",
            fast_last_id=tokenizers.fast_last_id,
        ),
        steps=1,
    )
    config.run.mkdir()
    started = training.start_params(config, jax.random.key(0))
    before, after = Policy.load(finished).params, started
    np.testing.assert_array_equal(after.backbone.embedding, before.backbone.embedding)
    assert not np.array_equal(after.expert.action_out.kernel, before.expert.action_out.kernel)
    record = json.loads((config.run / "init.json").read_text())
    assert record["fresh"] == ["expert.action_out.kernel", "expert.action_out.bias"]
    assert "backbone.embedding" in record["loaded"] and not record["leftover"]

    assert training.train(config, quiet=True)
    resumed = TrainConfig(run=config.run, resume=True, steps=2)
    assert training.train(resumed, quiet=True)  # and finds all of it again
    trained = Policy.load(config.run).assets.tokenizer
    assert trained.fast.vocab_size == tokenizers.fast.vocab_size and trained.fast_last_id == tokenizers.fast_last_id
    with pytest.raises(CheckpointError, match=r"missing|expects"):
        training.start_params(dataclasses.replace(config, model=TINY), jax.random.key(0))


# --- the certificate of a checkpoint ----------------------------------------------------------------------------------


def test_every_checkpoint_certifies_its_own_insulation(finished: Path) -> None:
    with CheckpointStore(finished / "checkpoints") as store:
        found = {step: read_certificate(store.assets(step) / CERTIFICATE_FILE) for step in (3, STEPS)}
    for step, certificate in found.items():
        assert certificate["step"] == step and certificate["trained_with"]["knowledge_insulation"]
        assert len(certificate["samples"]) == 4 and "episode" in certificate["samples"][0]
        assert certificate["outcome"] == "holds", certificate["findings"]
        flow = certificate["table"]["vision"]["flow"]
        assert flow["insulated"] == 0 < flow["joint"]
    assert found[3]["table"] != found[STEPS]["table"]


def test_a_run_without_insulation_says_so(data: Path, tmp_path: Path) -> None:
    model = SMALL.with_objective(knowledge_insulation=False)
    config = settings(data, tmp_path / "joint", model=model, steps=2, certify=True)
    assert training.train(config, quiet=True)
    with CheckpointStore(config.run / "checkpoints") as store:
        certificate = read_certificate(store.assets() / CERTIFICATE_FILE)
    assert certificate["trained_with"]["knowledge_insulation"] is False
    assert certificate["outcome"] == "off" and certificate["table"]["vision"]["flow"]["joint"] > 0


def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Insulation that stops nothing."""
    insulate = losses.insulate
    monkeypatch.setattr(losses, "insulate", lambda prefix, columns, scale: insulate(prefix, columns, 1.0))


def test_training_stops_where_insulation_leaks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaking(monkeypatch)
    with pytest.raises(InsulationError, match="leaks; flow loss reaches vision"):
        training.train(settings(data, tmp_path / "leak", certify=True), quiet=True)
