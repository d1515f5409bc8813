"""The difference of two plans as lines of text."""

from __future__ import annotations

from collections.abc import Callable

from ..._text import Line, Piece, clean, table
from ...units import GIB, format_count, format_seconds
from ._diff import PlanDiff


def diff_lines(diff: PlanDiff, a: str, b: str) -> list[Line]:
    """Return the lines for the plans in the files ``a`` and ``b``."""
    if not diff.differences and diff.step_time_s[0] == diff.step_time_s[1]:
        return [(Piece("the plans are equal", "green"),)]
    rows = [[clean(d.what), clean(d.a), clean(d.b), ""] for d in diff.differences]
    rows += _figures("step time", diff.step_time_s, format_seconds)
    rows += _figures("tokens/s", diff.tokens_per_s, format_count)
    rows += _figures("peak GiB", diff.peak_bytes, _gib)
    for name, times in diff.times_s.items():
        rows += _figures(f"  {_words(name)}", times, format_seconds) if any(times) else []
    for name, sizes in diff.memory_bytes.items():
        rows += _figures(f"  {_words(name)} GiB", sizes, _gib) if any(sizes) else []
    return table(["", f"A {clean(a)}", f"B {clean(b)}", "B against A"], rows, left=3, indent=0)


def _figures(name: str, pair: tuple[float | None, float | None], shown: Callable[[float], str]) -> list[list[str]]:
    left, right = pair
    if left is None or right is None:
        return []
    change = "" if not left else "equal" if abs(right / left - 1) < 5e-4 else f"{right / left - 1:+.1%}"
    return [[name, shown(left), shown(right), change]]


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f}"


def _words(name: str) -> str:
    return clean(name.replace("_", " "))
