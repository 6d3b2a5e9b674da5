"""`insula convert`: a model from any known format into ours, LeRobot's or openpi's, with what must travel with it."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from insula.checkpoints import lerobot, lerobot_steps
from insula.checkpoints.formats import INSULA
from insula.checkpoints.hub import local
from insula.checkpoints.loading import LoadReport, open_weights, settle
from insula.checkpoints.openpi import OPENPI
from insula.checkpoints.sources import SAFETENSORS, read_settings
from insula.checkpoints.store import CheckpointStore
from insula.checkpoints.tensor_map import paths
from insula.checkpoints.writing import Read, from_params, require_names, write_orbax, write_safetensors
from insula.data import normalize as normalize
from insula.data.normalize import NormStats
from insula.data.robot import STATS_FILE
from insula.errors import CheckpointError, FileError, InputError
from insula.files import is_named, read_json
from insula.model.config import PI05, ModelConfig, config_from_dict, preset
from insula.model.lora import merge
from insula.model.params import abstract_params
from insula.runs.assets import Assets, read_assets, write_config
from insula.runs.folder import CHECKPOINTS_FOLDER, MODEL_FILE, ROBOTS_FOLDER, TOKENIZER_FOLDER
from insula.runs.loading import refuse_leaking
from insula.tokens.huggingface import save_huggingface
from insula.tokens.text import TextTokenizer, load_text_tokenizer

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
    text: TextTokenizer | None = None
    relative: tuple[int, ...] = ()
    """Action dimensions that count from the state."""


def convert_checkpoint(
    source: Path,
    destination: Path,
    to: Target,
    preset_name: str = "pi05",
    dtype: Literal["float32", "bfloat16"] = "float32",
    ignore: Sequence[str] = (),
    norm_stats: Path | None = None,
    robot: str | None = None,
    text_tokenizer: Path | None = None,
) -> LoadReport:
    """Write `source` to the new directory `destination`, one array at a time.

    `preset_name` says what a source without a config is; `robot` whose statistics LeRobot or openpi get, where the
    model knows several; `text_tokenizer` what travels to LeRobot from a source that holds none. Raises CheckpointError
    where the source is damaged, does not fit, or the format cannot be this model; FileError where `destination` holds
    something.
    """
    if destination.exists() and any(destination.iterdir() if destination.is_dir() else [destination]):
        raise FileError(f"{destination} is not empty; choose a new directory")

    model = open_model(source, preset_name, ignore)
    if norm_stats is not None:
        model = dataclasses.replace(model, stats=_read_stats(norm_stats, model.config))

    if text_tokenizer is not None and to != "lerobot":
        raise InputError(f"--text-tokenizer: only a LeRobot directory holds one, not {to}; leave it out")
    if to == "insula":
        _write_insula(destination, model, dtype)
        return model.report

    model = _for_robot(model, robot)
    if text_tokenizer is not None:
        if model.text is not None:
            raise InputError(
                f"--text-tokenizer: {source} was trained with its own, which travels with it; leave it out"
            )
        model = dataclasses.replace(model, text=load_text_tokenizer(text_tokenizer))
    _refuse_other_text(model, to)
    stats = _checked_stats(model, source, to)
    if to == "lerobot":
        _write_lerobot(destination, model, stats, dtype)
    else:
        _write_openpi(destination, model, stats, dtype)

    return model.report


def open_model(source: Path, preset_name: str, ignore: Sequence[str] = ()) -> Model:
    """A run, our own weights, or a foreign checkpoint. Nothing may be missing; what is left over must be named."""
    source = local(source)

    # The newest checkpoint of a run; its weights are Orbax, and all that must travel is beside them.
    if (source / CHECKPOINTS_FOLDER).is_dir():
        return _open_run(source)

    config, assets = _config(source, preset_name), None
    if (source / ROBOTS_FOLDER).is_dir():
        assets = read_assets(source)

    # What `source` says about its robot only counts where it is no policy of ours: that one knows better.
    reader = open_weights(source, config)
    stats = None if assets else _find_stats(source, config)
    if assets is None and lerobot_steps.counts_from_state(source):
        log.warning(
            "%s: its actions count from the state, which weights and statistics do not say; name the dimensions "
            "under `delta` in the mapping of your data",
            source,
        )

    return Model(config, reader.read, settle(reader, ignore=ignore), stats, assets)


def _open_run(run: Path) -> Model:
    with CheckpointStore(run / CHECKPOINTS_FOLDER) as store:
        refuse_leaking(store.assets())
        assets = read_assets(store.assets())
        params = store.restore("params", abstract_params(assets.config))

    # No other format knows low-rank updates: they become part of the matrices.
    if assets.config.lora is not None:
        params = merge(params)
        assets = dataclasses.replace(assets, config=dataclasses.replace(assets.config, lora=None))

    report = LoadReport(str(run), "a run", {path: [path] for path in paths(params)}, [], [])
    return Model(assets.config, from_params(params), report, assets=assets)


def _for_robot(model: Model, name: str | None) -> Model:
    """With that robot's statistics, unless others were given, and its relative dimensions."""
    if model.assets is None:
        return model

    robot = model.assets.robot(name)
    stats = robot.stats if model.stats is None else model.stats
    return dataclasses.replace(model, stats=stats, text=model.assets.tokenizer.text, relative=robot.delta)


def _config(source: Path, preset_name: str) -> ModelConfig:
    """What the source says it is. A config of another tool that says nothing of sizes leaves it to the preset."""
    path = source / MODEL_FILE
    if not is_named(path):
        return preset(preset_name)

    raw = read_settings(path)
    if "insula" in raw:
        return config_from_dict(read_json(path, "model")["model"], str(path))
    return lerobot.read_policy_config(source) if raw.get("type") == "pi05" else preset(preset_name)


