"""The pipeline timeline: what every slice of devices does when, over one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...cost import PlanTimeline, Span
from ...units import format_seconds
from ._draw import WIDTH, axis_x, chart, label, legend, rect, ticks
from ._markup import Markup, join, tag

LEFT, TOP, ROW, GAP = 64.0, 8.0, 30.0, 8.0
NUMBERED = 16.0
"""Narrowest box that has room for its microbatch number."""
TITLED = 3000
"""With more boxes than this they are one path per row and kind, without titles: the page stays small."""
COLOURS = {"forward": "#4e79a7", "backward": "#59a14f", "step end": "#b07aa1"}


def timeline_chart(timeline: PlanTimeline, word: str) -> Markup:
    """Return the timeline with its legend; ``word`` names a row: stage, or slice when a slice holds several stages."""
    rows = len(timeline.spans)
    row = ROW if rows <= 16 else max(6.0, 480.0 / rows)
    scale = (WIDTH - LEFT - 10) / timeline.step_time_s
    bottom = TOP + rows * (row + GAP)
    titled = sum(map(len, timeline.spans)) <= TITLED
    parts = [axis_x(ticks(timeline.step_time_s, 8), lambda t: LEFT + t * scale, TOP, bottom, _tick)]
    for s, spans in enumerate(timeline.spans):
        y = TOP + s * (row + GAP)
        parts.append(rect(LEFT, y, timeline.step_time_s * scale, row, "idle", class_="idle"))
        parts += _boxes(spans, y, row, scale) if titled else _paths(spans, y, row, scale)
        if rows <= 32:
            parts.append(
                label(LEFT - 8, y + row / 2 + 4, f"{word} {s + 1}" if rows > 1 else "step", "end", class_="tick")
            )
    picture = chart(bottom + 24, *parts, label="pipeline timeline of one step")
    keys = [*COLOURS.items(), ("idle", "var(--idle)")]
    return join([picture, legend(keys)])


def _tick(seconds: float) -> str:
    return format_seconds(seconds) if seconds else "0"


def _boxes(spans: Sequence[Span], y: float, row: float, scale: float) -> Iterator[Markup]:
    for span in spans:
        x, width = LEFT + span.start_s * scale, (span.end_s - span.start_s) * scale
        what = span.what if span.microbatch is None else f"{span.what} of microbatch {span.microbatch + 1}"
        what += f", chunk {span.chunk + 1}" if span.chunk else ""
        title = f"{what}: {format_seconds(span.end_s - span.start_s)} from {format_seconds(span.start_s)}"
        opacity = 1 - 0.45 * (span.chunk % 2)
        yield rect(x, y, width, row, title, fill=COLOURS[span.what], fill_opacity=opacity, class_="box")
        if span.microbatch is not None and width >= NUMBERED and row >= 16:
            yield label(x + width / 2, y + row / 2 + 4, f"{span.microbatch + 1}", "middle", class_="inside")


def _paths(spans: Sequence[Span], y: float, row: float, scale: float) -> Iterator[Markup]:
    for name, colour in COLOURS.items():
        boxes = "".join(
            f"M{LEFT + span.start_s * scale:.1f} {y:.1f}h{(span.end_s - span.start_s) * scale:.2f}v{row:.1f}"
            f"H{LEFT + span.start_s * scale:.1f}z"
            for span in spans
            if span.what == name
        )
        if boxes:
            yield tag("path", d=boxes, fill=colour)
