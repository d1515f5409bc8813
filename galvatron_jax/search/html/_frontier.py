"""The frontier: how fast the best plan is, by the memory that it may use."""

from __future__ import annotations

from collections.abc import Sequence

from ...units import GIB, format_count
from ..explain import Point
from ._draw import WIDTH, axis_x, axis_y, chart, label, line, ticks
from ._markup import Markup, tag

HEIGHT, LEFT, TOP, BOTTOM = 300.0, 70.0, 14.0, 44.0


def frontier_chart(points: Sequence[Point], budget_bytes: int, chosen_bytes: int) -> Markup:
    """Return the chart of peak memory against tokens per second.

    Args:
        points: The frontier, the most memory first.
        budget_bytes: The given budget.
        chosen_bytes: Peak of the plan that the page is about.
    """
    right, bottom = WIDTH - 20, HEIGHT - BOTTOM
    most = max(budget_bytes, *(point.peak_bytes for point in points)) * 1.05
    fastest = max(point.tokens_per_s for point in points) * 1.08

    def across(size_bytes: float) -> float:
        return LEFT + size_bytes / most * (right - LEFT)

    def up(tokens_per_s: float) -> float:
        return bottom - tokens_per_s / fastest * (bottom - TOP)

    parts = [
        axis_x([t * GIB for t in ticks(most / GIB, 10)], across, TOP, bottom, lambda size: f"{size / GIB:g}"),
        axis_y(ticks(fastest), up, LEFT, right, format_count),
        label((LEFT + right) / 2, HEIGHT - 6, "peak GiB per GPU", "middle", class_="axis"),
        label(LEFT, TOP - 3, "tokens/s", "end", class_="axis"),
        line(across(budget_bytes), TOP, across(budget_bytes), bottom, "budget"),
        label(across(budget_bytes) - 6, bottom - 8, "budget", "end", class_="tick"),
    ]
    rising = sorted(points, key=lambda point: point.peak_bytes)
    steps = f"M{across(rising[0].peak_bytes):.1f} {up(rising[0].tokens_per_s):.1f}"
    steps += "".join(f"H{across(point.peak_bytes):.1f}V{up(point.tokens_per_s):.1f}" for point in rising[1:])
    parts.append(tag("path", d=f"{steps}H{right:.1f}", class_="curve"))
    for point in rising:
        chosen = abs(point.peak_bytes - chosen_bytes) <= 1
        parts += _marks(point, across(point.peak_bytes), up(point.tokens_per_s), chosen)
    return chart(HEIGHT, *parts, label="memory against throughput")


def _marks(point: Point, x: float, y: float, chosen: bool) -> list[Markup]:
    """Return the circle of one plan, and beside the chosen one its name."""
    size, speed = f"{point.peak_bytes / GIB:.1f} GiB", f"{format_count(point.tokens_per_s)} tokens/s"
    title = tag("title", f"{size} · {speed} · {point.summary}")
    style = "chosen" if chosen else "point" if point.fits else "beyond"
    circle = tag("circle", title, cx=x, cy=y, r=7 if chosen else 5, class_=style)
    return [circle, label(x, y - 12, "this plan", "middle", class_="strong")] if chosen else [circle]
