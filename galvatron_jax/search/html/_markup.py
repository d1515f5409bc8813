"""Markup that cannot be broken by a name: every text is escaped unless it is markup already.

>>> str(tag("b", "<script>", title='"x"'))
'<b title="&quot;x&quot;">&lt;script&gt;</b>'
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from ..._text import clean

VOID = {"meta", "br"}
"""HTML elements without content or end."""


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


def text(value: str) -> Markup:
    """Return a string from anywhere as markup: escaped, without control characters."""
    return value if isinstance(value, Markup) else Markup(html.escape(clean(value)))


def join(parts: Iterable[str]) -> Markup:
    """Return parts in a row, each escaped unless it is markup."""
    return Markup("".join(text(part) for part in parts))


def tag(name: str, *children: str, **attributes: str | float) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        *children: Content; strings are escaped.
        **attributes: A final underscore is dropped (``class_``), others become hyphens (``stroke_width``).
    """
    written = "".join(f' {_attribute(key)}="{_value(value)}"' for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def _attribute(key: str) -> str:
    return "viewBox" if key == "view_box" else key.rstrip("_").replace("_", "-")


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return html.escape(clean(value))
    return f"{value:.2f}".rstrip("0").rstrip(".")
