"""LeRobot's PI05 policy directory: config.json, model.safetensors, and the processors around the model."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from insula.checkpoints.openpi import HEAD, openpi_torch_table, unused_head
from insula.checkpoints.paligemma import TORCH_RENAMES
from insula.checkpoints.sources import open_source
from insula.checkpoints.tensor_map import Format, Line
from insula.errors import CheckpointError
from insula.files import write_json
from insula.model.config import PI05, ModelConfig, TransformerConfig

CONFIG, MODEL = "config.json", "model.safetensors"
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
IMAGES, STATE, ACTION = "observation.images.", "observation.state", "action"
TOKENIZER = "google/paligemma-3b-pt-224"
VARIANTS: dict[str, TransformerConfig] = {"gemma_2b": PI05.backbone, "gemma_300m": PI05.expert}
"""The sizes PI05 knows, by its names for them."""


def table(config: ModelConfig) -> list[Line]:
    return [dataclasses.replace(line, theirs=f"model.{line.theirs}") for line in openpi_torch_table(config)]


LEROBOT = Format(
    "LeRobot PI05",
    table,
    renames=TORCH_RENAMES,
    tied=((f"model.{HEAD[0]}", f"model.{HEAD[1]}"),),
    unused=lambda config: {f"model.{name}": shape for name, shape in unused_head(config).items()},
)


Bounds = tuple[np.ndarray, np.ndarray]
"""What −1 and 1 stand for, each [D], in the robot's units; equal where a dimension never moves."""


