"""Whole conversions: a trained run out to robots' formats and back, and starting a run from a foreign checkpoint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small import SMALL, model
from test_formats import equal, write

from insula import convert as conversion
from insula.checkpoints import lerobot
from insula.checkpoints.lerobot import LEROBOT
from insula.checkpoints.lerobot_steps import HALF_BIN, HUB_TOKENIZER, STATE_SPREAD, with_range
from insula.checkpoints.loading import load_params
from insula.checkpoints.openpi import OPENPI
from insula.checkpoints.paligemma import HUGGING_FACE
from insula.checkpoints.store import CheckpointStore
from insula.checkpoints.writing import foreign_shapes
from insula.convert import convert_checkpoint
from insula.data import normalize as normalize
from insula.data.normalize import NormStats
from insula.data.robot import Robot
from insula.errors import CheckpointError, InputError
from insula.model.config import PI05, PRESETS, ModelConfig, TransformerConfig, VisionConfig
from insula.policy import Policy
from insula.runs.assets import Assets, read_assets
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer, state_bins
from insula.tokens.text import EMBEDDED, embedded

POLICY = dataclasses.replace(
    SMALL,
    name="policy",
    vision=VisionConfig(16, (8,), (), width=16, depth=1, mlp_dim=16, num_heads=2),
    backbone=TransformerConfig(16, 2, 24, 4, 2, 8),
    expert=TransformerConfig(12, 2, 24, 4, 2, 8),
    vocab_size=2800,
    max_prompt_len=32,
    max_fast_len=40,
)
PI0_SMALL = dataclasses.replace(POLICY, name="pi0", state_input="token", time_input="mlp")
STATS = {
    "state": NormStats(np.zeros(2), np.ones(2), np.array([-1.0, 0.5]), np.array([3.0, 0.5])),  # the second never moves
    "actions": NormStats(np.zeros(3), np.ones(3), np.array([-1.0, -2, 0.25]), np.array([1.0, 4, 0.25])),
}
OBSERVATION = {"state": np.array([1.0, 0.5], np.float32), "task": "put it there"} | {
    "images": {name: np.full((16, 16, 3), 99, np.uint8) for name in SMALL.cameras}
}


@pytest.fixture
def small_is_pi05(monkeypatch: pytest.MonkeyPatch) -> None:
    """PI05 in small: what LeRobot and the preset call gemma_2b, gemma_300m and pi05 has these sizes here."""
    pi05 = dataclasses.replace(POLICY, name="pi05")
    monkeypatch.setitem(PRESETS, "pi05", pi05)
    monkeypatch.setattr(lerobot, "PI05", pi05)
    monkeypatch.setattr(conversion, "PI05", dataclasses.replace(pi05, vocab_size=embedded().vocab_size))
    monkeypatch.setattr(lerobot, "VARIANTS", {"gemma_2b": pi05.backbone, "gemma_300m": pi05.expert})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, as training leaves it."""
    return folder_of_run(tmp_path_factory.mktemp("runs") / "run", STATS)


def folder_of_run(
    folder: Path,
    stats: dict[str, NormStats],
    relative: tuple[int, ...] = (),
    config: ModelConfig = POLICY,
    dialect: str = "pi05",
) -> Path:
    chunks = np.random.default_rng(0).uniform(-1, 1, (64, config.horizon, config.action_dim)).astype(np.float32)
    tokenizer = FASTTokenizer(
        embedded(),
        FASTCodec.fit(chunks, 400, 5.0),
        dialect,
        max_token_len=config.max_token_len,
        max_prompt_len=config.max_prompt_len,
    )
    config = dataclasses.replace(config, state_dim=max(config.state_dim, stats["state"].dim))
    assets = Assets(config, tokenizer, {"arm": Robot(stats, config.cameras, config.horizon, relative)})
    with CheckpointStore(folder / "checkpoints") as store:
        store.save(1, {"step": np.zeros(())}, lambda state: model(config)[0], assets.write)
    return folder


