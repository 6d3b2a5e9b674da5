"""`insula convert`: a model from any known format into ours, LeRobot's or openpi's, with what must travel with it."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from insula.checkpoints import lerobot
from insula.checkpoints.formats import INSULA
from insula.checkpoints.hub import local
from insula.checkpoints.loading import LoadReport, open_weights, settle
from insula.checkpoints.openpi import OPENPI
from insula.checkpoints.sources import SAFETENSORS
from insula.checkpoints.store import CheckpointStore
from insula.checkpoints.tensor_map import paths
from insula.checkpoints.writing import Read, from_params, require_names, write_orbax, write_safetensors
from insula.data import normalize as normalize
from insula.data.normalize import NormStats
from insula.data.robot import STATS_FILE
from insula.errors import CheckpointError, FileError
from insula.files import read_json
from insula.model.config import PI05, ModelConfig, config_from_dict, preset
from insula.model.lora import merge
from insula.model.params import abstract_params
from insula.runs.assets import Assets, read_assets, write_config
from insula.runs.folder import CHECKPOINTS_FOLDER, MODEL_FILE, TOKENIZER_FOLDER
from insula.runs.loading import refuse_leaking

log = logging.getLogger(__name__)
Target = Literal["insula", "lerobot", "openpi"]
Stats = dict[str, NormStats]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model before it is written: its config, how to read its weights, and what travels with them, where there is
    any."""

    config: ModelConfig
    read: Read
    report: LoadReport
    stats: Stats | None = None
    assets: Assets | None = None


def convert_checkpoint(
    source: Path,
    destination: Path,
    to: Target,
    preset_name: str = "pi05",
    dtype: Literal["float32", "bfloat16"] = "float32",
    ignore: Sequence[str] = (),
    norm_stats: Path | None = None,
    robot: str | None = None,
) -> LoadReport:
    """Write `source` to the new directory `destination`, one array at a time.

    `preset_name` says what a source without a config is; `robot` whose statistics LeRobot or openpi get, where the
    model knows several. Raises CheckpointError where the source is damaged, does not
    fit, or the format cannot be this model; FileExistsError where `destination` holds something.
    """
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [destination]):
        raise FileError(f"{destination} is not empty; choose a new directory")
    model = open_model(source, preset_name, ignore)
    if norm_stats is not None:
        model = dataclasses.replace(model, stats=normalize.load_stats(norm_stats))
    if to == "insula":
        _write_insula(destination, model, dtype)
    else:
        format = lerobot.LEROBOT if to == "lerobot" else OPENPI
        require_names(format, model.config)
        model = _for_robot(model, robot, to)
        _refuse_other_text(model, to)
        stats = _checked_stats(model, source, to)
        if to == "lerobot":
            bounds = (stats["state"].bounds(), stats["actions"].bounds())
            lerobot.write_policy_files(destination, model.config, *bounds, dtype)
            write_safetensors(destination / lerobot.MODEL, format, model.config, model.read, dtype)
        else:
            write_orbax(destination / "params", format, model.config, model.read, dtype)
            folder = destination / "assets" / "insula"
            folder.mkdir(parents=True)
            normalize.save_stats(folder / STATS_FILE, _openpi_stats(stats))
    return model.report


def open_model(source: Path, preset_name: str, ignore: Sequence[str] = ()) -> Model:
    """A run, our own weights, or a foreign checkpoint. Nothing may be missing; what is left over must be named."""
    source = local(source)
    if (source / CHECKPOINTS_FOLDER).is_dir():
        return _open_run(source)
    config, assets = _config(source, preset_name), None
    if (source / TOKENIZER_FOLDER).is_dir():
        assets = read_assets(source)
    reader = open_weights(source, config)
    stats = None if assets else _find_stats(source)
    return Model(config, reader.read, settle(reader, ignore=ignore), stats, assets)


def _open_run(run: Path) -> Model:
    with CheckpointStore(run / CHECKPOINTS_FOLDER) as store:
        refuse_leaking(store.assets())
        assets = read_assets(store.assets())
        params = store.restore("params", abstract_params(assets.config))
    if assets.config.lora is not None:
        params = merge(params)
        assets = dataclasses.replace(assets, config=dataclasses.replace(assets.config, lora=None))
    report = LoadReport(str(run), "a run", {path: [path] for path in paths(params)}, [], [])
    return Model(assets.config, from_params(params), report, assets=assets)


