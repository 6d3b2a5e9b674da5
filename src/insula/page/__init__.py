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
from insula.page.html import Html, as_html, tag

TEMPLATE_FOLDER = Path(__file__).parent


def render_page(title: str, body: Html, style: str = "", scripts: Sequence[str] = ()) -> str:
    """The whole file. `style` comes after the common theme; `scripts` run in order once the body is there."""
    # By hash and not 'unsafe-inline': a script that somebody's task name smuggled in would have another one. Without a
    # script nothing is allowed to run, by default-src 'none' in the template.
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts]
    allowed = "script-src " + " ".join(f"'sha256-{digest}'" for digest in hashes) if hashes else ""

    template = string.Template((TEMPLATE_FOLDER / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=as_html(title),
        theme=(TEMPLATE_FOLDER / "theme.css").read_text(encoding="utf-8"),
        style=style,
        scripts=allowed,
        body=as_html([body, *(tag("script", Html(script)) for script in scripts)]),
    )


def write_page(path: str | Path, page: str) -> Path:
    """Write it whole or not at all. Returns its path. Raises FileError for a folder."""
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path}: a folder; name a file in it, such as {path / 'page.html'}")

    # Beside it and then renamed, which is one step on one disk: a page that is there is complete.
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(page, encoding="utf-8")

    return unfinished.replace(path)
