"""What was measured of each layer kind, as rows of text."""

from __future__ import annotations

from collections.abc import Iterator

from ..measured import Measured, PassTable
from ..profile import ModelProfile
from ..units import format_gib, format_seconds
from ._report import Row


def layer_rows(model: ModelProfile) -> tuple[Row, ...]:
    """Return one row for each pass of each kind and degree: seconds at the fewest and the most samples."""
    return tuple(row for kind in model.kinds if kind.measured for row in _rows(kind.name, kind.measured))


def _rows(name: str, measured: Measured) -> Iterator[Row]:
    workspace = {table.tp: table for table in measured.memory}
    for table in measured.passes:
        memory = workspace.get(table.tp)
        shown = format_gib(memory.workspace_bytes[-1]) if memory and table.what == "backward" else ""
        yield Row(f"{name}, tp {table.tp}, {table.what}", _times(table), shown)
    if measured.interpolation_error:
        yield Row(f"{name}, largest error of interpolation", f"{measured.interpolation_error:.1%}", "")


def _times(table: PassTable) -> str:
    ends = dict.fromkeys((0, len(table.samples) - 1))
    return "   ".join(
        f"{format_seconds(table.times_s[i])} for {table.samples[i]} sample{'s' * (table.samples[i] > 1)}" for i in ends
    )
