"""Reading a data set's text files. Each way in which one can be unusable is recognized, and has its own remedy.

The `fault` of the errors raised here is one of FAULTS, for the doctor.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from insula.errors import DatasetError, FileError, InputError
from insula.files import JSON_LIMIT, TEXT_LIMIT, lfs_size_of, parse_json, read_bytes

FAULTS = {
    "git lfs": "the files were cloned without their contents: run git lfs install and git lfs pull in the data set",
    "empty file": "the copy broke off: copy the file again",
    "web page": "download the file again, signed in where its source asks for it",
    "encoding": "save the file as UTF-8",
    "other version": "correct codebase_version in meta/info.json",
}
_ENCODINGS = ("utf-16", "gb18030", "shift_jis", "euc_kr", "cp1252")
_CALLED = {"gb18030": "GBK", "utf-16": "UTF-16", "shift_jis": "SHIFT_JIS", "euc_kr": "EUC-KR", "cp1252": "CP1252"}
INT64 = 2**63
MANY = 2**21
"""The most rows a table of episodes or tasks may have."""


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises MissingFileError, or DatasetError with a fault
    and what to do about it."""
    try:
        raw = read_bytes(path, limit)
    except FileNotFoundError:
        raise
    except FileError as error:
        raise DatasetError(f"{error}; restore it from the data set's source") from None

    # Each of these is a text that JSON would call invalid at character 0, which helps nobody.
    if (size := lfs_size_of(raw)) is not None:
        raise DatasetError(lfs_message(path, size), "git lfs")
    if is_web_page(raw):
        raise DatasetError(f"{path}: is a web page, not the file itself; download it again", "web page")
    if not raw.strip():
        raise DatasetError(f"{path}: is empty ({len(raw)} bytes){_empty_too(path)}; copy meta/ again", "empty file")

    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(_not_utf8(path, raw, error), "encoding") from None


def lfs_message(path: Path, size: int) -> str:
    """What to say about a Git LFS pointer to a file of `size` bytes."""
    return (
        f"{path}: is a Git LFS pointer, not the file itself ({size:,} bytes); run git lfs install, then git lfs pull "
        "where the data set was cloned"
    )


def is_web_page(raw: bytes) -> bool:
    """What a download leaves where its source wanted somebody to sign in."""
    return raw[:64].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _empty_too(path: Path) -> str:
    # A copy that broke off leaves more than one, and they are mended together.
    others = [p.name for p in visible(path.parent) if p != path and p.is_file() and not p.stat().st_size]
    return f", and {', '.join(others[:10])} too" if others else ""


def visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without the dot files that file managers leave (._tasks.jsonl, .DS_Store)."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if not entry.name.startswith("."))
    except (OSError, ValueError):
        return []


def _not_utf8(path: Path, raw: bytes, error: UnicodeDecodeError) -> str:
    """Names the encodings in which the start of the file is JSON."""
    # The first lines are enough: decoding 64 MiB five times is not.
    fitting = [name for name in _ENCODINGS if _is_json_in(raw[: 2**16], name)]
    said = f"{path}: is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x})"
    if not fitting:
        return f"{said}; save it as UTF-8, or restore it from the data set's source"

    called = [_CALLED[name] for name in fitting]
    return f"{said}, it reads as {' or '.join(called[:2])}; save it as UTF-8: iconv -f {called[0]} -t UTF-8"


def _is_json_in(raw: bytes, encoding: str) -> bool:
    # Without its mark, any text of even length is UTF-16.
    if encoding == "utf-16" and raw[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return False

    try:
        text = raw.decode(encoding).lstrip("\ufeff").strip()
        json.loads(text if text.startswith("{\n") else text.split("\n")[0])
    except (UnicodeDecodeError, ValueError, RecursionError):
        return False
    return True


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises MissingFileError or DatasetError."""
    try:
        raw = parse_json(read_text(path, JSON_LIMIT), str(path))
        # Now, rather than when a message is printed in the middle of training.
        json.dumps(raw, ensure_ascii=False).encode()  # a lone surrogate could be neither printed nor written
    except InputError as error:
        raise DatasetError(f"{error}; restore it from the data set's source") from None
    except UnicodeEncodeError:
        raise DatasetError(f"{path}: holds a text that is no valid Unicode (half of a surrogate pair)") from None
    except RecursionError:
        raise DatasetError(f"{path}: not usable as JSON (nested too deeply)") from None

    if not isinstance(raw, dict):
        raise DatasetError(f"{path}: got a JSON {type(raw).__name__}, expected an object (codebase_version, fps, ...)")

    return raw


def read_lines(path: Path, *needed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, object) for each line of a file of JSON lines. Lines end at a line feed and nowhere else: a text
    may hold what other tools call line breaks. Objects that a tool has spread over several lines are read as well.

    Raises DatasetError naming file and line.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing; the copy of the data set is incomplete") from None

    for number, value in _spread(text, path) or _values(text, path):
        where = f"{path}, line {number}"
        if not isinstance(value, dict) or any(key not in value for key in needed):
            raise DatasetError(f"{where}: expected an object with {', '.join(needed)}")
        yield where, value


def _values(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # splitlines() would also break at U+2028 and at form feeds, which texts may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line, f"{path}, line {number}")
        except InputError as error:
            raise DatasetError(str(error)) from None


def _spread(text: str, path: Path) -> list[tuple[int, Any]]:
    """The objects of a file whose first one takes several lines, or which is one list; empty for any other file."""
    start = text.lstrip()
    # Only a file that starts like one: the rest is read line by line, in bounded memory.
    if len(text) > JSON_LIMIT or not (start.startswith("[") or start[1:].lstrip(" \t\r").startswith("\n")):
        return []

    found: list[tuple[int, Any]] = []
    # raw_decode stops behind one value, wherever its lines end.
    decoder, at = json.JSONDecoder(), 0
    try:
        while at < len(text):
            if text[at].isspace():
                at += 1
                continue
            line = text.count("\n", 0, at) + 1
            value, at = decoder.raw_decode(text, at)
            found += [(line, entry) for entry in value] if isinstance(value, list) else [(line, value)]
    except (ValueError, RecursionError):
        return []  # which line is wrong is said when they are read one by one

    return found


def whole_number(value: Any, what: str, where: str, least: int = 0) -> int:
    """`value` as an integer that fits 64 bits. Raises DatasetError for null, a text, a fraction or a truth value."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    # pandas makes floats of whole numbers where one of them is missing.
    if isinstance(value, float) and value.is_integer():
        is_whole = True
    if not is_whole or not least <= value < INT64:
        raise DatasetError(f"{where}: {what!r} is {shown(value)}, expected a whole number from {least} on")

    return int(value)


def task_text(value: Any, where: str, what: str = "task") -> str:
    """Raises DatasetError where a task, or a text called `what`, is none."""
    if not isinstance(value, str):
        raise DatasetError(f"{where}: {what!r} is {shown(value)}, expected a text")

    try:
        value.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{where}: {what!r} is no valid Unicode (half of a surrogate pair)") from None

    return value


def task_texts(value: Any, where: str) -> tuple[str, ...]:
    """The tasks of an episode, which some recorders write as one text, or not at all."""
    if value is None:
        return ()

    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise DatasetError(f"{where}: 'tasks' is {shown(value)}, expected a list of texts")

    return tuple(listed)


def shown(value: Any) -> str:
    """`value` as JSON writes it, cut where it is long."""
    # Python refuses to print integers of more than 4300 digits.
    if isinstance(value, int) and abs(value) >= INT64:
        return "a number of more than 64 bits"

    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"

    return text if len(text) <= 80 else text[:77] + "..."
