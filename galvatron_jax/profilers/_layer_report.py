"""What was measured of each layer kind, as rows of text."""

from __future__ import annotations

from collections.abc import Iterator

from ..measured import Measured, MemoryTable, PassTable
from ..profile import ModelProfile
from ..strategy import Strategy
from ..units import format_gib, format_seconds
from ._report import Row


def layer_rows(model: ModelProfile) -> tuple[Row, ...]:
    """Return one row for each pass of each kind and degree: seconds at the fewest and the most samples."""
    return tuple(row for kind in model.kinds if kind.measured for row in _rows(kind.name, kind.measured))


def _rows(name: str, measured: Measured) -> Iterator[Row]:
    for table in measured.passes:
        yield Row(f"{name}, tp {table.tp}, {table.what}", _times(table), "")
    if measured.interpolation_error:
        yield Row(f"{name}, largest error of interpolation", f"{measured.interpolation_error:.1%}", "")


def _times(table: PassTable) -> str:
    ends = dict.fromkeys((0, len(table.samples) - 1))
    return "   ".join(
        f"{format_seconds(table.times_s[i])} for {table.samples[i]} sample{'s' * (table.samples[i] > 1)}" for i in ends
    )


def memory_rows(model: ModelProfile) -> tuple[Row, ...]:
    """Return one row for each compiled strategy of each kind: kept bytes and workspace at the most samples."""
    return tuple(
        Row(f"{kind.name}, {_strategy(table)}, {table.samples[-1]} samples", *_sizes(table))
        for kind in model.kinds
        if kind.memory
        for table in kind.memory.tables
    )


def _sizes(table: MemoryTable) -> tuple[str, str]:
    return format_gib(table.kept_bytes[-1]), format_gib(table.workspace_bytes[-1])


def _strategy(table: MemoryTable) -> str:
    names = ("tp", "sp", "ulysses", "dp", "zero", "replicas", "remat")
    words = str(Strategy(**{name: getattr(table, name) for name in names}))
    return words + ", accumulating" * table.accumulates
