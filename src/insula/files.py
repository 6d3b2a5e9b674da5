"""Files this package writes, and JSON as it reads it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insula.errors import FileError, InputError, did_you_mean


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object with at least the keys `needed`. Raises FileNotFoundError, or ValueError naming the file and what
    is wrong in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    if missing := [key for key in needed if key not in content]:
        raise InputError(
            f"{path}: no {', '.join(map(repr, missing))}; found {', '.join(map(repr, content)) or 'nothing'}"
        )
    return content


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing: whoever is killed while writing leaves the file as it was."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check_output_file(path: Path, endings: Sequence[str], setting: str) -> None:
    """Make sure, before long work, that a file can be written: ending, place, permission. Makes missing parents.

    Raises InputError for another ending than `endings`, FileError where nothing can be written there.
    """
    if path.suffix.lower() not in endings:
        hint = did_you_mean(path.suffix.lower(), endings)
        raise InputError(f"{setting} {path}: ending {path.suffix!r}, expected one of {', '.join(endings)}{hint}")
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
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FileError(f"{setting} {path}: cannot be written ({error.strerror}); choose another folder") from None
