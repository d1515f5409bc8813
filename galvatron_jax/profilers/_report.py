"""The profile as text: what was measured, and beside it what the base profile promised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..profile import CollectiveTable, HardwareProfile
from ..units import format_seconds
from ._compute_parts import MOST_SLOWDOWN
from ._links import bus_factor, expected_seconds, link_of
from ._text import format_si


class Row(NamedTuple):
    """One line of the table, every cell text."""

    what: str
    measured: str
    expected: str


HEADINGS = ("", "measured", "expected")


def report_rows(profile: HardwareProfile, base: HardwareProfile) -> tuple[Row, ...]:
    """Return the table that compares a measured profile with the one it started from."""
    rows = [
        Row(f"product {dtype}", _flops(peak * _best(profile)), _flops(base.matmul_flops_per_s[dtype] * _best(base)))
        for dtype, peak in profile.matmul_flops_per_s.items()
        if dtype in base.matmul_flops_per_s
    ]
    rows += [
        Row("memory copy", _rate(profile.memory_bandwidth_bytes_per_s), _rate(base.memory_bandwidth_bytes_per_s)),
        Row("kernel launch", _short(profile.kernel_launch_s), _short(base.kernel_launch_s)),
        Row("program", _short(profile.program_s), _short(base.program_s)),
        Row("slowdown of compute beside a collective", _factor(profile), _factor(base)),
    ]
    return (*rows, *(_collective_row(table, base) for table in profile.collectives))


def plain_table(rows: Sequence[Row], headings: tuple[str, str, str] = HEADINGS) -> str:
    """Return ``rows`` as aligned text, the first column left, the others right."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}".rstrip() for line in lines
    )


def _collective_row(table: CollectiveTable, base: HardwareProfile) -> Row:
    place = "in a node" if table.inside_node else "across nodes"
    link = link_of(base, inside_node=table.inside_node)
    smallest, largest = table.sizes_bytes[0], table.sizes_bytes[-1]
    expected = [expected_seconds(table.kind, table.group, size, link) for size in (smallest, largest)]
    factor = bus_factor(table.kind, table.group)
    return Row(
        f"{table.kind}, {table.group} devices {place}",
        f"{_short(table.times_s[0])}  {_rate(factor * largest / table.times_s[-1])}",
        f"{_short(expected[0])}  {_rate(factor * largest / expected[1])}",
    )


def _best(profile: HardwareProfile) -> float:
    return max(point.efficiency for point in profile.matmul_efficiency)


def _factor(profile: HardwareProfile) -> str:
    return f"{profile.overlap_slowdown:.2f}" if profile.overlap_slowdown < MOST_SLOWDOWN else "stands still"


def _flops(flops_per_s: float) -> str:
    return format_si(flops_per_s, "FLOP/s")


def _rate(bytes_per_s: float) -> str:
    return format_si(bytes_per_s, "B/s")


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-4 else format_seconds(seconds)
