"""Explanations as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from ..._text import Line, Piece, clean, labelled, table
from ...plan import Strategy
from ...units import GIB, format_count, format_gib, format_seconds
from ._alternatives import Alternative, Reason, Subject, is_faster, verdict_of
from ._changes import Price, place_of
from ._families import Family
from ._frontier import Point
from ._scaling import Scale
from ._summary import peak_of, plan_summary, seconds_per_sample
from ._what_if import WhatIf

MOST_ALTERNATIVES = 12
COMMUNICATION = ("tensor_communication", "data_communication", "relayout")


def binding_lines(subject: Subject) -> list[Line]:
    """Return what bounds the step: compute, links, waiting, memory."""
    predicted = subject.plan.predicted
    if predicted is None:
        return []
    total = predicted.step_time_s
    links = sum(predicted.times.get(name, 0.0) for name in COMMUNICATION)
    compute = predicted.times.get("compute", 0.0) + predicted.times.get("recompute", 0.0)
    waiting = predicted.times.get("bubble", 0.0)
    free = subject.budget_bytes - max(stage.peak_bytes for stage in predicted.stages)
    shares = [("compute", compute), ("links", links), ("waiting for other stages", waiting)]
    leader = max(shares, key=lambda share: share[1])[0]
    text = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in shares)
    return [
        labelled("binds", Piece(leader, "bold"), f" · {text} of the step"),
        labelled("", f"memory: {format_gib(free)} of {format_gib(subject.budget_bytes)} left on the fullest stage"),
    ]


def reason_lines(subject: Subject, reasons: Sequence[Reason]) -> list[Line]:
    """Return why every run of layers has its strategy."""
    lines: list[Line] = []
    present = subject.present
    for reason in reasons:
        layers = f"{reason.first}-{reason.last}" if reason.last > reason.first else f"{reason.first}"
        name = f"layer{'s' * (reason.last > reason.first)} {layers}, {clean(reason.kind)}: "
        lines.append(labelled("why" if not lines else "", name, Piece(str(reason.strategy), "bold")))
        lines.append(labelled("", "  ", *_verdict(reason.verdict, reason.faster, present)))
        if reason.next_best is not None:
            strategy, price = reason.next_best
            lines.append(labelled("", f"  next best that fits: {strategy}, {_change(price, present)} step time"))
    return lines


def layer_lines(subject: Subject, layer: int, found: Sequence[Alternative], *, every: bool = False) -> list[Line]:
    """Return all about one layer: what it costs, what the alternatives would cost, what decides."""
    place, present = place_of(subject.plan, layer), subject.present
    count = place.run.count
    stage = f"stage {place.stage + 1} of {len(subject.plan.stages)}"
    header = labelled(
        f"layer {layer}", f"{clean(place.run.kind)} · {stage} · ", Piece(str(place.run.strategy), "bold"),
        f" · one of {count} layers {place.layers[0]}-{place.layers[-1]} spread so" if count > 1 else "",
    )  # fmt: skip
    faster = next((a for a in found if is_faster(a.run, present)), None)
    fitting = next((a for a in found if is_faster(a.run, present) and a.run.fits), faster)
    decisive = None if fitting is None else (fitting.strategy, fitting.run)
    shown = found if every else found[:MOST_ALTERNATIVES]
    columns = ["instead", "this layer: step", "peak GiB"] + ([f"all {count}: step", "peak GiB"] if count > 1 else [])
    rows = [_alternative_cells(alternative, present, count > 1) for alternative in shown]
    lines = [
        header,
        *_cost_lines(subject, layer),
        labelled("why", *_verdict(verdict_of(present, decisive and decisive[1]), decisive, present)),
        (),
    ]
    lines += table(columns, rows, indent=0)
    if any(not price.fits for alternative in shown for price in (alternative.layer, alternative.run)):
        lines.append((Piece(f"* more than the {format_gib(subject.budget_bytes)} of a GPU", "dim"),))
    if len(shown) < len(found):
        slowest = _change(found[-1].run, present)
        lines.append((Piece(f"and {len(found) - len(shown)} slower ones, up to {slowest}: --all shows them", "dim"),))
    return lines


def what_if_lines(found: Sequence[WhatIf]) -> list[Line]:
    """Return what more memory or faster links would bring."""
    rows = [
        [f"with {w.change}", "-" if w.gain is None else f"{w.gain:+.1%}", "the same plan" if w.same_plan else w.summary]
        for w in found
    ]
    return table(["what if (same schedule)", "samples/s", ""], rows, indent=0)


def family_lines(families: Sequence[Family]) -> list[Line]:
    """Return the best families of plans."""
    best = seconds_per_sample(families[0].plan)
    rows = []
    for rank, family in enumerate(families):
        predicted = family.plan.predicted
        assert predicted is not None
        speed = f"{best / seconds_per_sample(family.plan):.1%}"
        peak, batch = f"{peak_of(family.plan) / GIB:.1f}", f"{family.plan.global_batch}"
        step, tokens = format_seconds(predicted.step_time_s), format_count(predicted.tokens_per_s)
        rows.append(
            [f"{rank + 1}", family.name, batch, step, tokens, speed, peak, plan_summary(family.plan, stages=False)]
        )
    return table(["top", "family", "batch", "step", "tokens/s", "speed", "peak GiB", ""], rows, left=2, indent=0)


def frontier_lines(points: Sequence[Point]) -> list[Line]:
    """Return the frontier of memory against throughput."""
    best = max((point.tokens_per_s for point in points if point.fits), default=1.0)
    rows = [
        [
            f"{point.peak_bytes / GIB:.1f}",
            format_count(point.tokens_per_s),
            f"{point.tokens_per_s / best:.1%}",
            point.summary + ("" if point.fits else "   beyond the budget"),
        ]
        for point in points
    ]
    return table(["peak GiB", "tokens/s", "speed", ""], rows, left=0, indent=0)


def scaling_lines(rows: Sequence[Scale]) -> list[Line]:
    """Return the clusters side by side."""
    priced = any(row.tokens_per_currency_unit is not None for row in rows)
    header = ["mesh", "GPUs", "batch", "s/step", "tokens/s", "per GPU", "peak GiB", *["tokens/unit"] * priced, ""]
    best = max((row.tokens_per_s_per_gpu for row in rows), default=0.0)
    cells = []
    for row in rows:
        if row.plan is None or row.plan.predicted is None:
            cells.append(
                [row.mesh, f"{row.devices}", *["-"] * (len(header) - 3), f"does not fit: {clean(row.summary)}"]
            )
            continue
        share = f"{format_count(row.tokens_per_s_per_gpu)} ({row.tokens_per_s_per_gpu / best:.0%})"
        step, peak = f"{row.plan.predicted.step_time_s:.3g}", f"{peak_of(row.plan) / GIB:.1f}"
        price = [format_count(row.tokens_per_currency_unit or 0.0)] * priced
        cells.append(
            [row.mesh, f"{row.devices}", f"{row.plan.global_batch}", step, format_count(row.tokens_per_s), share, peak]
            + [*price, row.summary]
        )
    return table(header, cells, indent=0)


def _cost_lines(subject: Subject, layer: int) -> list[Line]:
    place = place_of(subject.plan, layer)
    cost = subject.layer_cost(place, place.run.strategy)
    times = sorted(((name, t) for name, t in cost.times.items() if t > 0), key=lambda item: -item[1])
    total = sum(t for _, t in times) or 1.0
    shares = "  ".join(f"{name.replace('_', ' ')} {t / total:.1%}" for name, t in times)
    memory = "  ".join(f"{name} {format_gib(size)}" for name, size in cost.memory.items() if size)
    return [
        labelled(
            "costs",
            f"{format_seconds(cost.forward_s)} forward, {format_seconds(cost.backward_s)} backward per microbatch"
            f" · {format_seconds(subject.step_seconds(cost))} per step",
        ),
        labelled("", shares),
        labelled("holds", memory),
    ]


def _alternative_cells(alternative: Alternative, present: Price, with_run: bool) -> list[str]:
    cells = [f"{alternative.strategy}"]
    for price in (alternative.layer, alternative.run) if with_run else (alternative.layer,):
        cells += [_change(price, present), f"{price.peak_bytes / GIB:.1f}{' ' if price.fits else '*'}"]
    return cells


def _verdict(verdict: str, faster: tuple[Strategy, Price] | None, present: Price) -> tuple[Piece, ...]:
    if faster is None:
        return (Piece("nothing else is faster here, even with memory without end", "green"),)
    strategy, price = faster
    gain = f"{strategy} would take {_change(price, present)} step time"
    if verdict == "memory":
        return (Piece("memory decides: ", "yellow"), Piece(f"{gain}, but needs {format_gib(price.peak_bytes)}"))
    return (Piece("not the optimum: ", "red"), Piece(f"{gain}, and fits with {format_gib(price.peak_bytes)}"))


def _change(price: Price, present: Price) -> str:
    change = price.step_time_s / present.step_time_s - 1
    return "±0.00%" if abs(change) < 5e-5 else f"{change:+.2%}"
