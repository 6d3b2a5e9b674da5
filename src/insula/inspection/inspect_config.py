"""What `insula inspect` is asked for, as one frozen value."""

import dataclasses
from pathlib import Path
from typing import Literal

from insula.model.config import TINY, ModelConfig


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """`insula inspect`: one sample, looked at."""

    run: Path | None = None
    """A training run: its weights, and samples it was never trained on."""
    data: Path | None = None
    """Without a run: a LeRobot data set or a .toml mapping, seen by random weights."""
    sample: int = 0
    """Which one."""
    source: str | None = None
    """Of which source of the mapping; the first unless given."""
    training: bool = False
    """Look at samples the run was trained on."""
    seed: int = 0
    """Of noise and flow time."""
    out: Path | None = None
    """The page; inspect.html in the run, or here, unless given."""
    certificate: Path | None = None
    """Also write the gradients to this .json file."""
    serve: bool = False
    """Serve the page on this machine, with a picker for samples, instead of writing it."""
    port: int = 8400
    """Of --serve; 0 takes a free one."""
    tokens_only: bool = False
    """Show the sequence and the masks without running the model: for one too large for this machine."""
    model: ModelConfig = TINY
    """Without a run: the model; --preset NAME chooses which one these flags change."""
    dialect: Literal["pi05", "pi0", "pi0_fast"] = "pi05"
    """Without a run: how prompt and action are written."""
    text_tokenizer: Path | None = None
    """Without a run: Gemma's or PaliGemma's tokenizer.json or SentencePiece .model; the embedded one unless given."""
    fast: Path | None = None
    """Without a run: a fitted FAST tokenizer (such as FAST+); fitted to the data unless given."""
    fast_last_id: int | None = None
    """Without a run: the text token that FAST id 0 becomes (257023 in π0-FAST); above the text unless given."""
