"""Tables and lines as plain text, for whoever prints them."""

import io

from rich.console import Console
from rich.table import Table


def as_text(*parts: Table | str, width: int = 120) -> str:
    """What rich would print, without colors."""
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False)
    for part in parts:
        console.print(part, markup=False)
    return text.getvalue().rstrip()
