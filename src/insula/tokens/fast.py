"""FAST: a chunk of actions as a few tokens (Pertsch et al. 2025, "FAST: Efficient Action Tokenization for VLAs").

    actions [H, D] ─ DCT-II along time ─ round(scale · c) ─ flatten, low frequencies first ─ one symbol each ─ BPE ─ ids

Numbers and files are those of the authors' released tokenizers. Two things differ. Nothing is lost silently: whatever
cannot be encoded is an error, and whatever cannot be decoded is said to be invalid, never a chunk of zeros. And a
fitted codec knows every symbol and leaves room below the corpus' lowest coefficient, so a chunk it has never seen
still encodes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from insula.errors import FASTRangeError, InputError
from insula.files import read_bytes, read_json, write_json

CONFIG_FILE = "processor_config.json"
TOKENIZER_FILE = "tokenizer.json"
FAST_PLUS_MIN_TOKEN = -354
"""`min_token` of the released FAST+: the coefficient 0 becomes a letter, with only letters far around it, which the
pre-tokenizer keeps together. (Nearer to 0 it may split at every digit or comma: a third more tokens were measured.)"""
# Code points that no UTF-8 text can hold. A coefficient that lands there has no symbol.
SURROGATES = range(0xD800, 0xE000)
LAST_SYMBOL = 0x10FFFF


@dataclass(frozen=True, eq=False)
class Decoded:
    """Either `actions` [H, D] float64, or why there are none: `invalid` is "because ..."."""

    actions: np.ndarray | None
    invalid: str | None = None


@dataclass(frozen=True, eq=False)
class FASTCodec:
    """Chunks [H, D] of actions normalized to about [−1, 1] ↔ token ids. Make one with `fit` or `load`.

    `vocab_size` bounds the ids; a codec fitted on little data may use fewer. `action_dim` and `time_horizon` say what
    it was fitted on, if that was uniform; they bind nothing.
    """

    tokenizer: Tokenizer
    scale: float
    min_token: int
    vocab_size: int
    action_dim: int | None = None
    time_horizon: int | None = None

    @classmethod
    def fit(
        cls, chunks: np.ndarray | Sequence[np.ndarray], vocab_size: int = 1024, scale: float | int = 10.0
    ) -> "FASTCodec":
        """Learn which runs of coefficients deserve a token. `chunks`: [n, H, D], or a sequence of [H, D].

        `min_token` is at least twice as low as the lowest coefficient, and no higher than FAST+'s. Deterministic.
        Raises InputError for no chunks, NaN or infinity, a wrong rank, or a vocabulary smaller than the 256 bytes.
        """
        if vocab_size < 256:
            raise InputError(f"FASTCodec.fit: vocab_size is {vocab_size}, expected ≥ 256, the bytes every codec knows")
        if not (math.isfinite(scale) and scale > 0):
            raise InputError(f"FASTCodec.fit: scale is {scale}, expected a finite number > 0")
        if len(chunks) == 0:
            raise InputError("FASTCodec.fit: no chunks to fit on, expected [n, H, D] with n ≥ 1")

        # Room below the lowest coefficient seen. The authors' fit takes it as the bound: a chunk a little wilder than
        # the corpus then has no symbol.
        coefficients = [_quantize(_checked(chunk, f"chunk {n}"), scale) for n, chunk in enumerate(chunks)]
        min_token = min(FAST_PLUS_MIN_TOKEN, 2 * int(min(c.min() for c in coefficients)))

        # Several robots share one codec, each with its own sizes: then it belongs to none.
        shapes = {c.shape for c in coefficients}
        horizon, dim = shapes.pop() if len(shapes) == 1 else (None, None)

        # The released tokenizer's settings, so that its files and ours read alike.
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            max_token_length=10_000,  # a chunk that stands still is one long run of zeros, and deserves one token
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # all 256: no coefficient is ever dropped
            special_tokens=[],
            show_progress=False,
        )

        tokenizer.train_from_iterator((_symbols(c, min_token) for c in coefficients), trainer=trainer)
        return cls(tokenizer, float(scale), min_token, vocab_size, action_dim=dim, time_horizon=horizon)

    @classmethod
    def load(cls, path: str | Path) -> "FASTCodec":
        """Read `processor_config.json` and `tokenizer.json` of a directory, and nothing else there.

        Raises MissingFileError where one is missing, InputError where one is malformed.
        """
        # The released FAST+ comes with Python of its own. It is never run: the two files say all there is to know.
        config_path, tokenizer_path = Path(path) / CONFIG_FILE, Path(path) / TOKENIZER_FILE
        config = read_json(config_path)
        scale = _number(config, "scale", config_path)
        min_token = _integer(config, "min_token", config_path)
        vocab_size = _integer(config, "vocab_size", config_path)
        optional = {k: None if config.get(k) is None else _integer(config, k, config_path) for k in _OPTIONAL}
        tokenizer = read_tokenizer(tokenizer_path)

        if not scale > 0:
            raise InputError(f"{config_path}: scale is {scale}, expected a finite number > 0")
        size = tokenizer.get_vocab_size()
        if size > vocab_size:
            raise InputError(f"{config_path}: vocab_size is {vocab_size}, but {TOKENIZER_FILE} has {size} entries")

        codec = cls(tokenizer, scale, min_token, vocab_size, **optional)
        try:
            codec._token_bytes  # noqa: B018 - computed now, so that a foreign alphabet is reported here
        except ValueError as error:
            raise InputError(f"{tokenizer_path}: {error}") from None

        return codec

    def save(self, path: str | Path) -> None:
        """Write the two files `load` reads, the same bytes every time."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        keys = ("scale", "min_token", "vocab_size", *_OPTIONAL)
        write_json(path / CONFIG_FILE, {key: getattr(self, key) for key in keys})
        (path / TOKENIZER_FILE).write_text(self.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")

    def encode(self, actions: np.ndarray) -> list[int]:
        """Ids of a chunk [H, D].

        Raises InputError for a wrong rank, NaN or infinity, naming where; FASTRangeError for a
        coefficient this codec has no symbol for, naming it and the limit.
        """
        text = _symbols(_quantize(_checked(actions, "actions"), self.scale), self.min_token)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids

        # A codec fitted elsewhere may lack some of the 256 byte symbols. BPE drops such a byte without a word, and
        # every later coefficient would move by one. Reading the ids back is the only way to know.
        if self.bytes_of(ids) != text.encode():
            lost = next(
                s for s in text if self.bytes_of(self.tokenizer.encode(s, add_special_tokens=False).ids) != s.encode()
            )
            raise FASTRangeError(
                f"coefficient {ord(lost) + self.min_token} has no token in this codec: it was fitted without all 256 "
                "byte symbols; fit it again with FASTCodec.fit"
            )

        return ids

    def decode(self, ids: Iterable[SupportsIndex], horizon: int, action_dim: int) -> Decoded:
        """The chunk [horizon, action_dim] that `ids` stand for, or `invalid`: a model may generate anything.

        Raises InputError where `horizon` or `action_dim` is not positive, TypeError where an id is no integer.
        """
        if horizon < 1 or action_dim < 1:
            raise InputError(f"FASTCodec.decode: horizon {horizon}, action_dim {action_dim}; expected both ≥ 1")

        tokens = [index(i) for i in ids]
        for position, i in enumerate(tokens):
            if not 0 <= i < len(self._token_bytes):
                return _invalid(
                    f"id {i} at position {position} is outside the codec's {len(self._token_bytes)} entries"
                )

        # Bytes are joined before they are decoded: one character may lie across two ids.
        try:
            text = self.bytes_of(tokens).decode()
        except UnicodeDecodeError as error:
            return _invalid(f"the ids do not join to whole symbols ({error.reason} at byte {error.start})")

        # Too few or too many. The authors' decoder answers with zeros here, which is a movement, and nobody's choice.
        if len(text) != horizon * action_dim:
            return _invalid(
                f"the ids hold {len(text)} coefficients, expected horizon {horizon} × action_dim {action_dim} = "
                f"{horizon * action_dim}"
            )

        coefficients = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64) + self.min_token
        return Decoded(idct(coefficients.reshape(horizon, action_dim) / self.scale, axis=0, norm="ortho"))

    def coefficients(self, actions: np.ndarray) -> np.ndarray:
        """The rounded DCT coefficients [H, D] int64 that `encode` writes. Raises InputError as `encode` does."""
        return _quantize(_checked(actions, "actions"), self.scale).astype(np.int64)

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Which coefficients [start, stop) each id carries, counted as they are written: all D of the lowest frequency
        first. An id may end within a coefficient, which then belongs to its neighbor as well. Raises InputError for an
        id outside the vocabulary."""
        if outside := [i for i in ids if not 0 <= i < len(self._token_bytes)]:
            raise InputError(f"id {outside[0]} is outside the codec's {len(self._token_bytes)} entries")

        found, done = [], 0
        for i in ids:
            begins = [byte & 0xC0 != 0x80 for byte in self._token_bytes[i]]  # UTF-8: the others continue a character
            found.append((done - (not begins[0]), done + sum(begins)))
            done += sum(begins)

        return found

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """The bytes each id stands for. Joined here rather than by the tokenizer, which replaces what is malformed."""
        vocab = self.tokenizer.get_vocab()
        token_of = {i: token for token, i in vocab.items()}
        try:
            return [bytes(_BYTE_OF[symbol] for symbol in token_of[i]) for i in range(len(vocab))]
        except KeyError as error:
            raise InputError(f"not a byte-level tokenizer with contiguous ids: {error} is missing") from None

    @property
    def size(self) -> int:
        """How many ids stand for something, at most `vocab_size`."""
        return len(self._token_bytes)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """What these ids spell, as UTF-8: a symbol for each coefficient. An id may end within a symbol."""
        return b"".join([self._token_bytes[i] for i in ids])


_OPTIONAL = ("action_dim", "time_horizon")


def _checked(actions: Any, what: str) -> np.ndarray:
    """The chunk as an array of rank 2 with numbers throughout."""
    actions = np.asarray(actions)
    if actions.ndim != 2 or 0 in actions.shape:
        raise InputError(f"FASTCodec: {what} has shape {list(actions.shape)}, expected [H, D] with H, D ≥ 1")
    if actions.dtype.kind not in "fiu":
        raise InputError(f"FASTCodec: {what} has dtype {actions.dtype}, expected real numbers")

    # NaN would pass through the DCT into every coefficient of its dimension, and infinity too.
    finite = np.isfinite(actions)
    if not finite.all():
        step, dim = np.argwhere(~finite)[0].tolist()
        raise InputError(f"FASTCodec: {what}[{step}, {dim}] is {actions[step, dim]}, expected finite numbers")

    return actions


def _quantize(actions: np.ndarray, scale: float | int) -> np.ndarray:
    """Rounded DCT coefficients [H, D], still floats of the reference's precision."""
    # In the precision that the actions come in, as the reference does: float64 here would round some halves
    # differently.
    return np.around(dct(actions, axis=0, norm="ortho") * scale)


