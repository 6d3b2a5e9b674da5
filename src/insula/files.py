"""JSON files, as this package writes and reads them."""

import json
from pathlib import Path
from typing import Any

from insula.errors import InputError


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
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
