"""One offline HTML file from its parts: nothing is fetched, and no script runs but ours.

Light and dark, on a laptop and on a phone. The policy inside the file names every script by its hash, so text from
anyone's data cannot run, whatever it holds.
"""

import base64
import hashlib
import string
from collections.abc import Sequence
from pathlib import Path

from insula.errors import FileError
from insula.page.html import Html, tag, text

HERE = Path(__file__).parent


def render(title: str, body: Html, style: str = "", scripts: Sequence[str] = ()) -> str:
    """The whole file. `style` comes after the common theme; `scripts` run in order once the body is there."""
    template = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts]
    return template.substitute(
        title=text(title),
        theme=(HERE / "theme.css").read_text(encoding="utf-8"),
        style=style,
        scripts="script-src " + " ".join(f"'sha256-{digest}'" for digest in hashes) if hashes else "",
        body=text([body, *(tag("script", Html(script)) for script in scripts)]),
    )


def write(path: str | Path, page: str) -> Path:
    """Write it whole or not at all. Returns its path. Raises IsADirectoryError for a folder."""
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: a folder; name a file in it, such as {path / 'page.html'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(page, encoding="utf-8")
    return unfinished.replace(path)