def _find_stats(source: Path, config: ModelConfig) -> Stats | None:
    """Ours, openpi's `assets/<name>/norm_stats.json`, or LeRobot's normalizer."""
    folders = [source, *sorted((source / "assets").glob("*"))]
    files = [folder / STATS_FILE for folder in folders if is_named(folder / STATS_FILE)]
    if len(files) > 1:
        raise CheckpointError(
            f"{source} holds statistics of {len(files)} robots; choose one with --norm-stats: "
            f"{', '.join(map(str, files))}"
        )
    if files:
        return _read_stats(files[0], config)

    bounds = lerobot_steps.read_bounds(source)
    return None if bounds is None else {name: _between(low, high) for name, (low, high) in bounds.items()}


def _read_stats(path: Path, config: ModelConfig) -> Stats:
    """A file of statistics. openpi's does not say how to normalize, since there it belongs to the model: π0, whose
    state is a token, by mean and std, π0.5 by quantiles."""
    raw = read_json(path)
    usual: normalize.Kind = "mean_std" if config.state_input == "token" else "quantiles"
    stats = normalize.stats_from_json(raw, str(path))
    said = {name: entry.get("kind") for name, entry in raw["norm_stats"].items()}

    return {name: dataclasses.replace(part, kind=said[name] or usual) for name, part in stats.items()}


def _between(low: np.ndarray, high: np.ndarray) -> NormStats:
    """Statistics that map low to −1 and high to 1, whether they are read as quantiles or as mean and std."""
    return NormStats((low + high) / 2, (high - low) / 2, low, high)


def _checked_stats(model: Model, source: Path, to: Target) -> Stats:
    if model.stats is None:
        raise CheckpointError(f"{source} has no normalization statistics, which {to} needs; give --norm-stats FILE")
    for name, width in (("state", model.config.state_dim), ("actions", model.config.action_dim)):
        if name not in model.stats or model.stats[name].dim > width:
            got = model.stats[name].dim if name in model.stats else "none"
            raise CheckpointError(f"{source}: statistics of {name} have {got} dimensions, expected at most {width}")
    return model.stats


def _refuse_other_text(model: Model, to: Target) -> None:
    """Raises CheckpointError where the target would write another prompt than this model was trained on."""
    dialect = "pi0" if model.config.state_input == "token" else "pi05"  # what openpi's two models write
    own = dialect if model.assets is None else model.assets.tokenizer.dialect.name
    entries = PI05.vocab_size if model.text is None else model.text.vocab_size
    if entries != PI05.vocab_size or own != dialect:
        raise CheckpointError(
            f"{to} writes the prompts of a {model.config.name!r} in the dialect {dialect!r}, with PaliGemma's "
            f"{PI05.vocab_size:,} tokens; this policy has {entries:,} in {own!r}, so its prompts would mean something "
            "else there. Train with --text-tokenizer and the preset's own dialect"
        )


def _write_lerobot(destination: Path, model: Model, stats: Stats, dtype: str) -> None:
    """A PI05 directory that loads with the network off, once it holds a tokenizer."""
    # All that can be refused is, before anything is written.
    bounds = stats["state"].bounds(), stats["actions"].bounds()
    lerobot.refuse_other_sizes(model.config)
    require_names(lerobot.LEROBOT, model.config)
    if model.relative:
        lerobot_steps.relative_names(model.relative, stats["state"].dim, stats["actions"].dim)

    tokenizer = lerobot_steps.HUB_TOKENIZER
    if model.text is not None:
        save_huggingface(model.text, destination / TOKENIZER_FOLDER)
        # LeRobot takes a relative path from where its process runs, and not from the file that names it.
        tokenizer = str((destination / TOKENIZER_FOLDER).resolve())
    else:
        log.warning(
            "%s holds no tokenizer, so LeRobot will fetch %s; to load it offline, give --text-tokenizer",
            model.report.source,
            tokenizer,
        )

    lerobot.write_policy_files(destination, model.config, *bounds, dtype, model.relative, tokenizer)
    write_safetensors(destination / lerobot.MODEL, lerobot.LEROBOT, model.config, model.read, dtype)


def _write_openpi(destination: Path, model: Model, stats: Stats, dtype: str) -> None:
    """`params` and `assets/insula/norm_stats.json`, by which openpi's π0 and π0.5 alike normalize as this model."""
    require_names(OPENPI, model.config)
    if model.relative:
        log.warning(
            "actions %s count from the state; openpi's files cannot say so: add its DeltaActions and AbsoluteActions "
            "to the data config",
            list(model.relative),
        )

    write_orbax(destination / "params", OPENPI, model.config, model.read, dtype)
    centered = lerobot_steps.HALF_BIN if model.config.state_input == "prompt" else 0.0
    state = lerobot_steps.with_range(stats["state"].bounds(), lerobot_steps.STATE_SPREAD, centered)
    actions = lerobot_steps.with_range(stats["actions"].bounds(), lerobot_steps.ACTION_SPREAD)
    folder = destination / "assets" / "insula"
    folder.mkdir(parents=True)
    normalize.save_stats(folder / STATS_FILE, {"state": _between(*state), "actions": _between(*actions)})


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
    text_tokenizer: Path | None = None
    """PaliGemma's tokenizer, to travel to LeRobot from a source that holds none."""


def run_convert(config: ConvertConfig) -> None:
    """Convert, and print what was read. Raises as `convert_checkpoint`."""
    report = convert_checkpoint(
        config.source,
        config.destination,
        config.to,
        config.preset,
        config.dtype,
        config.ignore,
        config.norm_stats,
        config.robot,
        config.text_tokenizer,
    )
    print(report.summary())
