"""A SHA-256 of every file of a finished checkpoint, in the form that `sha256sum -c SHA256SUMS` reads.

Orbax restores a flipped bit without complaint, and what travels beside the weights (settings, tokenizer, normalization)
may be changed into something else that can be read as well.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

from insula.errors import CheckpointError
from insula.files import is_named, read_bytes, regular_size

SEAL_FILE = "SHA256SUMS"
UNFINISHED = f"{SEAL_FILE}.unfinished"
UNSEALED = ".unsealed"
"""The end of a file's name until it is sealed: whoever is killed in between leaves no checkpoint that looks damaged."""


def seal(folder: Path) -> None:
    """Write the sums of all files below `folder`: whole or not at all."""
    lines = "".join(_line(folder, path) for path in sorted(_files(folder)))
    _write(folder, lines)


def add_to_seal(folder: Path, path: Path, write: Callable[[Path], object]) -> None:
    """A file that comes later: `write` is given a path, which becomes `path`. Without a seal `folder` gets none."""
    unsealed = path.with_name(path.name + UNSEALED)
    write(unsealed)
    if (folder / SEAL_FILE).is_file():
        line = f"{_digest(unsealed)}  {path.relative_to(folder).as_posix()}\n"
        _write(folder, read_bytes(folder / SEAL_FILE).decode() + line)
    unsealed.replace(path)


def finish_seal(folder: Path) -> None:
    """After whoever wrote here was killed: a seal where there is none, and what was to be added, added or gone."""
    listed = _read(folder) if is_named(folder / SEAL_FILE) else {}
    for unsealed in folder.rglob(f"*{UNSEALED}*"):
        path = unsealed.with_name(unsealed.name.removesuffix(UNSEALED))
        if path.relative_to(folder).as_posix() in listed:
            unsealed.replace(path)
        else:
            unsealed.unlink()

    if not is_named(folder / SEAL_FILE):
        seal(folder)


def find_damage(folder: Path, parts: Collection[str] | None = None) -> str | None:
    """The first file that is not as it was sealed, with what is wrong with it; None where all are, or there is no seal,
    as in checkpoints of older versions. `parts`: of these folders alone, since hashing reads every byte.

    Raises CheckpointError where the seal itself cannot be read, FileError where something in the folder is no file.
    """
    if not is_named(folder / SEAL_FILE):
        return None

    expected = _read(folder)
    found = {path.relative_to(folder).as_posix() for path in _files(folder)}
    for name in sorted(expected.keys() | found):
        if parts is not None and PurePosixPath(name).parts[0] not in parts:
            continue
        if name not in found and not is_named(folder / f"{name}{UNSEALED}"):
            return f"{name} is gone"
        if name not in expected:
            return f"{name} was not there when it was sealed"
        if name in found and _digest(folder / name) != expected[name]:
            return f"{name} has changed"

    return None


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        own = (SEAL_FILE, UNFINISHED)
        yield from (Path(root) / name for name in names if name not in own and UNSEALED not in name)


def _line(folder: Path, path: Path) -> str:
    return f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n"


def _digest(path: Path) -> str:
    regular_size(path)  # raises for a pipe, which would be read for ever
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, str]:
    lines = read_bytes(folder / SEAL_FILE).decode("utf-8", "replace").splitlines()
    pairs = [line.partition("  ") for line in lines]
    if not pairs or any(len(digest) != 64 or not name for digest, _, name in pairs):
        raise CheckpointError(f"{folder / SEAL_FILE}: no list of SHA-256 sums; this checkpoint is damaged")
    return {name: digest for digest, _, name in pairs}


def _write(folder: Path, lines: str) -> None:
    # A seal cut short by a crash would condemn a checkpoint that is whole.
    unfinished = folder / UNFINISHED
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / SEAL_FILE)
