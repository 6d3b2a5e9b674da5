"""The processors around LeRobot's PI05: what turns a robot's numbers into the model's and back.

    policy_preprocessor.json     relative actions (where there are), normalizer, prompt, tokenizer
    policy_postprocessor.json    the inverse: unnormalizer, absolute actions

Their steps must write exactly the prompt this model was trained on. How LeRobot bins a state in its prompt:
`np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1`, so 0 lies on the border of the bins 127 and 128.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from insula.checkpoints.sources import open_source, read_settings
from insula.errors import CheckpointError
from insula.files import is_named, write_json

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
STATE, ACTION = "observation.state", "action"
NORMALIZATION = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
HUB_TOKENIZER = "google/paligemma-3b-pt-224"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"

Bounds = tuple[np.ndarray, np.ndarray]
"""What −1 and 1 stand for, each [D], in the robot's units; equal where a dimension never moves."""
STATE_SPREAD, ACTION_SPREAD = 1.0, 1e-6
HALF_BIN = 1 / 256
"""Of the 256 bins over [−1, 1]."""


def with_range(bounds: Bounds, around_constant: float, centered: float = 0.0) -> Bounds:
    """LeRobot and openpi map a constant to −1, we map it to 0: so give it a range for them, wide for a state (a
    deviation stays small) and narrow for an action (the constant comes back). The constant becomes `centered` there:
    HALF_BIN puts it into the middle of the bin that we write for it, where rounding cannot move it to the next."""
    low, high = bounds
    constant = low == high
    half = np.where(constant, around_constant, 0.0)
    shift = centered * half
    return low - half - shift, high + half - shift


def relative_names(relative: tuple[int, ...], state_dim: int, action_dim: int) -> tuple[list[str], list[str]]:
    """Names [action_dim] by which LeRobot tells the dimensions that count from the state, and those it leaves out.

    It knows them by name alone, so the names say nothing else. Raises CheckpointError for what it cannot express: it
    adds the whole state to the whole action.
    """
    if state_dim < action_dim:
        raise CheckpointError(
            f"actions {list(relative)} count from the state, which LeRobot can only do where the state has all "
            f"dimensions of the action: state has {state_dim}, action {action_dim}"
        )
    absolute = "absolute"
    return [f"{'relative' if dim in relative else absolute}_{dim}" for dim in range(action_dim)], [absolute]


def write_processors(
    folder: Path,
    policy: Mapping[str, Any],
    state: Bounds,
    action: Bounds,
    relative: tuple[int, ...],
    tokenizer: str,
) -> None:
    """Both processors and the statistics they load, for the policy that `policy`, its config.json, describes. Raises
    CheckpointError as `relative_names`."""
    inputs, outputs = policy["input_features"], policy["output_features"]
    normalizer = {"eps": 1e-8, "features": inputs | outputs, "norm_map": NORMALIZATION}
    device = {"device": "cpu", "float_dtype": None}

    # Without a number the prompt step of 0.4 pads the state to 32, and writes a bin for each of them.
    prompt = {"max_state_dim": len(state[0])}
    ids = {
        "max_length": policy["tokenizer_max_length"],
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": tokenizer,
    }

    # Before the normalizer, whose statistics are those of relative actions; and after its inverse.
    from_state, to_absolute = {}, {}
    if relative:
        names, absolute = relative_names(relative, len(state[0]), len(action[0]))
        from_state[RELATIVE] = {"enabled": True, "exclude_joints": absolute, "action_names": names}
        to_absolute[ABSOLUTE] = {"enabled": True}

    before = {
        "rename_observations_processor": {"rename_map": {}},
        "to_batch_processor": {},
        **from_state,
        "normalizer_processor": normalizer,
        "pi05_prepare_state_tokenizer_processor_step": prompt,
        "tokenizer_processor": ids,
        "device_processor": device,
    }
    after = {
        "unnormalizer_processor": normalizer | {"features": outputs},
        **to_absolute,
        "device_processor": device,
    }

    stats = _quantiles(STATE, with_range(state, STATE_SPREAD, HALF_BIN))
    stats |= _quantiles(ACTION, with_range(action, ACTION_SPREAD))
    _write_processor(folder, PREPROCESSOR, before, stats)
    _write_processor(folder, POSTPROCESSOR, after, stats)


def _quantiles(feature: str, bounds: Bounds) -> dict[str, np.ndarray]:
    return {f"{feature}.{name}": value.astype(np.float32) for name, value in zip(("q01", "q99"), bounds, strict=True)}


def _write_processor(folder: Path, name: str, steps: Mapping[str, Any], stats: dict[str, np.ndarray]) -> None:
    written = []
    for number, (step, settings) in enumerate(steps.items()):
        entry = {"registry_name": step, "config": settings}
        if step.endswith("normalizer_processor"):
            entry["state_file"] = f"{name}_step_{number}_{step}.safetensors"
            save_file(stats, folder / entry["state_file"])  # each its own copy: LeRobot looks for the step's number
        written.append(entry)

    write_json(folder / f"{name}.json", {"name": name, "steps": written})


def read_bounds(folder: Path) -> dict[str, Bounds] | None:
    """{"state", "actions"} of the preprocessor's statistics; None without them.

    Raises CheckpointError where they are damaged, or normalize otherwise than by quantiles.
    """
    path = folder / f"{PREPROCESSOR}.json"
    step = _steps(path).get("normalizer_processor") if is_named(path) else None
    if step is None or "state_file" not in step:
        return None

    modes = step["config"].get("norm_map")
    if not isinstance(modes, dict) or any(modes.get(part) != "QUANTILES" for part in ("STATE", "ACTION")):
        raise CheckpointError(f"{path} normalizes by {modes}, expected QUANTILES for STATE and ACTION")

    stats = open_source(folder / Path(str(step["state_file"])).name)
    found = {}
    for ours, theirs in (("state", STATE), ("actions", ACTION)):
        names = [f"{theirs}.{quantile}" for quantile in ("q01", "q99")]
        if missing := [name for name in names if name not in stats.entries]:
            raise CheckpointError(f"{stats.path}: no {', '.join(missing)}")
        low, high = (stats.read(name).astype(np.float64) for name in names)
        if low.ndim != 1 or low.shape != high.shape or not np.isfinite([low, high]).all() or (high < low).any():
            raise CheckpointError(f"{stats.path}: {' and '.join(names)} are no ranges of one robot's dimensions")
        found[ours] = low, high

    return found


def counts_from_state(folder: Path) -> bool:
    """Whether the policy's actions are relative to the state."""
    path = folder / f"{PREPROCESSOR}.json"
    step = _steps(path).get(RELATIVE) if is_named(path) else None
    return step is not None and step["config"].get("enabled") is True


def _steps(path: Path) -> dict[str, dict[str, Any]]:
    """The steps of a processor by their names, each with the object "config"."""
    steps = read_settings(path, "steps")["steps"]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise CheckpointError(f"{path}: steps is no list of steps; not a LeRobot processor")

    named = {}
    for step in steps:
        config = step.get("config") or {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: the config of step {step.get('registry_name')!r} is no object")
        named[str(step.get("registry_name"))] = step | {"config": config}
    return named