def weights_of(path: Path, config: ModelConfig = POLICY) -> object:
    return load_params(path, config, jax.random.key(0))[0]


def test_a_run_becomes_a_policy_that_acts_the_same(run: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(run, tmp_path / "out", "insula")
    assert len(report.loaded) == len(jax.tree.leaves(model(POLICY)[0])) and not report.fresh
    expected = Policy.load(run).act(OBSERVATION)
    np.testing.assert_array_equal(Policy.load(tmp_path / "out").act(OBSERVATION), expected)
    assert not np.array_equal(Policy.load(tmp_path / "out", seed=1).act(OBSERVATION), expected)
    assert read_assets(tmp_path / "out").config == POLICY


@pytest.mark.usefixtures("small_is_pi05")
@pytest.mark.parametrize("to", ["lerobot", "openpi"])
def test_out_to_a_robot_and_back(to: str, run: Path, tmp_path: Path) -> None:
    convert_checkpoint(run, tmp_path / "there", to)
    assert equal(weights_of(tmp_path / "there"), model(POLICY)[0])
    convert_checkpoint(tmp_path / "there", tmp_path / "back", "insula")
    assert equal(weights_of(tmp_path / "back"), model(POLICY)[0])
    stats = normalize.load_stats(tmp_path / "back" / "norm_stats.json")
    for name, value in (("state", [1.0, 0.5]), ("actions", [0.3, 1, 0.25])):
        there, here = stats[name].normalize(np.array(value)), STATS[name].normalize(np.array(value))
        np.testing.assert_allclose(there[:-1], here[:-1], atol=1e-5)
        # A constant state lies in the middle of the bin it has here, a constant action at 0.
        middle = HALF_BIN if name == "state" else 0.0
        assert stats[name].normalize(np.array(value))[-1] == pytest.approx(middle, abs=1e-6)
    constant = stats["actions"].unnormalize(np.array([0.0, 0.0, 0.9]))
    assert constant[-1] == pytest.approx(0.25, abs=1e-5)


@pytest.mark.usefixtures("small_is_pi05")
def test_the_lerobot_directory_is_whole(run: Path, tmp_path: Path) -> None:
    """Every file, key, shape and field of a PI05 policy, and none besides."""
    convert_checkpoint(run, tmp_path / "policy", "lerobot", dtype="bfloat16")
    files = {path.name: path for path in (tmp_path / "policy").iterdir()}
    before, after = (
        "policy_preprocessor_step_2_normalizer_processor",
        "policy_postprocessor_step_0_unnormalizer_processor",
    )
    assert files.keys() == {
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        f"{before}.safetensors",
        "policy_postprocessor.json",
        f"{after}.safetensors",
        "tokenizer",
    }
    config = json.loads(files["config.json"].read_text())
    assert config.keys() <= PI05_FIELDS and config["type"] == "pi05"
    assert (config["chunk_size"], config["n_action_steps"], config["tokenizer_max_length"]) == (4, 4, 32)
    assert (config["max_action_dim"], config["max_state_dim"]) == (3, 2)
    assert config["input_features"] == {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 16, 16]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 16, 16]},
        "observation.state": {"type": "STATE", "shape": [2]},
    }
    assert config["output_features"] == {"action": {"type": "ACTION", "shape": [3]}}
    assert config["normalization_mapping"] == {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}

    stored = load_file(files["model.safetensors"])
    assert {name: value.shape for name, value in stored.items()} == foreign_shapes(LEROBOT, POLICY)
    assert {str(value.dtype) for value in stored.values()} == {"bfloat16"}
    assert not stored["model.paligemma_with_expert.gemma_expert.lm_head.weight"].any()  # PI05 has it and never reads it

    first = json.loads(files["policy_preprocessor.json"].read_text())
    assert [step["registry_name"] for step in first["steps"]] == [
        "rename_observations_processor",
        "to_batch_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "tokenizer_processor",
        "device_processor",
    ]
    assert first["name"] == "policy_preprocessor"
    assert first["steps"][2]["state_file"] == f"{before}.safetensors"
    assert first["steps"][3]["config"] == {"max_state_dim": 2}
    assert first["steps"][4]["config"]["tokenizer_name"] == str(files["tokenizer"].resolve())
    assert {path.name for path in files["tokenizer"].iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    last = json.loads(files["policy_postprocessor.json"].read_text())
    assert [step["registry_name"] for step in last["steps"]] == ["unnormalizer_processor", "device_processor"]
    assert last["steps"][0]["config"]["features"] == config["output_features"]
    stats = load_file(files[f"{after}.safetensors"])
    assert {name: value.tolist() for name, value in stats.items() if name.startswith("observation")} == {
        "observation.state.q01": [-1.0, -0.5 - 1 / 256],
        "observation.state.q99": [3.0, 1.5 - 1 / 256],
    }
    assert stats["action.q01"].shape == (3,) and all(value.dtype == np.float32 for value in stats.values())


_FIELDS = """
type n_obs_steps input_features output_features device use_amp push_to_hub repo_id private tags license
paligemma_variant action_expert_variant dtype chunk_size n_action_steps max_state_dim max_action_dim num_inference_steps
time_sampling_beta_alpha time_sampling_beta_beta time_sampling_scale time_sampling_offset min_period max_period
image_resolution empty_cameras tokenizer_max_length normalization_mapping gradient_checkpointing compile_model
compile_mode optimizer_lr optimizer_betas optimizer_eps optimizer_weight_decay optimizer_grad_clip_norm
scheduler_warmup_steps scheduler_decay_steps scheduler_decay_lr rtc_config
"""
PI05_FIELDS = set(_FIELDS.split())
"""What PI05's config has in every release since 0.4; it refuses any other key."""


def test_full_size_pi05_is_what_lerobot_knows(tmp_path: Path) -> None:
    bounds = (np.zeros(7), np.ones(7))
    lerobot.write_policy_files(tmp_path, PI05, bounds, bounds, "bfloat16")
    config = lerobot.read_policy_config(tmp_path)
    assert dataclasses.replace(config, name="pi05") == PI05
    with pytest.raises(CheckpointError, match=r"cannot be config 'policy': backbone, expert, vision, vocab_size"):
        lerobot.write_policy_files(tmp_path, POLICY, bounds, bounds, "bfloat16")
    with pytest.raises(CheckpointError, match=r"'pi0': time_input, state_input differ"):
        lerobot.write_policy_files(tmp_path, PRESETS["pi0"], bounds, bounds, "bfloat16")


@pytest.mark.usefixtures("small_is_pi05")
def test_another_tokenizer_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "PI05", PI05)
    for to in ("openpi", "lerobot"):
        with pytest.raises(CheckpointError, match="this policy has 2,176 in 'pi05'"):
            convert_checkpoint(run, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_is_pi05")
def test_statistics_must_come_from_somewhere(tmp_path: Path) -> None:
    source = write(OPENPI, POLICY, tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"no normalization statistics.*--norm-stats"):
        convert_checkpoint(source, tmp_path / "out", "lerobot")
    normalize.save_stats(tmp_path / "stats.json", STATS)
    convert_checkpoint(source, tmp_path / "out", "lerobot", norm_stats=tmp_path / "stats.json")
    assert equal(weights_of(tmp_path / "out"), model(POLICY)[0])


@pytest.mark.usefixtures("small_is_pi05")
def test_a_source_without_tokenizer_names_the_hub_unless_one_is_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write(OPENPI, POLICY, tmp_path / "source")
    normalize.save_stats(tmp_path / "stats.json", STATS)
    convert_checkpoint(source, tmp_path / "hub", "lerobot", norm_stats=tmp_path / "stats.json")
    assert preprocessor(tmp_path / "hub")["tokenizer_processor"]["tokenizer_name"] == HUB_TOKENIZER
    assert "give --text-tokenizer" in caplog.text

    given = {"norm_stats": tmp_path / "stats.json", "text_tokenizer": EMBEDDED}
    convert_checkpoint(source, tmp_path / "own", "lerobot", **given)
    folder = preprocessor(tmp_path / "own")["tokenizer_processor"]["tokenizer_name"]
    assert (Path(folder) / "tokenizer.json").is_file()


@pytest.mark.usefixtures("small_is_pi05")
def test_a_run_keeps_its_own_tokenizer(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--text-tokenizer: .* was trained with its own"):
        convert_checkpoint(run, tmp_path / "out", "lerobot", text_tokenizer=EMBEDDED)
    for to in ("insula", "openpi"):
        with pytest.raises(InputError, match=f"only a LeRobot directory holds one, not {to}"):
            convert_checkpoint(run, tmp_path / "out", to, text_tokenizer=EMBEDDED)


def preprocessor(folder: Path) -> dict[str, Any]:
    steps = json.loads((folder / "policy_preprocessor.json").read_text())["steps"]
    return {step["registry_name"]: step["config"] for step in steps}


def text_there(state: np.ndarray, low: np.ndarray, high: np.ndarray, around: np.ndarray) -> list[int]:
    """What LeRobot and openpi write for a state, in float32 as they compute; `around` is a measurement's noise."""
    low, high = low.astype(np.float32), high.astype(np.float32)
    normalized = 2 * ((state + around).astype(np.float32) - low) / (high - low) - 1
    return (np.digitize(normalized, np.linspace(-1, 1, 257)[:-1]) - 1).tolist()


def test_a_state_is_the_same_text_there() -> None:
    """Also a dimension that never moves: at the border of two bins its text would depend on rounding."""
    rng = np.random.default_rng(0)
    middle, half = rng.normal(0, 3, 200), np.where(np.arange(200) % 2, rng.uniform(0.1, 2, 200), 0)
    stats = NormStats(middle, half, middle - half, middle + half)
    state = middle + half * (2 * rng.integers(0, 256, 200) + 1 - 256) / 256  # in the middle of a bin
    ours = state_bins(stats.normalize(state))

    shifted = with_range(stats.bounds(), STATE_SPREAD, HALF_BIN)
    centered = with_range(stats.bounds(), STATE_SPREAD)
    for noise in rng.normal(0, 1e-5, (20, 200)):
        assert text_there(state, *shifted, noise) == ours
    assert any(text_there(state, *centered, noise) != ours for noise in rng.normal(0, 1e-5, (20, 200)))  # the control


@pytest.mark.usefixtures("small_is_pi05")
def test_actions_that_count_from_the_state_say_so(tmp_path: Path) -> None:
    """LeRobot's rule, written out: a dimension is relative unless one of the words excluded is in its name."""
    source = folder_of_run(tmp_path / "run", wide_state(), relative=(0, 2))
    convert_checkpoint(source, tmp_path / "out", "lerobot")
    step = preprocessor(tmp_path / "out")["relative_actions_processor"]
    assert step.pop("enabled") is True
    mask = [not any(word in name for word in step["exclude_joints"]) for name in step["action_names"]]
    assert mask == [True, False, True]

    before = json.loads((tmp_path / "out" / "policy_preprocessor.json").read_text())["steps"]
    after = json.loads((tmp_path / "out" / "policy_postprocessor.json").read_text())["steps"]
    assert [s["registry_name"] for s in before][2:4] == ["relative_actions_processor", "normalizer_processor"]
    assert [s["registry_name"] for s in after][:2] == ["unnormalizer_processor", "absolute_actions_processor"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.keys() - PI05_FIELDS == {"use_relative_actions", "relative_exclude_joints", "action_feature_names"}
    assert (config["use_relative_actions"], config["relative_exclude_joints"]) == (True, step["exclude_joints"])


@pytest.mark.usefixtures("small_is_pi05")
def test_relative_actions_are_never_lost_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    narrow = folder_of_run(tmp_path / "narrow", STATS, relative=(0,))
    with pytest.raises(CheckpointError, match=r"actions \[0\] count from the state.*state has 2, action 3"):
        convert_checkpoint(narrow, tmp_path / "refused", "lerobot")
    assert not (tmp_path / "refused").exists()

    wide = folder_of_run(tmp_path / "wide", wide_state(), relative=(1,))
    convert_checkpoint(wide, tmp_path / "openpi", "openpi")
    assert "actions [1] count from the state; openpi's files cannot say so" in caplog.text
    convert_checkpoint(wide, tmp_path / "lerobot", "lerobot")
    convert_checkpoint(tmp_path / "lerobot", tmp_path / "back", "insula")
    assert "its actions count from the state" in caplog.text


def wide_state() -> dict[str, NormStats]:
    return STATS | {"state": STATS["actions"]}


def test_pi0_leaves_with_its_own_dialect_and_z_scores(tmp_path: Path) -> None:
    """openpi's π0 computes (x − mean) / std, whatever kind of statistics the model here was trained with."""
    entries = embedded().vocab_size
    config = dataclasses.replace(PI0_SMALL, vocab_size=entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "PI05", config)
        patch.setitem(PRESETS, "pi0", config)
        with pytest.raises(CheckpointError, match=r"in the dialect 'pi0', .* this policy has 2,176 in 'pi05'"):
            convert_checkpoint(folder_of_run(tmp_path / "other", STATS, config=config), tmp_path / "no", "openpi")

        source = folder_of_run(tmp_path / "run", STATS, config=config, dialect="pi0")
        convert_checkpoint(source, tmp_path / "out", "openpi")
        assert equal(weights_of(tmp_path / "out", config), model(config)[0])
        convert_checkpoint(tmp_path / "out", tmp_path / "back", "insula", preset_name="pi0")

    raw = json.loads((tmp_path / "out" / "assets" / "insula" / "norm_stats.json").read_text())["norm_stats"]
    for part, values in (("state", [2.0, 0.5]), ("actions", [0.3, -1.0, 0.25])):
        mean, std = np.array(raw[part]["mean"]), np.array(raw[part]["std"])
        np.testing.assert_allclose((values - mean) / std, STATS[part].normalize(np.array(values)), atol=1e-6)
    assert all(
        part.kind == "quantiles" for part in normalize.load_stats(tmp_path / "back" / "norm_stats.json").values()
    )


def test_openpi_files_of_pi0_are_z_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norm_stats.json of both models look alike; how they are meant belongs to the model."""
    raw = {"mean": [1.0, 2.0], "std": [0.5, 0.5], "q01": [-9.0, -9.0], "q99": [9.0, 9.0]}
    for name, config, kind in (("pi05", POLICY, "quantiles"), ("pi0", PI0_SMALL, "mean_std")):
        monkeypatch.setitem(PRESETS, name, config)
        source = write(OPENPI, config, tmp_path / name)
        (source / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": raw, "actions": raw}}))
        convert_checkpoint(source, tmp_path / f"{name}-out", "insula", preset_name=name)
        assert normalize.load_stats(tmp_path / f"{name}-out" / "norm_stats.json")["state"].kind == kind


def test_what_is_there_is_not_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        convert_checkpoint(run, tmp_path, "insula")


@pytest.mark.usefixtures("small_is_pi05")
def test_a_config_of_another_policy_is_named(run: Path, tmp_path: Path) -> None:
    convert_checkpoint(run, tmp_path / "out", "lerobot")
    path = tmp_path / "out" / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"paligemma_variant": "gemma_9b"}))
    with pytest.raises(CheckpointError, match=r"config\.json: paligemma_variant is .gemma_9b., expected one of"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", "insula")


def test_an_incomplete_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "pi05", POLICY)
    source = write(HUGGING_FACE, POLICY, tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"missing .*--fresh"):
        convert_checkpoint(source, tmp_path / "out", "insula")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_write_leaves_no_half_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(run, tmp_path / "out", "insula")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        Policy.load(tmp_path / "out")


def test_a_damaged_export_is_named(run: Path, tmp_path: Path) -> None:
    convert_checkpoint(run, tmp_path / "out", "insula")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["expert.action_out.bias"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"expert\.action_out\.bias"):
        Policy.load(tmp_path / "out")
