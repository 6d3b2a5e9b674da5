"""Everything a training run is made of, as one frozen value."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from insula.model.config import TINY_BFLOAT16, Config, build, config_from_dict
from insula.train.optimiser import DEFAULT, OptimiserConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`insula train`. Everything is written to the folder `run`."""

    run: Path
    data: Path | None = None
    """A LeRobot v3.0 data set; needed unless `resume`."""
    model: Config = TINY_BFLOAT16
    optimiser: OptimiserConfig = DEFAULT
    steps: int = 2500
    batch_size: int = 32
    seed: int = 0
    from_scratch: bool = False
    """Start from random weights instead of the embedded pretrained backbone."""
    dialect: Literal["pi05", "pi0_fast"] = "pi05"
    fast_vocab: int = 1024
    fast_scale: float = 10.0
    on_overflow: Literal["error", "drop_token_loss"] = "error"
    """A chunk with too many FAST tokens: refuse the data, or give up that sample's token loss (counted, logged)."""
    held_out_fraction: float = 0.05
    """Share of episodes never trained on, whose losses are measured along the way."""
    evaluate_every: int = 500
    checkpoint_every: int = 1000
    log_every: int = 20
    tensorboard: bool = False
    resume: bool = False
    """Go on from the newest checkpoint of `run`, with the settings stored there."""


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON values."""
    raw = dataclasses.asdict(config)
    return raw | {"data": config.data and str(config.data), "run": str(config.run)}


def from_dict(raw: dict[str, Any], where: str) -> TrainConfig:
    """The inverse of `to_dict`."""
    nested = {
        "data": raw["data"] and Path(raw["data"]),
        "run": Path(raw["run"]),
        "model": config_from_dict(raw["model"], where),
        "optimiser": build(OptimiserConfig, raw["optimiser"], where),
    }
    return build(TrainConfig, raw | nested, where)
