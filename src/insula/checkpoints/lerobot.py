"""LeRobot's PI05 policy directory: `config.json` and `model.safetensors`, readable by LeRobot 0.4 to 0.6.

The processors around the model, which hold its statistics and its tokenizer, are in `lerobot_steps`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from insula.checkpoints.lerobot_steps import (
    ACTION,
    HUB_TOKENIZER,
    NORMALIZATION,
    STATE,
    Bounds,
    relative_names,
    write_processors,
)
from insula.checkpoints.openpi import HEAD, openpi_torch_table, unused_head
from insula.checkpoints.paligemma import TORCH_RENAMES
from insula.checkpoints.sources import read_settings
from insula.checkpoints.tensor_map import Format, Line
from insula.errors import CheckpointError
from insula.files import write_json
from insula.model.config import PI05, ModelConfig, TransformerConfig

CONFIG, MODEL = "config.json", "model.safetensors"
IMAGES = "observation.images."
VARIANTS: dict[str, TransformerConfig] = {"gemma_2b": PI05.backbone, "gemma_300m": PI05.expert}
"""The sizes PI05 knows, by its names for them."""


def table(config: ModelConfig) -> list[Line]:
    """openpi's PyTorch model, one module deeper."""
    return [dataclasses.replace(line, theirs=f"model.{line.theirs}") for line in openpi_torch_table(config)]


LEROBOT = Format(
    "LeRobot PI05",
    table,
    renames=TORCH_RENAMES,
    tied=((f"model.{HEAD[0]}", f"model.{HEAD[1]}"),),
    unused=lambda config: {f"model.{name}": shape for name, shape in unused_head(config).items()},
)

_USUAL = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}


def read_policy_config(folder: Path) -> ModelConfig:
    """The config of a policy directory. Raises CheckpointError where it is another policy or an unknown variant."""
    path = folder / CONFIG
    raw = read_settings(path)
    if raw.get("type") != "pi05":
        raise CheckpointError(f"{path}: policy type is {raw.get('type')!r}, expected 'pi05'")

    sizes = {}
    for name, usual in _USUAL.items():
        if raw.get(name, usual) not in list(VARIANTS):
            raise CheckpointError(f"{path}: {name} is {raw[name]!r}, expected one of {', '.join(VARIANTS)}")
        sizes[name] = VARIANTS[raw.get(name, usual)]

    features = raw.get("input_features")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise CheckpointError(f"{path}: input_features is no table of features; not a PI05 config")
    cameras = [name.removeprefix(IMAGES) for name, feature in features.items() if feature.get("type") == "VISUAL"]

    resolution = raw.get("image_resolution", [PI05.vision.image_size] * 2)
    if not isinstance(resolution, list) or len(resolution) != 2 or resolution[0] != resolution[1]:
        raise CheckpointError(f"{path}: image_resolution is {resolution!r}, expected a square, such as [224, 224]")

    return dataclasses.replace(
        PI05,
        name="pi05-lerobot",
        vision=dataclasses.replace(PI05.vision, image_size=_whole(resolution[0], "image_resolution", path)),
        backbone=sizes["paligemma_variant"],
        expert=sizes["action_expert_variant"],
        cameras=tuple(cameras) or PI05.cameras,
        max_prompt_len=_whole(raw.get("tokenizer_max_length", PI05.max_prompt_len), "tokenizer_max_length", path),
        horizon=_whole(raw.get("chunk_size", PI05.horizon), "chunk_size", path),
        action_dim=_whole(raw.get("max_action_dim", PI05.action_dim), "max_action_dim", path),
        state_dim=_whole(raw.get("max_state_dim", PI05.state_dim), "max_state_dim", path),
    )


def write_policy_files(
    folder: Path,
    config: ModelConfig,
    state: Bounds,
    action: Bounds,
    dtype: str,
    relative: tuple[int, ...] = (),
    tokenizer: str = HUB_TOKENIZER,
) -> None:
    """All of a policy directory but model.safetensors.

    `relative` are the action dimensions that count from the state of the same number; `tokenizer` is a folder that
    AutoTokenizer reads, or a name on the hub. Raises CheckpointError where PI05 cannot be this model.
    """
    refuse_other_sizes(config)

    inputs = {IMAGES + name: _feature("VISUAL", 3, *[config.vision.image_size] * 2) for name in config.cameras}
    inputs[STATE] = _feature("STATE", len(state[0]))
    outputs = {ACTION: _feature("ACTION", len(action[0]))}
    sizes = {size: name for name, size in VARIANTS.items()}
    policy = {
        "type": "pi05",
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": NORMALIZATION,
        "device": None,
        "paligemma_variant": sizes[config.backbone],
        "action_expert_variant": sizes[config.expert],
        "dtype": dtype,
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "max_state_dim": max(config.state_dim, len(state[0])),
        "max_action_dim": config.action_dim,
        "num_inference_steps": 10,
        "image_resolution": [config.vision.image_size] * 2,
        "tokenizer_max_length": config.max_prompt_len,
    }
    # Older releases refuse a key they do not know, so these are there only where they mean something.
    if relative:
        names, absolute = relative_names(relative, len(state[0]), len(action[0]))
        policy |= {"use_relative_actions": True, "relative_exclude_joints": absolute, "action_feature_names": names}

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, policy)
    write_processors(folder, policy, state, action, relative, tokenizer)


def refuse_other_sizes(config: ModelConfig) -> None:
    """Raises CheckpointError naming everything in which the model differs from what PI05 can be."""
    wrong = [part for part in ("backbone", "expert") if getattr(config, part) not in VARIANTS.values()]
    wrong += ["time_input"] * (config.time_input != "adarms") + ["state_input"] * (config.state_input != "prompt")
    wrong += ["vision"] * (config.vision != dataclasses.replace(PI05.vision, image_size=config.vision.image_size))
    wrong += ["vocab_size"] * (config.vocab_size != PI05.vocab_size)
    if wrong:
        raise CheckpointError(
            f"LeRobot's PI05 cannot be config {config.name!r}: {', '.join(wrong)} differ; "
            f"it knows {' and '.join(VARIANTS)} of the preset {PI05.name!r}"
        )


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _whole(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or not 0 < value < 2**20:
        raise CheckpointError(f"{path}: {name} is {value!r}, expected a whole number from 1 to {2**20 - 1}")
    return value
