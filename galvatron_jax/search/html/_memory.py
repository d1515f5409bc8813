"""Memory of every stage over one step, stacked by category, as the cost model counts it.

States and message buffers are there all the time; a microbatch's residuals from its forward pass to the end of its
backward pass; the live layer while a backward pass runs. The highest point is the predicted peak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...cost import MemoryLevel, PlanTimeline
from ...units import GIB, format_seconds
from ._draw import MEMORY_COLOURS, WIDTH, axis_y, chart, label, legend, line, rect, ticks
from ._markup import Markup, join, tag

HEIGHT, LEFT, TOP, BOTTOM = 210.0, 44.0, 24.0, 26.0
COLUMNS = 260
"""Steps along the time; a step shows the highest value in it."""
MOST_STAGES = 16
STANDING = ("parameters", "gradients", "optimizer", "boundary")
"""Categories that are there all the time."""


def memory_charts(timeline: PlanTimeline, memory: Sequence[dict[str, int]], budget_bytes: int, word: str) -> Markup:
    """Return one chart for each slice of devices.

    Args:
        timeline: What happens when, with the levels of residuals and live bytes.
        memory: Bytes by category at the peak, by slice.
        budget_bytes: Of a device.
        word: What a slice is called: stage, or slice when it holds several stages.
    """
    shown = list(range(len(memory)))
    if len(shown) > MOST_STAGES:
        fullest = sorted(shown, key=lambda s: -sum(memory[s].values()))[: MOST_STAGES - 2]
        shown = sorted({0, len(memory) - 1, *fullest})[:MOST_STAGES]
    top = max(budget_bytes, *(sum(parts.values()) for parts in memory)) * 1.04
    width = WIDTH if len(shown) == 1 else WIDTH / 2 - 10
    charts = [_chart(timeline, s, memory[s], budget_bytes, top, width, word) for s in shown]
    names = [name for name in MEMORY_COLOURS if any(parts.get(name) for parts in memory)]
    note = f"the {len(shown)} fullest of {len(memory)} {word}s" if len(shown) < len(memory) else ""
    return join([
        tag("div", *charts, class_="grid" if len(shown) > 1 else ""),
        legend((name, MEMORY_COLOURS[name]) for name in names),
        tag("p", note, class_="note") if note else "",
    ])  # fmt: skip


def _chart(
    timeline: PlanTimeline, s: int, memory: dict[str, int], budget_bytes: int, top: float, width: float, word: str
) -> Markup:
    end, right = timeline.step_time_s, width - 8
    across, bottom = (right - LEFT) / COLUMNS, HEIGHT - BOTTOM

    def up(size_bytes: float) -> float:
        return bottom - size_bytes / top * (bottom - TOP)

    parts = [axis_y([t * GIB for t in ticks(top / GIB, 4)], up, LEFT, right, lambda size: f"{size / GIB:g}")]
    held = 0.0
    for name in STANDING:
        size = memory.get(name, 0)
        if size:
            title = f"{name} {size / GIB:.2f} GiB"
            parts.append(
                rect(LEFT, up(held + size), right - LEFT, up(held) - up(held + size), title, fill=MEMORY_COLOURS[name])
            )
        held += size
    residuals, live = _columns(timeline.levels[s], end)
    parts.append(_area([held] * COLUMNS, residuals, across, up, MEMORY_COLOURS["residuals"]))
    parts.append(_area([held + r for r in residuals], live, across, up, MEMORY_COLOURS["live"]))
    peak = sum(memory.values())
    name = f"{word} {s + 1} · " if len(timeline.levels) > 1 else ""
    parts.append(label(LEFT, 14, f"{name}peak {peak / GIB:.1f} of {budget_bytes / GIB:.1f} GiB", class_="head"))
    parts.append(line(LEFT, up(budget_bytes), right, up(budget_bytes), "budget"))
    middle = (LEFT + right) / 2
    parts += [
        label(LEFT, bottom + 16, "0", class_="tick"),
        label(middle, bottom + 16, "time in the step", "middle", class_="tick"),
        label(right, bottom + 16, format_seconds(end), "end", class_="tick"),
    ]
    return chart(HEIGHT, *parts, label=f"memory of {word} {s + 1} over one step", width=width)


def _columns(levels: Sequence[MemoryLevel], end_s: float) -> tuple[list[float], list[float]]:
    """Residual and live bytes by column of the picture: of the moment in it at which their sum is highest."""
    residuals, live = [0.0] * COLUMNS, [0.0] * COLUMNS
    for level in levels:
        first = min(int(level.start_s / end_s * COLUMNS), COLUMNS - 1)
        last = min(max(first + 1, round(level.end_s / end_s * COLUMNS)), COLUMNS)
        for column in range(first, last):
            if level.residual_bytes + level.live_bytes > residuals[column] + live[column]:
                residuals[column], live[column] = level.residual_bytes, level.live_bytes
    return residuals, live


def _area(
    base: Sequence[float], size: Sequence[float], across: float, up: Callable[[float], float], colour: str
) -> Markup:
    """A staircase of ``size`` on top of ``base``."""
    tops = "".join(f"V{up(b + v):.1f}h{across:.2f}" for b, v in zip(base, size, strict=True))
    backs = "".join(f"V{up(b):.1f}h{-across:.2f}" for b in reversed(base))
    return tag("path", d=f"M{LEFT:.1f} {up(base[0]):.1f}{tops}{backs}z", fill=colour)
