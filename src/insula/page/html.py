"""HTML built from values: whatever is not `Html` already is escaped."""

import base64
import html
from typing import Any


class Html(str):
    """Text that is HTML. Made of a string by hand it is a promise that nobody else's text is in it unescaped."""


VOID_TAGS = ("img", "source", "br", "meta")
"""Elements that have no end."""


def as_html(value: Any) -> Html:
    """`value` as HTML: itself where it is, nothing for None, all of a list or tuple, escaped otherwise."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    if isinstance(value, list | tuple):
        return Html("".join(as_html(v) for v in value))

    return Html(html.escape(str(value)))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`. `class_` is class; attributes that are None are left out."""
    # Attributes are always escaped, even by `Html`: a quote in one would end it.
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )

    return Html(f"<{name}{written}>" if name in VOID_TAGS else f"<{name}{written}>{as_html(children)}</{name}>")


def html_table(head: list[Any], rows: list[list[Any]], class_: str | None = None) -> Html:
    """A table; the first column names its row, and `head` may be empty. Wide tables scroll, the page never does."""
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    # A frame of its own scrolls: a page wider than a phone would have to be dragged about for every line of text.
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else None
    return tag("div", tag("table", top, tag("tbody", body), class_=class_), class_="scroll")


def data_uri(kind: str, raw: bytes) -> str:
    """A file as an address that holds all of it. `kind`: such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"
