"""Every error a user can mend: what is wrong, where, what was got, what was expected, and the nearest fix.

The command line shows an `InsulaError` as one line. Anything else that reaches it is a fault of this package, and is
shown as one. Each class also derives from the built-in error a Python user would expect to catch.
"""

import difflib
from collections.abc import Iterable


class InsulaError(Exception):
    """The base of all: something outside this package must change, and the message says what."""


class InputError(InsulaError, ValueError):
    """A setting, an argument or an observation cannot be used."""


class ObservationError(InputError):
    """A policy cannot act on an observation; `field` is the part of it that is wrong, such as "images.front"."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field

    # As for `DatasetError` below.
    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.field)


class MissingFileError(InsulaError, FileNotFoundError):
    """A file or folder that was named, or that must be there, is not."""


class FileError(InsulaError, OSError):
    """A file, folder or port is there, but cannot be read or used as asked."""


class DatasetError(InsulaError, ValueError):
    """A data set on disk is missing, damaged or not what was asked for.

    `fault` is the doctor's name for it (`insula.data.lerobot.doctor.REMEDIES`).
    """

    def __init__(self, message: str, fault: str = "metadata") -> None:
        super().__init__(message)
        self.fault = fault

    # Worker processes send errors back pickled, and by default only the message would go into the constructor again.
    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.fault)


class TokenBudgetError(InsulaError, ValueError):
    """A part of a sample takes `length` tokens, more than its `limit`. Nothing is ever cut silently.

    By `part` a reader of data tells a prompt that never fits from one long chunk.
    """

    def __init__(self, part: str, length: int, limit: int, remedy: str) -> None:
        super().__init__(f"the {part} takes {length} tokens, the limit is {limit}; {remedy}")
        self.part = part
        self.length = length
        self.limit = limit
        self.remedy = remedy

    # As above: here the message alone would not even fit the constructor.
    def __reduce__(self) -> tuple:
        return type(self), (self.part, self.length, self.limit, self.remedy)


class FASTRangeError(InsulaError, ValueError):
    """A coefficient of the chunk has no symbol in this codec."""


class CheckpointError(InsulaError, RuntimeError):
    """A checkpoint is missing, damaged, or of another model."""


class WorkerError(InsulaError, RuntimeError):
    """A process that makes batches has died, so the batch that is due will never come."""


class InsulationError(InsulaError, RuntimeError):
    """Insulation is not what this model has, or this batch cannot show it."""


class NonFiniteError(InsulaError, FloatingPointError):
    """A loss, a metric or an action became NaN or infinite."""


class DecodeError(InsulaError, ValueError):
    """What a model generated is no answer: no chunk of actions, or no end. Nothing is to be executed."""


class ProtocolError(InsulaError, ValueError):
    """A message between a robot and a policy server cannot be used. `kind` is one of `insula.client.ErrorKind`, `field`
    the place in the message, "" for all of it."""

    def __init__(self, kind: str, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.kind = kind
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple:
        return type(self), (self.kind, self.field, self.message)


class ServerError(InsulaError, RuntimeError):
    """A policy server cannot be reached, or has gone; the request may be sent again once it is back."""


class GLError(InsulaError, RuntimeError):
    """No off-screen OpenGL backend works here."""


def brief(error: BaseException) -> str:
    """Another library's error in one short line: some print whole specifications."""
    if isinstance(error, RecursionError):
        return "nested too deeply"

    first = (str(error).strip().splitlines() or [""])[0].strip()
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__

    return said if len(said) <= 160 else f"{said[:157]}..."


def printable(text: str, limit: int = 2000) -> str:
    """Text of others, safe for a terminal, a page and a file: one line, no control characters, at most `limit` long."""
    # Surrogates alone are no text that can be written; JSON can hold them.
    text = text[:limit].encode("utf-8", "replace").decode("utf-8")

    return "".join(one if one.isprintable() else " " for one in text)


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """The nearest known name as " (did you mean 'x'?)", or "" where none is near."""
    # 0.6 is difflib's own measure of near: one or two letters of a short name. Farther ones would be guesses.
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)

    return f" (did you mean {near[0]!r}?)" if near else ""
