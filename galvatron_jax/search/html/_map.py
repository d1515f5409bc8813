"""The plan as a map: layers from left to right, devices from top to bottom, one colour for each strategy.

A stage is a block of its layers and its devices, so a pipeline is a staircase. Thin lines inside a block separate the
groups of devices that share one sample (tensor-parallel or Ulysses groups); hatching is rematerialisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...plan import Plan, PlanRun, Strategy
from ..explain import Place, places
from ._draw import STRATEGY_COLOURS, WIDTH, chart, label, line, rect
from ._markup import Markup, join, tag

LEFT, TOP = 64.0, 26.0
MIN_HEIGHT, MAX_HEIGHT, ROW = 150.0, 420.0, 20.0
MOST_ROWS = 20
"""A longer table is folded."""
MOST_LINES = 64
"""More groups than this in one block are no lines but a grey."""


def colours(plan: Plan) -> dict[Strategy, str]:
    """Return a colour for every strategy, by first use."""
    strategies = dict.fromkeys(strategy for _, strategy in plan.layers())
    return {s: STRATEGY_COLOURS[i % len(STRATEGY_COLOURS)] for i, s in enumerate(strategies)}


def layer_map(plan: Plan) -> Markup:
    """Return the map."""
    devices, layers = plan.cluster.devices, plan.model.layer_count
    height = min(max(devices * ROW, MIN_HEIGHT), MAX_HEIGHT)
    across, down = (WIDTH - LEFT - 10) / layers, height / devices
    chosen = colours(plan)
    parts = [_hatches()]
    for place in places(plan):
        parts += _block(plan, place, chosen[place.run.strategy], across, down)
    parts += _device_axis(plan, down)
    parts += _layer_axis(layers, across, TOP + height)
    words = f"{layers} layers over {devices} devices"
    return chart(TOP + height + 44, *parts, label=words)


def _block(plan: Plan, place: Place, colour: str, across: float, down: float) -> Iterator[Markup]:
    """One run of layers on the devices of its stage."""
    devices = plan.stages[place.stage].devices
    x, y = LEFT + place.layers[0] * across, TOP + (place.stage % plan.slices) * devices * down
    width, height = len(place.layers) * across, devices * down
    title = _title(place.run, place.layers, place.stage, plan)
    yield rect(x, y, width, height, title, fill=colour, class_="block")
    inner = place.run.strategy.inner
    if devices // inner <= MOST_LINES:
        yield join(
            line(x, y + group * inner * down, x + width, y + group * inner * down, "group")
            for group in range(1, devices // inner)
        )
    if place.run.strategy.remat != "none":
        hatch = "hatch" if place.run.strategy.remat == "full" else "dots"
        yield rect(x, y, width, height, title, fill=f"url(#{hatch})")


def _title(run: PlanRun, layers: range, stage: int, plan: Plan) -> str:
    numbers = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
    where = f" · stage {stage + 1}" if len(plan.stages) > 1 else ""
    return f"{numbers} {run.kind}{where} · {run.strategy}"


def _device_axis(plan: Plan, down: float) -> Iterator[Markup]:
    nodes, gpus = plan.cluster.nodes, plan.cluster.gpus_per_node
    step = max(1, -(-nodes // 12))
    for node in range(0, nodes, step):
        y = TOP + node * gpus * down
        yield label(LEFT - 8, y + min(gpus * down / 2 + 4, 14), f"node {node}", "end", class_="tick")
        if node:
            yield line(LEFT - 4, y, WIDTH - 10, y, "node")


def _layer_axis(layers: int, across: float, bottom: float) -> Iterator[Markup]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000) if step * across >= 26)
    for layer in range(0, layers, step):
        yield label(LEFT + (layer + 0.5) * across, bottom + 16, f"{layer}", "middle", class_="tick")
    yield label(LEFT + layers * across / 2, bottom + 36, "layer", "middle", class_="axis")
    yield label(LEFT - 8, TOP - 10, "GPUs", "end", class_="axis")


def _hatches() -> Markup:
    diagonal = tag("path", d="M0 8 8 0", class_="stroke")
    dots = tag("circle", cx=3.0, cy=3.0, r=1.2, class_="dot")
    units = "userSpaceOnUse"
    hatch = tag("pattern", diagonal, id="hatch", width=8.0, height=8.0, patternUnits=units)
    dotted = tag("pattern", dots, id="dots", width=7.0, height=7.0, patternUnits=units)
    return tag("defs", hatch, dotted)


def strategy_rows(plan: Plan, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> Markup:
    """Return the table of all runs: colour, layers, kind, strategy and figures."""
    chosen = colours(plan)
    head = tag("tr", *(tag("th", name) for name in ("", *columns)))
    rows = []
    for place, row in zip(places(plan), cells, strict=True):
        swatch = tag("td", tag("i", class_="swatch", style=f"background:{chosen[place.run.strategy]}"))
        rows.append(tag("tr", swatch, *(tag("td", cell) for cell in row)))
    table = tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")
    if len(rows) <= MOST_ROWS:
        return table
    return tag("details", tag("summary", f"all {len(rows)} runs of layers"), table)
