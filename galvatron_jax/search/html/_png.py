"""Timeline and memory as PNG files, for slides and papers: the extra [viz] (matplotlib)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cost import PlanTimeline
from ...errors import ToolchainError
from ...units import GIB
from ._draw import MEMORY_COLOURS
from ._memory import STANDING
from ._schedule import COLOURS

INCHES_WIDE, INCHES_PER_ROW, DOTS_PER_INCH = 11.0, 0.5, 150


def write_pngs(folder: Path, timeline: PlanTimeline, memory: Sequence[dict[str, int]], word: str) -> list[Path]:
    """Write ``timeline.png`` and ``memory.png`` into ``folder``; return their paths.

    Args:
        folder: Is made when it does not exist.
        timeline: What happens when.
        memory: Bytes by category at the peak, by slice.
        word: What a slice is called.

    Raises:
        ToolchainError: matplotlib is not installed.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ToolchainError(
            "matplotlib is not installed", expected="the extra [viz]", where="--png",
            action="pip install 'galvatron-jax[viz]', or use --svg, which needs nothing",
        ) from None  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(timeline.spans)
    figure = figures.Figure(figsize=(INCHES_WIDE, 1.2 + INCHES_PER_ROW * rows), layout="constrained")
    _draw_timeline(figure.subplots(), timeline, word)
    written = [_saved(figure, folder / "timeline.png")]
    figure = figures.Figure(figsize=(INCHES_WIDE, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for s, axis in enumerate(axes):
        _draw_memory(axis, timeline, s, memory[s], word)
    axes[0].legend(loc="upper right", ncols=3, fontsize="small")
    axes[-1].set_xlabel("s")
    return [*written, _saved(figure, folder / "memory.png")]


def _draw_timeline(axis: Any, timeline: PlanTimeline, word: str) -> None:
    for s, spans in enumerate(timeline.spans):
        for what, colour in COLOURS.items():
            boxes = [(span.start_s, span.end_s - span.start_s) for span in spans if span.what == what]
            axis.broken_barh(
                boxes, (s - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.4, label=what * (s == 0)
            )
    axis.set_yticks(range(len(timeline.spans)), [f"{word} {s + 1}" for s in range(len(timeline.spans))])
    axis.invert_yaxis()
    axis.set_xlabel("s")
    axis.legend(loc="lower right", ncols=3, fontsize="small")


def _draw_memory(axis: Any, timeline: PlanTimeline, s: int, memory: dict[str, int], word: str) -> None:
    """Stairs of residuals and live bytes on what stands all the time."""
    times, residuals, live = [0.0], [0.0], [0.0]
    for level in timeline.levels[s]:
        times += [level.start_s, level.end_s]
        residuals += [level.residual_bytes / GIB] * 2
        live += [level.live_bytes / GIB] * 2
    standing = [[memory.get(name, 0) / GIB] * len(times) for name in STANDING]
    names = (*STANDING, "residuals", "live")
    axis.stackplot(times, *standing, residuals, live, colors=[MEMORY_COLOURS[n] for n in names], labels=names)
    axis.set_ylabel(f"{word} {s + 1}, GiB")


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path
