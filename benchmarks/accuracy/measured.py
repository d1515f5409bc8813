"""The ledger's section on measured memory: estimates with tables of compiled probes beside those without."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from galvatron_jax.cost import count_compiled, estimate_plan

from .plans import Case, plan_of
from .probes import hardware, measured_profile


class MeasuredLine(NamedTuple):
    """One device slice of a plan."""

    name: str
    compiled: int
    """Of its (kind, strategy) pairs, so many were compiled as probes; even these at other samples or depths."""
    pairs: int
    formula_error: float
    measured_error: float


def measured_line(name: str, case: Case, number: int, formula_bytes: int, compiled_bytes: int) -> MeasuredLine | None:
    """Return the line of slice ``number`` of a plan; None where nothing of its model was compiled as a probe."""
    model = measured_profile(case.model)
    if model is None:
        return None
    plan = plan_of(case)
    estimate = estimate_plan(plan, model, hardware()).stages[number].peak_bytes
    known, pairs = count_compiled(plan, model, hardware())
    return MeasuredLine(
        name=name,
        compiled=known,
        pairs=pairs,
        formula_error=formula_bytes / compiled_bytes - 1,
        measured_error=estimate / compiled_bytes - 1,
    )


def measured_section(lines: Sequence[MeasuredLine]) -> list[str]:
    """Return the section."""
    if not lines:
        return []
    probed = [line for line in lines if line.compiled == line.pairs]
    return [
        "### With memory measured by the profiler",
        "",
        "The same estimates with the tables of `python -m galvatron_jax.profilers memory` (docs/design/0058), from",
        "probes: programs of the same layers at other depths and numbers of samples. Held out: a strategy of the plan",
        "was not compiled, and formulas price it (docs/design/0059).",
        "`python -m benchmarks.accuracy.probes MODEL` goes on compiling; `benchmarks/records/memory_probes` has what",
        "there is. Runs of one or two layers (four layers under two strategies) are no loop: no probe is alike.",
        "",
        "| plans | number | formulas: median | worst | measured: median | worst |",
        "|---|---|---|---|---|---|",
        _summary("all strategies compiled", probed),
        _summary("held out", [line for line in lines if line.compiled < line.pairs]),
        _summary("all", lines),
        "",
        "| plan | pairs compiled | formulas | measured |",
        "|---|---|---|---|",
        *_rows(lines),
        "",
    ]


def _summary(name: str, lines: Sequence[MeasuredLine]) -> str:
    if not lines:
        return f"| {name} | 0 | - | - | - | - |"
    cells = []
    for field in ("formula_error", "measured_error"):
        errors = [getattr(line, field) for line in lines]
        cells += [f"{statistics.median(map(abs, errors)):.1%}", f"{max(errors, key=abs):+.1%}"]
    return f"| {name} | {len(lines)} | {' | '.join(cells)} |"


def _rows(lines: Sequence[MeasuredLine]) -> Iterator[str]:
    for line in lines:
        errors = f"{line.formula_error:+.1%} | {line.measured_error:+.1%}"
        yield f"| {line.name} | {line.compiled} of {line.pairs} | {errors} |"
