"""Numbers as text, in powers of 1000."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_si(number: float, unit: str) -> str:
    """Return ``number`` with three digits, for example ``"1.05 MB"`` or ``"989 TFLOP/s"``."""
    for size, prefix in _PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def summarize(heading: str, items: Sequence[str], *, most: int = 3) -> list[str]:
    """Return one note that names the first few of ``items`` and counts the rest; no note without items."""
    if not items:
        return []
    rest = f"; and {len(items) - most} more" if len(items) > most else ""
    return [f"{heading}: {'; '.join(items[:most])}{rest}"]
