"""HTML built from values: whatever is not `Html` already is escaped."""

import base64
import html
from typing import Any


class Html(str):
    """Text that is HTML."""


VOID = ("img", "source", "br", "meta")


def text(value: Any) -> Html:
    """`value` as HTML: itself where it is, nothing for None, all of a list or tuple, escaped otherwise."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html("")
    if isinstance(value, list | tuple):
        return Html("".join(text(v) for v in value))
    return Html(html.escape(str(value)))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`. `class_` is class; attributes that are None are left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{text(children)}</{name}>")


def table(head: list[Any], rows: list[list[Any]], class_: str | None = None) -> Html:
    """The first column names its row. Wide tables scroll by themselves, the page never does."""
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else None
    return tag("div", tag("table", top, tag("tbody", body), class_=class_), class_="scroll")


def data_uri(kind: str, raw: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"
