"""Parts that all charts share: size, ticks, axes, legends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ._markup import Markup, join, tag

WIDTH = 1100.0
"""User units of a chart; the page scales it, and scrolls it sideways on a phone."""

STRATEGY_COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#e15759", "#76b7b2", "#edc948", "#9c755f", "#ff9da7", "#bab0ac",
)  # fmt: skip
"""Tableau 10: told apart by most colour-blind readers, on light and dark ground."""

MEMORY_COLOURS = {
    "parameters": "#4e79a7",
    "gradients": "#76b7b2",
    "optimizer": "#b07aa1",
    "residuals": "#f28e2b",
    "live": "#e15759",
    "boundary": "#9c755f",
}
TIME_COLOURS = {
    "compute": "#4e79a7",
    "recompute": "#a0cbe8",
    "tensor_communication": "#f28e2b",
    "data_communication": "#ffbe7d",
    "relayout": "#e15759",
    "optimizer": "#b07aa1",
    "bubble": "#bab0ac",
}


def chart(height: float, *parts: str, label: str, width: float = WIDTH) -> Markup:
    """Return an SVG picture in a box that scrolls when the screen is narrow."""
    picture = tag("svg", *parts, view_box=f"0 0 {width:g} {height:g}", role="img", aria_label=label)
    return tag("div", picture, class_="chart" if width > WIDTH / 2 else "chart small")


def rect(x: float, y: float, width: float, height: float, title: str = "", **attributes: str | float) -> Markup:
    """Return a rectangle that says ``title`` when the mouse rests on it."""
    children = [tag("title", title)] if title else []
    return tag("rect", *children, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), **attributes)


def label(x: float, y: float, words: str, anchor: str = "start", **attributes: str | float) -> Markup:
    """Return a text at a point."""
    return tag("text", words, x=x, y=y, text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def legend(items: Iterable[tuple[str, str]]) -> Markup:
    """Return names with their colours."""
    keys = [
        tag("span", tag("i", style=f"background:{colour}"), name.replace("_", " "), class_="key")
        for name, colour in items
    ]
    return tag("div", *keys, class_="legend")


def ticks(top: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from 0 to ``top``.

    >>> ticks(9.5)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    if not top > 0:
        return [0.0]
    raw = top / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = size * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * (1 - 1e-9))
    return [i * step for i in range(int(top / step * (1 + 1e-9)) + 1)]


def axis_x(
    values: Sequence[float], place: Callable[[float], float], top: float, bottom: float, show: Callable[[float], str]
) -> Markup:
    """Return vertical lines with values below them."""
    return join(
        part
        for value in values
        for part in (
            line(place(value), top, place(value), bottom, "grid"),
            label(place(value), bottom + 16, show(value), "middle", class_="tick"),
        )
    )


def axis_y(
    values: Sequence[float], place: Callable[[float], float], left: float, right: float, show: Callable[[float], str]
) -> Markup:
    """Return horizontal lines with values to their left."""
    return join(
        part
        for value in values
        for part in (
            line(left, place(value), right, place(value), "grid"),
            label(left - 6, place(value) + 4, show(value), "end", class_="tick"),
        )
    )