def _symbols(coefficients: np.ndarray, min_token: int) -> str:
    """One character per coefficient, all D dimensions of the lowest frequency first."""
    # Checked before the cast: a code below 0 or past the last symbol would wrap around to another coefficient.
    codes = coefficients - min_token
    encodable = (codes >= 0) & (codes <= LAST_SYMBOL) & ((codes < SURROGATES.start) | (codes >= SURROGATES.stop))
    if not encodable.all():
        frequency, dim = np.argwhere(~encodable)[0].tolist()
        raise FASTRangeError(
            f"FAST coefficient of frequency {frequency}, dimension {dim} is {coefficients[frequency, dim]:.0f}, "
            f"expected {min_token} (min_token) … {SURROGATES.start - 1 + min_token}; "
            "are the actions normalized to about [−1, 1]?"
        )

    return codes.astype("<u4").tobytes().decode("utf-32-le")


def _invalid(reason: str) -> Decoded:
    return Decoded(None, f"because {reason}")


def _byte_symbols() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_symbols()


def read_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.json`, without its padding and truncation, and with special tokens never read out of plain text.

    Raises MissingFileError, FileError, or InputError naming the file where it is none.
    """
    source = read_bytes(path)
    try:
        tokenizer = Tokenizer.from_buffer(source)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer.json ({error})") from None

    # Settings of the file that would change what is asked for: ids appended, cut, or taken from text that spells them.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True

    return tokenizer


def _number(config: dict[str, Any], key: str, path: Path) -> float:
    # In Python a bool is an int: `true` in the file would pass for 1.
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path}: {key} is {value!r}, expected a finite number")
    return float(value)


def _integer(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{path}: {key} is {value!r}, expected an integer")
    return value
