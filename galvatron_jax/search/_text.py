"""Lines of text with a little style: plain and aligned in a pipe, coloured on a terminal.

Text from documents (model, kind and file names) comes from strangers: control characters are removed, and nothing is
read as markup, because styles are attached to pieces of text and not written into them.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TextIO

import msgspec

Style = Literal["", "bold", "dim", "green", "yellow", "red", "cyan"]
LABEL_WIDTH = 9


class Piece(NamedTuple):
    """Some text in one style."""

    text: str
    style: Style = ""


Line = tuple[Piece, ...]


def clean(text: str) -> str:
    """Return ``text`` without control, format and line-breaking characters."""
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))


def labelled(label: str, *pieces: str | Piece) -> Line:
    """Return a line that begins with a label in its own column."""
    return (Piece(f"{label:<{LABEL_WIDTH}}", "cyan"), *(p if isinstance(p, Piece) else Piece(p) for p in pieces))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, indent: int = 2) -> list[Line]:
    """Return aligned lines, the header first.

    Args:
        header: Column titles; an empty last title lets that column run on.
        rows: Cells as text.
        left: How many leading columns are aligned to the left; so is an untitled last column.
        indent: Spaces before the first column.
    """
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    lines: list[Line] = []
    for r, row in enumerate(cells):
        parts = [
            cell.ljust(width) if c < left or not header[c] else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text = " " * indent + "  ".join(parts).rstrip()
        lines.append((Piece(text, "dim" if r == 0 else ""),))
    return lines


def plain(lines: Iterable[Line]) -> str:
    """Return the lines as unstyled text with a final newline."""
    return "".join("".join(piece.text for piece in line).rstrip() + "\n" for line in lines)


def write_json(value: object, file: TextIO) -> None:
    """Write a value of our own as JSON, keys in order."""
    text = msgspec.json.encode(value, order="deterministic")
    file.write(msgspec.json.format(text, indent=2).decode() + "\n")


def show(lines: Iterable[Line], file: TextIO) -> None:
    """Write the lines; in colour when ``file`` is a terminal and ``NO_COLOR`` is not set."""
    if not file.isatty() or os.environ.get("NO_COLOR"):
        file.write(plain(lines))
        return
    from rich.console import Console  # only here: importing rich takes as long as a small search
    from rich.text import Text

    console = Console(file=file, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text.assemble(*((piece.text, piece.style) for piece in line)))
