"""Everything a training run is made of, as one frozen value."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from insula.files import read_json
from insula.model.config import TINY_BFLOAT16, ModelConfig, build, config_from_dict
from insula.train.optimizer import DEFAULT, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`insula train`. Everything is written to the folder `run`."""

    run: Path
    data: Path | None = None
    """A LeRobot data set, or a .toml file that maps one or several (docs/data.md); needed unless `resume`."""
    model: ModelConfig = TINY_BFLOAT16
    optimizer: OptimizerConfig = DEFAULT
    steps: int = 2500
    batch_size: int = 32
    seed: int = 0
    init: Path | None = None
    """Start from this checkpoint (a path, or hf://organization/name; docs/checkpoints.md) instead of the embedded
    pretrained backbone."""
    fresh: tuple[str, ...] = ()
    """Weights to initialize rather than load from `init`, as patterns: PaliGemma has no "expert.*"."""
    ignore: tuple[str, ...] = ()
    """What of `init` to leave over, as patterns of its names."""
    from_scratch: bool = False
    """Start from random weights."""
    dialect: Literal["pi05", "pi0", "pi0_fast"] = "pi05"
    text_tokenizer: Path | None = None
    """Gemma's or PaliGemma's tokenizer.json or SentencePiece .model; the embedded one unless given."""
    fast: Path | None = None
    """A fitted FAST tokenizer (such as FAST+) to use; fitted to the data unless given."""
    fast_last_id: int | None = None
    """The text token that FAST id 0 becomes, counting downwards (257023 in π0-FAST); above the text unless given."""
    fast_vocab: int = 1024
    fast_scale: float = 10.0
    on_overflow: Literal["error", "drop_token_loss"] = "error"
    """A chunk with too many FAST tokens: refuse the data, or give up that sample's token loss (counted, logged)."""
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    """A sample that cannot be read or holds a NaN: stop, or take another and write it to quarantine.jsonl."""
    augment: bool = False
    """Random colors and crops of the images, on the device (insula.train.augment)."""
    workers: int = 0
    """Processes that make batches; 0 is a thread, enough for small images."""
    held_out_fraction: float = 0.05
    """Share of episodes (and of questions) never trained on, whose losses are measured along the way."""
    evaluate_every: int = 500
    checkpoint_every: int = 1000
    log_every: int = 20
    certify: bool = True
    """Measure the insulation of every checkpoint and store it there (insula.certificate). Costs a few seconds, and for
    a moment the memory of a step in float32 without insulation."""
    tensorboard: bool = False
    resume: bool = False
    """Go on from the newest checkpoint of `run`, with the settings stored there."""


_PATHS = ("run", "data", "init", "text_tokenizer", "fast")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON values."""
    raw = dataclasses.asdict(config)
    return raw | {name: raw[name] and str(raw[name]) for name in _PATHS}


def read_config(path: Path) -> TrainConfig:
    """What `to_dict` made, from its file. Raises FileNotFoundError, or ValueError naming what is wrong."""
    raw = read_json(path, "run", "model", "optimizer")
    nested = {
        "model": config_from_dict(raw["model"], f"{path}: model"),
        "optimizer": build(OptimizerConfig, raw["optimizer"], f"{path}: optimizer"),
    }
    paths = {name: Path(raw[name]) for name in _PATHS if raw.get(name) is not None}
    return build(TrainConfig, raw | paths | nested, str(path))
