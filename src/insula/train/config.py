"""Everything a training run is made of, as one frozen value, and the presets it starts from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from insula.batch import LossName
from insula.checks import check_integer, check_number, check_seed
from insula.data.config import DEFAULT_READING, DataConfig
from insula.errors import InputError, did_you_mean
from insula.files import as_path, read_json
from insula.model.config import (
    PI0,
    PI05,
    SMALL,
    TABLETOP,
    TINY_BFLOAT16,
    ModelConfig,
    build,
    check_object,
    config_from_dict,
)
from insula.parallel.mesh import ALL_DEVICES, MeshConfig
from insula.parallel.processes import ALONE, ProcessesConfig
from insula.recipes import BOTH, Recipe, find_recipe
from insula.train.optimizer import DEFAULT, PI0_OPTIMIZER, PI05_OPTIMIZER, SMALL_OPTIMIZER, OptimizerConfig
from insula.train.sinks import SinkKind


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a knowledge-insulated policy. On the command line --preset (tiny, tabletop, small, pi05, pi0) chooses what
    all other flags start from. Raises InputError for values that cannot be."""

    run: Path
    """Folder for everything: settings, metrics, checkpoints."""
    recipe: str | None = None
    """How tokens and flow are joined, by name (insula recipes); it decides losses, questions, what is insulated or
    frozen, LoRA, and what training starts from."""
    data: Path | None = None
    """A LeRobot data set, or a .toml file that maps one or several (docs/data.md); needed unless `resume`."""
    episodes: int | None = None
    """Train on the first so many episodes of each robot, of those that are not held out: which these are does not
    depend on it. None: on all."""
    losses: tuple[LossName, ...] = BOTH
    """What demonstrations teach: flow, fast, or both. A robot's own `losses` (docs/data.md) may leave out more."""
    questions: bool = True
    """Learn from the questions of the mapping as well."""
    reading: Annotated[DataConfig, tyro.conf.arg(name="")] = DEFAULT_READING
    model: ModelConfig = TINY_BFLOAT16
    optimizer: OptimizerConfig = DEFAULT
    mesh: MeshConfig = ALL_DEVICES
    """How the devices share the work (insula.parallel.mesh); unless told, each has a part of the model."""
    processes: ProcessesConfig = ALONE
    """The other processes of this training, where there is one for each of several hosts (docs/scale.md)."""
    steps: int = 2500
    """Updates of the whole run. The learning rates' schedule ends there."""
    batch_size: int = 32
    """Samples of one update."""
    accumulate: int = 1
    """Parts of a batch that are in memory one after the other, their gradients added up: less memory, the same update,
    somewhat slower."""
    seed: int = 0
    """Of the split, the order of samples, noise, times and fresh weights."""
    init: Path | None = None
    """Start from this checkpoint (a path, or hf://organization/name; docs/checkpoints.md) instead of the embedded
    pretrained backbone."""
    fresh: tuple[str, ...] = ()
    """Weights to initialize rather than load from `init`, as patterns: PaliGemma has no "expert.*"."""
    ignore: tuple[str, ...] = ()
    """What of `init` to leave over, as patterns of its names."""
    from_scratch: bool = False
    """Start from random weights."""
    augment: bool = False
    """Random colors and crops of the images, on the device (insula.train.augment)."""
    workers: int = 0
    """Processes that make batches; 0 is a thread, enough for small images."""
    held_out_fraction: float = 0.05
    """Share of episodes (and of questions) never trained on, whose losses are measured along the way. Which ones is
    decided when the run starts, and stored with it."""
    evaluate_every: int = 500
    checkpoint_every: int = 1000
    keep: int = 3
    """How many of the newest checkpoints stay."""
    keep_every: int | None = None
    """Checkpoints whose step it divides stay as well."""
    log_every: int = 20
    certify: bool = True
    """Measure the insulation of every checkpoint and store it there (insula.certificate). Costs a few seconds, and for
    a moment the memory of a step in float32 without insulation."""
    log_to: tuple[SinkKind, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio; each an extra (docs/scale.md)."""
    profile_steps: tuple[int, int] | None = None
    """First and last update, counted from 1, of which a trace is written to the run's folder."""
    resume: bool = False
    """Go on from the newest checkpoint of `run`, with the settings stored there. What else is given is applied where
    that is safe (steps, data that moved, how often something is done, the optimizer), and refused by name elsewhere."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "checkpoint_every", "keep", "log_every"):
            check_integer(name, getattr(self, name), 1)
        for name in ("keep_every", "episodes"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_integer("workers", self.workers, 0, 1024)
        check_seed("seed", self.seed)
        check_number("held_out_fraction", self.held_out_fraction, "≥ 0 and < 1", lambda share: 0 <= share < 1)

        if repeated := {kind for kind in self.log_to if self.log_to.count(kind) > 1}:
            raise InputError(f"log_to names {', '.join(sorted(repeated))} twice")
        if self.profile_steps is not None:
            given = self.profile_steps
            if len(given) != 2 or not 1 <= given[0] <= given[1] <= self.steps:
                told = " ".join(map(str, given))
                raise InputError(
                    f"profile_steps is {told}, expected a first and a last step, from 1 to steps = {self.steps}"
                )

        # Only what can be seen without reading a file; `data` is looked for when the run is opened.
        if self.init is not None and self.from_scratch:
            raise InputError(
                f"init is {self.init}, but from_scratch asks for random weights; drop one of them (--no-from-scratch "
                "where a preset asks for it)"
            )

        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise InputError(f"losses is {self.losses}, expected flow, fast or both, each once")
        if self.recipe is not None:
            _check_recipe(self, find_recipe(self.recipe))


def apply_recipe(config: TrainConfig, name: str) -> TrainConfig:
    """These settings, with what a recipe decides. Raises InputError for an unknown name."""
    recipe = find_recipe(name)
    model = dataclasses.replace(config.model.with_objective(**recipe.objective), lora=recipe.lora)
    return dataclasses.replace(
        config,
        recipe=name,
        model=model,
        losses=recipe.losses,
        questions=recipe.questions,
        # A preset without weights to start from has none with a recipe, either.
        from_scratch=recipe.from_scratch or config.from_scratch,
    )


def _check_recipe(config: TrainConfig, recipe: Recipe) -> None:
    """Raises InputError where a setting is not what its recipe says, naming both."""
    objective = config.model.objective
    found = {
        **{f"model.objective.{name}": (getattr(objective, name), said) for name, said in recipe.objective.items()},
        "model.lora": (config.model.lora, recipe.lora),
        "losses": (", ".join(config.losses), ", ".join(recipe.losses)),
        "questions": (config.questions, recipe.questions),
        "from_scratch": (config.from_scratch, config.from_scratch or recipe.from_scratch),
    }
    for name, (value, said) in found.items():
        if value != said:
            raise InputError(
                f"recipe {recipe.name!r}: {name} is {said}, got {value}; drop one of the two (insula recipes shows "
                "what each decides)"
            )

    if recipe.starts_from is not None and config.init is None and not config.resume:
        raise InputError(
            f"recipe {recipe.name!r} starts from a run of {recipe.starts_from!r}; train that one first, and give its "
            "weights as --init (insula convert RUN WEIGHTS --to insula)"
        )


_DEFAULTS = TrainConfig(run=Path())
TRAINING = {
    "tiny": _DEFAULTS,
    # Several tasks in one policy; few and coarse FAST tokens, as in the demo.
    "tabletop": dataclasses.replace(
        _DEFAULTS,
        model=TABLETOP.with_compute(dtype="bfloat16"),
        reading=DataConfig(fast_vocab=512, fast_scale=5.0),
        steps=5000,
        evaluate_every=1000,
        checkpoint_every=1000,
    ),
    # From random weights: there are none of these sizes.
    "small": dataclasses.replace(_DEFAULTS, model=SMALL, optimizer=SMALL_OPTIMIZER, steps=20_000, from_scratch=True),
    # As openpi trains them, except for the batch size: your memory decides that.
    "pi05": dataclasses.replace(_DEFAULTS, model=PI05, optimizer=PI05_OPTIMIZER, steps=30_000),
    "pi0": dataclasses.replace(
        _DEFAULTS, model=PI0, optimizer=PI0_OPTIMIZER, reading=DataConfig(dialect="pi0"), steps=30_000
    ),
}
"""What belongs together, by the name of the model: its sizes, its prompt's dialect, its learning rates and their
schedule. The rates of `tiny` are those that were measured to work (docs/log.md, "Robot training")."""


def training_preset(name: str, run: Path) -> TrainConfig:
    """The settings of a preset, for a run in the folder `run`. Raises InputError with the nearest name for another."""
    if name not in TRAINING:
        raise InputError(f"no preset {name!r}{did_you_mean(name, TRAINING)}; known: {', '.join(TRAINING)}")
    return dataclasses.replace(TRAINING[name], run=run)


_PATHS = ("run", "data", "init")  # JSON knows no paths: text in the file
READING_PATHS = ("text_tokenizer", "fast")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON values, which `read_config` reads back."""
    raw = dataclasses.asdict(config)
    del raw["processes"]  # of this start, and different in each of them
    # None stays None: "None" would come back as a path of that name.
    raw["reading"] |= {name: raw["reading"][name] and str(raw["reading"][name]) for name in READING_PATHS}
    return raw | {name: raw[name] and str(raw[name]) for name in _PATHS}


def read_config(path: Path) -> TrainConfig:
    """What `to_dict` made, from its file. Raises MissingFileError, FileError, or InputError naming what is wrong."""
    raw = read_json(path, "run", "model")
    config_from_dict(raw["model"], f"{path}: model")  # first: it knows settings of old versions by name
    return _from_dict(read_json(path, "reading", "optimizer"), str(path))


def changed(config: TrainConfig, tables: Mapping[str, Any], where: str) -> TrainConfig:
    """These settings with some others, in tables as `to_dict` has them: {"model": {"state_dim": 14}}. Raises
    InputError naming what is wrong, and the nearest name for one that is unknown."""
    return _from_dict(_merged(to_dict(config), tables), where)


def _merged(raw: dict[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    inner = {
        name: _merged(raw[name], value)
        for name, value in tables.items()
        if isinstance(value, dict) and isinstance(raw.get(name), dict)
    }
    return raw | dict(tables) | inner


def _from_dict(raw: dict[str, Any], where: str) -> TrainConfig:
    model = config_from_dict(raw["model"], f"{where}: model")
    reading = build(DataConfig, _with_paths(raw["reading"], READING_PATHS, f"{where}: reading"), f"{where}: reading")
    optimizer = build(OptimizerConfig, raw["optimizer"], f"{where}: optimizer")
    mesh = build(MeshConfig, raw.get("mesh", {}), f"{where}: mesh")  # older runs knew one device alone
    if "tensorboard" in raw:  # a switch, in runs that knew no other place
        raw = {name: value for name, value in raw.items() if name != "tensorboard"} | (
            {"log_to": ["tensorboard"]} if raw["tensorboard"] else {}
        )
    nested = {"model": model, "optimizer": optimizer, "mesh": mesh, "reading": reading}
    if isinstance(losses := raw.get("losses"), list) and all(loss in list(LossName) for loss in losses):
        nested["losses"] = tuple(LossName(loss) for loss in losses)
    return build(TrainConfig, _with_paths(raw, _PATHS, where) | nested, where)


def _with_paths(raw: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    check_object(raw, where)
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    return raw | {name: as_path(text, f"{where}: {name}") for name, text in found.items()}
