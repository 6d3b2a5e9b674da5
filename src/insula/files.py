"""Files as this package reads and writes them: regular files only, of bounded size, in UTF-8.

Data sets and checkpoints come from others. What a file claims is looked at before anything is allocated for it.
"""

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insula.errors import FileError, InputError, MissingFileError, did_you_mean

MIB = 2**20
TEXT_LIMIT = 64 * MIB
"""The largest file of JSON lines."""
JSON_LIMIT = 8 * MIB
"""The largest text parsed as one JSON value, which may take forty times its size in memory."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def is_named(path: Path) -> bool:
    """Whether a folder has an entry of that name, even a link that leads nowhere: what is there and cannot be read is
    an error, and never the same as nothing."""
    return os.path.lexists(path)


def regular_size(path: Path) -> int:
    """The size of a file in bytes. Raises MissingFileError, or FileError for anything that is no regular file: reading
    a pipe would wait forever, reading a device would never end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise FileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise FileError(f"{path}: is {kind}, expected a file")

    return status.st_size


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises MissingFileError or FileError."""
    size = regular_size(path)
    if size > limit:
        raise FileError(f"{path}: has {size / MIB:,.3g} MiB, at most {limit / MIB:.3g} MiB are read")

    try:
        with path.open("rb") as file:
            return file.read(limit)  # it may have grown since it was measured
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from None


def lfs_size(path: Path) -> int | None:
    """The size in bytes of the real file where `path` is only a Git LFS pointer to it, else None. Raises
    MissingFileError or FileError."""
    if regular_size(path) > 1024:  # the format's own limit for pointers
        return None

    return lfs_size_of(read_bytes(path, 1024))


def lfs_size_of(raw: bytes) -> int | None:
    """The size in bytes that a file's content `raw` claims as a Git LFS pointer, 0 where it names none; None where it
    is no pointer."""
    if not raw.startswith(LFS_POINTER):
        return None

    # Python refuses integers of thousands of digits with an error that names no file; nobody has 10²⁰ bytes.
    sizes = [line[5:] for line in raw.split(b"\n") if line.startswith(b"size ")]
    return int(sizes[0]) if sizes and sizes[0].isdigit() and len(sizes[0]) < 20 else 0


def parse_json(text: str, where: str) -> Any:
    """The JSON value of `text`. Raises InputError naming `where`."""
    if len(text) > JSON_LIMIT:
        raise InputError(f"{where}: {len(text) / MIB:.0f} MiB of JSON in one value, at most {JSON_LIMIT / MIB:g} MiB")

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise InputError(f"{where}: not usable as JSON (nested too deeply)") from None
    except ValueError:  # Python's own limit on the digits of an integer
        raise InputError(f"{where}: not usable as JSON (a number of more than 4300 digits)") from None


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object with at least the keys `needed`. Raises MissingFileError, FileError, or InputError naming the file
    and what is wrong in it."""
    raw = read_bytes(path, JSON_LIMIT)
    if lfs_size_of(raw) is not None:
        raise InputError(f"{path}: a Git LFS pointer, not the file itself; run git lfs pull where it was cloned")

    try:
        content = parse_json(raw.decode("utf-8-sig"), str(path))  # some editors put a byte order mark in front
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not JSON ({error})") from None

    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    if missing := [key for key in needed if key not in content]:
        raise InputError(
            f"{path}: no {', '.join(map(repr, missing))}; found {', '.join(map(repr, content)) or 'nothing'}"
        )

    return content


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, all of it or nothing: a process killed while writing leaves the file as it was."""
    partial = path.with_name(f"{path.name}.partial")  # beside it: a file cannot be renamed to another file system
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def as_path(text: object, where: str) -> Path:
    """Text of a settings file as a path. Raises InputError for what no file system takes."""
    if not isinstance(text, str) or "\0" in text or not text.isprintable():
        raise InputError(f"{where} is {text!r:.80}, expected the path of a file or folder")

    return Path(text)


def check_output_file(path: Path, endings: Sequence[str], setting: str) -> None:
    """Make sure, before long work, that a file can be written: ending, place, permission. Makes missing parents.

    Raises InputError for another ending than `endings`, FileError where nothing can be written there.
    """
    if path.suffix.lower() not in endings:
        hint = did_you_mean(path.suffix.lower(), endings)
        raise InputError(f"{setting} {path}: ending {path.suffix!r}, expected one of {', '.join(endings)}{hint}")

    if path.exists() and not path.is_file():  # to open a pipe would wait for whoever reads it
        raise FileError(f"{setting} {path}: is there, and is no file; choose another place")

    # By trying, since permissions do not tell: the disk may be read-only, or we root. To append leaves a file as it is.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise FileError(f"{setting} {path}: cannot be written ({error.strerror}); choose another place") from None


def check_output_folder(path: Path, setting: str) -> None:
    """Make sure, before long work, that files can be written to a folder, which is made where it is missing.

    Raises FileError where that is not so.
    """
    probe = path / ".writable"  # a file, for a folder that is there may still refuse one
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FileError(f"{setting} {path}: cannot be written ({error.strerror}); choose another folder") from None
