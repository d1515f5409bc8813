"""Lines of text with a little style: plain and aligned in a pipe, coloured on a terminal.

Text from documents (model, kind and file names) comes from strangers: control characters are removed, and nothing is
read as markup, because styles are attached to pieces of text and not written into them.
"""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TextIO

import msgspec

Style = Literal["", "bold", "dim", "green", "yellow", "red", "cyan"]
LABEL_WIDTH = 9
NARROWEST = 50
"""Columns below which a terminal wraps by itself."""


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
    """Write a value of our own as JSON."""
    file.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def show(lines: Iterable[Line], file: TextIO) -> None:
    """Write the lines; in colour when ``file`` is a terminal and ``NO_COLOR`` is not set."""
    if not file.isatty() or os.environ.get("NO_COLOR"):
        file.write(plain(lines))
        return
    from rich.console import Console  # only here: importing rich takes as long as a small search
    from rich.text import Text

    console = Console(file=file, highlight=False, soft_wrap=True)
    width = shutil.get_terminal_size().columns
    for line in lines:
        for part in wrapped(line, width):
            console.print(Text.assemble(*((piece.text, piece.style) for piece in part)))


def wrapped(line: Line, width: int) -> list[Line]:
    """Return a line as lines of at most ``width`` columns, broken between words; they begin below the line's last cell.

    The last cell is what follows the label, or the last gap of two spaces. A word longer than the room stays whole.
    """
    text = "".join(piece.text for piece in line)
    if len(text) <= width or width < NARROWEST:
        return [line]
    labelled_ = bool(line) and line[0].style == "cyan"
    indent = LABEL_WIDTH if labelled_ else text.rstrip().rfind("  ") + 2
    indent = indent if 0 < indent <= width * 2 // 3 else LABEL_WIDTH
    ends: list[int] = []
    start, room = 0, width
    while len(text) - start > room:
        gap = text.rfind(" ", start + 1 if ends else indent, start + room + 1)
        if gap < 0:
            break
        ends.append(gap)
        start, room = gap + 1, width - indent
    starts, stops = [0, *(end + 1 for end in ends)], [*ends, len(text)]
    parts = [_part(line, a, b) for a, b in zip(starts, stops, strict=True)]
    return [parts[0], *((Piece(" " * indent), *part) for part in parts[1:])]


def _part(line: Line, start: int, stop: int) -> Line:
    """The columns from ``start`` up to ``stop`` of a line."""
    pieces, at = [], 0
    for piece in line:
        text = piece.text[max(start - at, 0) : max(stop - at, 0)]
        if text:
            pieces.append(Piece(text, piece.style))
        at += len(piece.text)
    return tuple(pieces)
