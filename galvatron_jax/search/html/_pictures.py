"""Charts of the page as SVG files of their own, for documents and slides."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ._markup import Markup, tag
from ._style import STYLE

PICTURE = re.compile(r'<svg (viewBox="0 0 ([0-9.]+) ([0-9.]+)".*?)>(.*?)</svg>', flags=re.DOTALL)
"""What ``_draw.chart`` writes; pictures hold no pictures."""


def standalone(markup: Markup) -> Iterator[tuple[str, Markup]]:
    """Yield (number, file content) of every picture in ``markup``; the only one has no number."""
    found = PICTURE.findall(markup)
    for i, (attributes, width, height, content) in enumerate(found):
        ground = tag("rect", width=float(width), height=float(height), style="fill: var(--ground)")
        style = Markup(f"<style>{STYLE}text {{ font-family: sans-serif; }}</style>")
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {attributes} width="{width}" height="{height}">'
        yield str(i + 1) if len(found) > 1 else "", Markup(f"{head}{style}{ground}{content}</svg>\n")
