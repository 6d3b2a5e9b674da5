"""Texts that are no instruction: what stands for a missing one, and what shows nothing."""

import unicodedata

NO_TEXT = frozenset({"none", "nan", "null", "<na>", "nat", "n/a", "#n/a"})
"""What pandas, JSON and spreadsheets write where there is no text, in lower case."""


def is_missing(text: str) -> bool:
    """Whether a text only says that there is none, such as "None" or "nan"."""
    return text.strip().lower() in NO_TEXT


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or all spaces, line breaks and control characters."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def says_nothing(text: str) -> bool:
    """Whether a text cannot be an instruction."""
    return is_blank(text) or is_missing(text)
