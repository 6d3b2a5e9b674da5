"""Tables and lines as plain text, to print or to write to a file."""

import io

from rich.console import Console
from rich.table import Table


def as_text(*parts: Table | str, width: int = 120) -> str:
    """What rich would print, without colors, in lines of at most `width` characters."""
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False)

    # No markup: names from a user's data may hold brackets, which rich would take for its own.
    for part in parts:
        console.print(part, markup=False)

    return text.getvalue().rstrip()
