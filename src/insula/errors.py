"""What error messages share."""

import difflib
from collections.abc import Iterable


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """The nearest known name as " (did you mean 'x'?)", or "" where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
