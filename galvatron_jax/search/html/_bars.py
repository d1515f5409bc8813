"""Where the time goes, and what else could be run: horizontal bars, of HTML, so that they wrap on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...plan import Plan
from ...units import format_count, format_gib, format_seconds
from .._baselines import Baseline
from ._draw import TIME_COLOURS
from ._markup import Markup, join, tag

OTHER = "#bab0ac"
LABELLED = 0.05
"""Smallest share whose figure fits into its part of the bar."""


class _Row(NamedTuple):
    name: str
    tokens_per_s: float
    words: str
    fits: bool


def time_bar(times: Mapping[str, float], step_time_s: float) -> Markup:
    """Return the step time of the slowest stage as one bar, with a legend that has the figures."""
    ordered = sorted(((name, t) for name, t in times.items() if t > 0), key=lambda item: -item[1])
    parts, keys = [], []
    for name, seconds in ordered:
        share, colour = seconds / step_time_s, TIME_COLOURS.get(name, OTHER)
        words = f"{name.replace('_', ' ')} {format_seconds(seconds)}"
        figure = f"{share:.1%}" if share > LABELLED else ""
        parts.append(tag("span", figure, style=f"width:{share:.4%};background:{colour}", title=words))
        keys.append(tag("span", tag("i", style=f"background:{colour}"), f"{words} ({share:.1%})", class_="key"))
    return join([tag("div", *parts, class_="stack"), tag("div", *keys, class_="legend")])


def baseline_bars(plan: Plan, baselines: Sequence[Baseline]) -> Markup:
    """Return the throughput of the plan and of what else could be run, the fastest first."""
    rows = [_row("this plan", plan, plan), *(_baseline_row(baseline, plan) for baseline in baselines)]
    fastest = max(row.tokens_per_s for row in rows)
    return join(
        tag(
            "div",
            tag("span", row.name, class_="who"),
            tag("span", class_=f"bar{' mine' * (row.name == 'this plan')}", style=_width(row.tokens_per_s / fastest)),
            tag("span", row.words, class_="what" if row.fits else "what warn"),
            class_="row",
        )
        for row in sorted(rows, key=lambda row: -row.tokens_per_s)
    )


def _width(share: float) -> str:
    """Bars take at most half of a row: names and figures stand beside them."""
    return f"width:{share * 50:.2f}%"


def _baseline_row(baseline: Baseline, plan: Plan) -> _Row:
    if baseline.plan is None:
        return _Row(baseline.name, 0.0, "not possible here", False)
    if not baseline.fits:
        return _Row(baseline.name, 0.0, f"does not fit: needs {format_gib(baseline.peak_bytes or 0)}", False)
    return _row(baseline.name, baseline.plan, plan)


def _row(name: str, shown: Plan, reference: Plan) -> _Row:
    assert shown.predicted is not None
    assert reference.predicted is not None
    speed = shown.predicted.tokens_per_s
    share = speed / reference.predicted.tokens_per_s
    return _Row(name, speed, f"{format_count(speed)} tokens/s · {share:.1%} · batch {shown.global_batch}", True)
