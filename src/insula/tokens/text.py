"""Text ↔ ids: the embedded tokenizer, or a Gemma/PaliGemma one read from a file you have.

A place in an image is a location token, "<loc0000>" upwards, one id each (PaliGemma: y before x, the image divided
into as many bins as there are tokens). Text that merely spells "<eos>" or the like stays text: no instruction can
smuggle in a control token.
"""

import re
from collections.abc import Iterable
from functools import cache
from operator import index
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from tokenizers import AddedToken, Tokenizer

from insula.errors import InputError, MissingFileError
from insula.files import read_bytes
from insula.tokens.fast import TOKENIZER_FILE, read_tokenizer

SENTENCEPIECE_FILE = "tokenizer.model"
EMBEDDED = Path(__file__).parent / "embedded"
PALIGEMMA_TOKENS = [f"<loc{n:04d}>" for n in range(1024)] + [f"<seg{n:03d}>" for n in range(128)]
"""What PaliGemma has and Gemma lacks, in order: ids 256000 … 257151."""
CONTROL_NAMES = {"bos_id": ("<bos>", "<s>"), "eos_id": ("<eos>", "</s>"), "pad_id": ("<pad>",)}


# A protocol, so that a robot's own tokenizer needs no base class of ours.
@runtime_checkable
class TextTokenizer(Protocol):
    """What the sequence needs of a text tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id that `encode` can give is below it."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no BOS, no EOS."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text, without BOS, EOS and padding. Raises InputError for an id outside the vocabulary."""

    def save(self, path: str | Path) -> None:
        """Write into a directory what `load` of that directory reads."""


@cache
def embedded() -> TextTokenizer:
    """The tokenizer that comes with insula: byte-level BPE of 2,048 entries, then 128 location tokens. Any text
    encodes; " 0" to " 255" and the words of a tabletop are one token each (scripts/train_text_tokenizer.py).
    """
    return load_text_tokenizer(EMBEDDED)


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a `tokenizer.json`, a SentencePiece `.model`, or a directory holding `tokenizer.json` or `tokenizer.model`.

    A file without location tokens (Gemma's 256,000 pieces) gets PaliGemma's 1,024 location and 128 segmentation tokens
    appended. Raises MissingFileError, InputError for a malformed file, InputError without sentencepiece for a
    `.model`.
    """
    path = Path(path)

    # Both may lie side by side, as in a Hugging Face checkout: tokenizer.json needs no other library.
    if path.is_dir():
        found = [path / name for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE) if (path / name).is_file()]
        if not found:
            raise MissingFileError(f"{path}: neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE} in this directory")
        path = found[0]

    if not path.is_file():
        raise MissingFileError(f"{path}: no such text tokenizer; expected a tokenizer.json or a SentencePiece .model")

    if path.suffix == ".model":
        return SentencePieceText(read_bytes(path), str(path))
    return JSONText(read_tokenizer(path), str(path))


class JSONText:
    """A text tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, source: str) -> None:
        """Takes the tokenizer over; `source` names it in errors. Raises InputError where it lacks BOS, EOS, padding."""
        # Gemma's own file stops where PaliGemma's additions start. Appended in order they get PaliGemma's ids.
        if tokenizer.token_to_id(PALIGEMMA_TOKENS[0]) is None:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in PALIGEMMA_TOKENS])

        self.tokenizer = tokenizer
        self.bos_id = _first_id(tokenizer, CONTROL_NAMES["bos_id"], source)
        self.eos_id = _first_id(tokenizer, CONTROL_NAMES["eos_id"], source)
        self.pad_id = _first_id(tokenizer, CONTROL_NAMES["pad_id"], source)

        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        plain = {i for i in tokenizer.get_vocab().values() if i not in special}
        # By the largest id and not by the count: a file may have gaps.
        self.vocab_size = 1 + max(
            plain | {self.bos_id, self.eos_id, self.pad_id}
        )  # PaliGemma's file ends in an <image> no text gives

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy sent to a worker: the library forgets this one setting on the way."""
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        # BOS and EOS are the sequence's to place: the library would add its own in front of every piece.
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self.tokenizer.decode(_inside(ids, self.vocab_size), skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / TOKENIZER_FILE).write_text(self.tokenizer.to_str() + "\n", encoding="utf-8")


class SentencePieceText:
    """A SentencePiece model (Gemma's, or PaliGemma's)."""

    def __init__(self, model: bytes, source: str) -> None:
        """`source` names it in errors. Raises InputError where `model` is none or lacks BOS, EOS or padding."""
        self.model = model
        self._pieces = _sentencepiece(model, source)
        self.bos_id = self._pieces.bos_id()
        self.eos_id = self._pieces.eos_id()
        self.pad_id = self._pieces.pad_id()
        for name in CONTROL_NAMES:
            if getattr(self, name) < 0:
                raise InputError(f"{source}: this SentencePiece model has no {name}")

        # Gemma's model lacks the location tokens; PaliGemma's has them as pieces. Unknown pieces share one id, so the
        # piece is read back rather than looked for.
        size = self._pieces.get_piece_size()
        complete = self._pieces.id_to_piece(self._pieces.piece_to_id(PALIGEMMA_TOKENS[0])) == PALIGEMMA_TOKENS[0]
        self._appended = {} if complete else {token: size + n for n, token in enumerate(PALIGEMMA_TOKENS)}
        self.vocab_size = size + len(self._appended)

    def encode(self, text: str) -> list[int]:
        if not self._appended:
            return self._pieces.encode(text)

        # The library would take an appended token for plain text.
        ids: list[int] = []
        for part in re.split(r"(<loc\d{4}>|<seg\d{3}>)", text, flags=re.ASCII):
            ids += [self._appended[part]] if part in self._appended else self._pieces.encode(part)

        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        # Runs of pieces are decoded together: alone, each would lose the space in front of it.
        parts, run, size = [], [], self.vocab_size - len(self._appended)
        for i in _inside(ids, self.vocab_size):
            if i < size:
                run.append(i)
            else:
                parts += [self._pieces.decode(run), PALIGEMMA_TOKENS[i - size]]
                run = []

        return "".join([*parts, self._pieces.decode(run)])

    def save(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        (Path(path) / SENTENCEPIECE_FILE).write_bytes(self.model)


def _first_id(tokenizer: Tokenizer, names: tuple[str, ...], source: str) -> int:
    for name in names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found

    raise InputError(f"{source}: this tokenizer has none of {', '.join(names)}, but the sequence needs one")


def _inside(ids: Iterable[SupportsIndex], vocab_size: int) -> list[int]:
    # The libraries leave out an id they do not have, or raise an error that does not say where it stands.
    tokens = [index(i) for i in ids]
    for position, i in enumerate(tokens):
        if not 0 <= i < vocab_size:
            raise InputError(f"id {i} at position {position} is outside the text vocabulary of {vocab_size} entries")

    return tokens


def _sentencepiece(model: bytes, source: str) -> Any:
    # Not among the requirements: only Gemma's own file needs it.
    try:
        import sentencepiece
    except ImportError:
        raise InputError(
            f"{source}: reading a SentencePiece model needs its library: pip install 'insula[gemma]'"
        ) from None

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise InputError(f"{source}: not a SentencePiece model ({error})") from None