def _for_robot(model: Model, name: str | None, to: Target) -> Model:
    """With that robot's statistics, unless others were given."""
    if model.assets is None:
        return model
    robot = model.assets.robot(name)
    if robot.delta:
        log.warning(
            "the actions %s are relative to the state, which %s's files cannot say: add the state on the robot",
            robot.delta,
            to,
        )
    return model if model.stats is not None else dataclasses.replace(model, stats=robot.stats)


def _config(source: Path, preset_name: str) -> ModelConfig:
    path = source / MODEL_FILE
    if not path.is_file():
        return preset(preset_name)
    raw = read_json(path)
    if "insula" in raw:
        return config_from_dict(raw["model"], str(path))
    return lerobot.read_policy_config(source) if raw.get("type") == "pi05" else preset(preset_name)


def _find_stats(source: Path) -> Stats | None:
    """Ours, openpi's `assets/<name>/norm_stats.json`, or LeRobot's normalizer."""
    found = [source / STATS_FILE, *sorted((source / "assets").glob(f"*/{STATS_FILE}"))]
    files = [path for path in found if path.is_file()]
    if len(files) > 1:
        raise CheckpointError(
            f"{source} holds statistics of {len(files)} robots; choose one with --norm-stats: {files}"
        )
    if files:
        return normalize.load_stats(files[0])
    bounds = lerobot.read_bounds(source)
    if bounds is None:
        return None
    return {name: NormStats((low + high) / 2, (high - low) / 2, low, high) for name, (low, high) in bounds.items()}


def _checked_stats(model: Model, source: Path, to: Target) -> Stats:
    if model.stats is None:
        raise CheckpointError(f"{source} has no normalization statistics, which {to} needs; give --norm-stats FILE")
    for name, width in (("state", model.config.state_dim), ("actions", model.config.action_dim)):
        if name not in model.stats or model.stats[name].dim > width:
            got = model.stats[name].dim if name in model.stats else "none"
            raise CheckpointError(f"{source}: statistics of {name} have {got} dimensions, expected at most {width}")
    return model.stats


def _refuse_other_text(model: Model, to: Target) -> None:
    if model.assets is None:
        return
    text, dialect = model.assets.tokenizer.text, model.assets.tokenizer.dialect.name
    if text.vocab_size != PI05.vocab_size or dialect != "pi05":
        raise CheckpointError(
            f"{to} tokenizes with PaliGemma's {PI05.vocab_size:,} entries in the dialect 'pi05'; this policy was "
            f"trained with {text.vocab_size:,} in {dialect!r}, so its prompts would mean something else there"
        )


def _openpi_stats(stats: Stats) -> Stats:
    spreads = {"state": lerobot.STATE_SPREAD, "actions": lerobot.ACTION_SPREAD}
    bounds = {name: lerobot.with_range(stats[name].bounds(), spread) for name, spread in spreads.items()}
    return {name: NormStats(stats[name].mean, stats[name].std, *bounds[name]) for name in spreads}


def _write_insula(destination: Path, model: Model, dtype: str) -> None:
    """`config.json` and `model.safetensors`, and what travels with a policy where the source has it."""
    if model.assets is not None:
        model.assets.write(destination)
    else:
        write_config(destination, model.config)
        if model.stats is not None:
            normalize.save_stats(destination / STATS_FILE, model.stats)
    write_safetensors(destination / SAFETENSORS, INSULA, model.config, model.read, dtype)


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Turn a run or a checkpoint (ours, PaliGemma, openpi, LeRobot PI05) into another format, array by array."""

    source: tyro.conf.Positional[Path]
    """A run, a directory, a .safetensors or a .npz file, or hf://organization/name."""
    destination: tyro.conf.Positional[Path]
    """A new directory."""
    to: Target
    """What to write."""
    preset: str = "pi05"
    """What a source that carries no config is: pi05, pi0, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights written."""
    ignore: tuple[str, ...] = ()
    """Patterns of tensors in the source that may be left over."""
    norm_stats: Path | None = None
    """openpi's norm_stats.json, where the source has no statistics."""
    robot: str | None = None
    """Whose statistics to write, where the run was trained on several."""


def run_convert(config: ConvertConfig) -> None:
    """Convert, and print what was read. Raises as `convert`."""
    report = convert_checkpoint(
        config.source,
        config.destination,
        config.to,
        config.preset,
        config.dtype,
        config.ignore,
        config.norm_stats,
        config.robot,
    )
    print(report.summary())
