"""How samples are read, as one frozen value: the prompt's dialect, both tokenizers, and what does not fit."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from insula.checks import check_integer, check_number
from insula.errors import InputError, did_you_mean

DialectName = Literal["pi05", "pi0", "pi0_fast"]
TokenOverflow = Literal["error", "drop_token_loss"]
BadSample = Literal["fail", "quarantine"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """From a data set's numbers and texts to what a model reads. Raises InputError for values that cannot be."""

    dialect: DialectName = "pi05"
    """How prompt and action are written."""
    text_tokenizer: Path | None = None
    """Gemma's or PaliGemma's tokenizer.json or SentencePiece .model; the embedded one unless given."""
    fast: Path | None = None
    """A fitted FAST tokenizer (such as FAST+) to use; fitted to the data unless given."""
    fast_last_id: int | None = None
    """The text token that FAST id 0 becomes, counting downwards (257023 in π0-FAST); above the text unless given."""
    fast_vocab: int = 1024
    """Entries of the FAST tokenizer that is fitted."""
    fast_scale: float = 10.0
    """Of its DCT coefficients before rounding: larger is finer and longer."""
    on_overflow: TokenOverflow = "error"
    """A chunk with too many FAST tokens: refuse the data, or give up that sample's token loss (counted, logged)."""
    on_bad_sample: BadSample = "fail"
    """A sample that cannot be read or holds a NaN: stop, or take another and write it to quarantine.jsonl."""

    def __post_init__(self) -> None:
        for name, kind in (("dialect", DialectName), ("on_overflow", TokenOverflow), ("on_bad_sample", BadSample)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise InputError(f"{name} is {value!r}, expected one of {', '.join(known)}{hint}")

        # A byte-level codec knows at least all 256 bytes.
        check_integer("fast_vocab", self.fast_vocab, 256)
        check_number("fast_scale", self.fast_scale, "> 0 and < 1e6", lambda scale: 0 < scale < 1e6)
        if self.fast_last_id is not None:
            check_integer("fast_last_id", self.fast_last_id, 0)


DEFAULT_READING = DataConfig()