def read_policy_config(folder: Path) -> ModelConfig:
    """The config of a policy directory. Raises CheckpointError where it is another policy or an unknown variant."""
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("type") != "pi05":
            raise CheckpointError(f"{path}: policy type is {raw.get('type')!r}, expected 'pi05'")
        sizes = {name: VARIANTS[raw.get(name, usual)] for name, usual in _USUAL.items()}
        visual = [name for name, feature in raw["input_features"].items() if feature["type"] == "VISUAL"]
        cameras = [name.removeprefix(IMAGES) for name in visual]
        size = raw.get("image_resolution", [PI05.vision.image_size])[0]
        return dataclasses.replace(
            PI05,
            name="pi05-lerobot",
            vision=dataclasses.replace(PI05.vision, image_size=size),
            backbone=sizes["paligemma_variant"],
            expert=sizes["action_expert_variant"],
            cameras=tuple(cameras) or PI05.cameras,
            max_prompt_len=raw.get("tokenizer_max_length", PI05.max_prompt_len),
            horizon=raw.get("chunk_size", PI05.horizon),
            action_dim=raw.get("max_action_dim", PI05.action_dim),
            state_dim=raw.get("max_state_dim", PI05.state_dim),
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a PI05 config ({type(error).__name__}: {error})") from error


STATE_SPREAD, ACTION_SPREAD = 1.0, 1e-6


def with_range(bounds: Bounds, around_constant: float) -> Bounds:
    """LeRobot and openpi map a constant to −1, we map it to 0: so give it a range for them, wide for a state (a
    deviation stays small) and narrow for an action (the constant comes back)."""
    low, high = bounds
    half = np.where(low == high, around_constant, 0.0)
    return low - half, high + half


def read_bounds(folder: Path) -> dict[str, Bounds] | None:
    """{"state", "actions"} of the preprocessor's statistics; None without them.

    Raises CheckpointError where they are damaged, or normalize otherwise than by quantiles.
    """
    path = folder / f"{PREPROCESSOR}.json"
    if not path.is_file():
        return None
    try:
        steps = {step["registry_name"]: step for step in json.loads(path.read_text(encoding="utf-8"))["steps"]}
        step = steps["normalizer_processor"]
        modes = step["config"]["norm_map"]
        if "state_file" not in step:
            return None
        stats = open_source(folder / Path(step["state_file"]).name)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a LeRobot preprocessor ({type(error).__name__}: {error})") from error
    if modes["STATE"] != "QUANTILES" or modes["ACTION"] != "QUANTILES":
        raise CheckpointError(f"{path} normalizes by {modes}, expected QUANTILES for STATE and ACTION")
    names = {"state": STATE, "actions": ACTION}
    if missing := [f"{n}.{q}" for n in names.values() for q in ("q01", "q99") if f"{n}.{q}" not in stats.entries]:
        raise CheckpointError(f"{stats.path}: no {', '.join(missing)}")
    return {
        ours: (stats.read(f"{theirs}.q01").astype(np.float64), stats.read(f"{theirs}.q99").astype(np.float64))
        for ours, theirs in names.items()
    }


def write_policy_files(folder: Path, config: ModelConfig, state: Bounds, action: Bounds, dtype: str) -> None:
    """All of a policy directory but model.safetensors, readable by LeRobot 0.4 to 0.6.

    Raises CheckpointError where PI05 cannot be this model.
    """
    names = {sizes: name for name, sizes in VARIANTS.items()}
    wrong = [part for part in ("backbone", "expert") if getattr(config, part) not in names]
    wrong += ["time_input"] * (config.time_input != "adarms") + ["state_input"] * (config.state_input != "prompt")
    wrong += ["vision"] * (config.vision != dataclasses.replace(PI05.vision, image_size=config.vision.image_size))
    wrong += ["vocab_size"] * (config.vocab_size != PI05.vocab_size)
    if wrong:
        raise CheckpointError(
            f"LeRobot's PI05 cannot be config {config.name!r}: {', '.join(wrong)} differ; "
            f"it knows {' and '.join(VARIANTS)} of the preset {PI05.name!r}"
        )
    inputs = {IMAGES + name: _feature("VISUAL", 3, *[config.vision.image_size] * 2) for name in config.cameras}
    inputs[STATE] = _feature("STATE", len(state[0]))
    outputs = {ACTION: _feature("ACTION", len(action[0]))}
    policy = {
        "type": "pi05",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": _NORMALIZATION,
        "device": None,
        "paligemma_variant": names[config.backbone],
        "action_expert_variant": names[config.expert],
        "dtype": dtype,
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": max(config.state_dim, len(state[0])),
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "image_resolution": [config.vision.image_size] * 2,
        "tokenizer_max_length": config.max_prompt_len,
    }
    normalizer = {"eps": 1e-8, "features": inputs | outputs, "norm_map": _NORMALIZATION}
    tokenizer = {
        "max_length": config.max_prompt_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": TOKENIZER,
    }
    before = {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        "normalizer_processor": normalizer,
        "pi05_prepare_state_tokenizer_processor_step": {},
        "tokenizer_processor": tokenizer,
        "device_processor": {"device": "cpu", "float_dtype": None},
    }
    after = {
        "unnormalizer_processor": normalizer | {"features": outputs},
        "device_processor": {"device": "cpu", "float_dtype": None},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, policy)
    stats = _quantiles(STATE, with_range(state, STATE_SPREAD)) | _quantiles(ACTION, with_range(action, ACTION_SPREAD))
    _write_processor(folder, PREPROCESSOR, before, stats)
    _write_processor(folder, POSTPROCESSOR, after, stats)


_USUAL = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
_NORMALIZATION = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _quantiles(feature: str, bounds: Bounds) -> dict[str, np.ndarray]:
    return {f"{feature}.{name}": value.astype(np.float32) for name, value in zip(("q01", "q99"), bounds, strict=True)}


def _write_processor(folder: Path, name: str, steps: Mapping[str, Any], stats: dict[str, np.ndarray]) -> None:
    written = []
    for number, (step, settings) in enumerate(steps.items()):
        entry = {"registry_name": step, "config": settings}
        if step.endswith("normalizer_processor"):
            entry["state_file"] = f"{name}_step_{number}_{step}.safetensors"
            save_file(stats, folder / entry["state_file"])
        written.append(entry)
    write_json(folder / f"{name}.json", {"name": name, "steps": written})
