"""The accuracy ledger: estimates of today's formulas beside what was compiled or measured, as ``docs/accuracy.md``.

    python -m benchmarks.accuracy.ledger          # reads benchmarks/records/, writes docs/accuracy.md and its plots

Estimates are made anew with the present analysis and cost model; records hold facts only.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import msgspec

from galvatron_jax.cost import PlannedCollective, estimate_plan, memory_budget, step_collectives
from galvatron_jax.hardware import load_hardware
from galvatron_jax.runtime._runs import SHORTEST_SCAN
from galvatron_jax.units import GIB

from .compile import record_path
from .emulated import emulated_lines, read_runs
from .measured import MeasuredLine, measured_line, measured_section
from .plans import Case, all_cases, plan_of, profile_of

DOCS = Path(__file__).parents[2] / "docs"
MEDIAN_GOAL, WORST_GOAL, BYTES_GOAL = 0.03, 0.08, 0.01
"""Of the memory estimate (median, worst), and of the bytes of collectives."""

PAIR = 2
"""Group of a permute, as programs list it."""
REDUCTIONS = ("all-reduce", "reduce-scatter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One plan: estimate beside compiled."""

    name: str
    fitted: bool
    has_loop: bool
    """Some run on the slice is a loop: all layers are priced as if they were."""
    has_fused_attention: bool
    """Attention was compiled as cuDNN's kernel."""
    estimate: dict[str, int]
    """Bytes by category."""
    compiled: dict[str, int]
    rematerialised: int
    collectives: tuple[tuple[str, int, float, float], ...]
    """(kind, group size, predicted bytes, compiled bytes), reductions together."""
    measured: MeasuredLine | None
    """The estimate with memory tables, where the model has some."""

    @property
    def estimated_peak(self) -> int:
        """Sum of the categories."""
        return sum(self.estimate.values())

    @property
    def error(self) -> float:
        """Estimate over compiled peak, less 1; negative: too low, the dangerous side."""
        return self.estimated_peak / self.compiled["peak"] - 1

    @property
    def collective_error(self) -> float:
        """Largest difference of a kind's bytes, as a share of all bytes of the plan."""
        total = sum(found for *_, found in self.collectives) or 1.0
        return max((abs(planned - found) for *_, planned, found in self.collectives), default=0.0) / total


def read_lines() -> list[Line]:
    """Return a line for every device slice of each plan that has a record, in the order of the plans."""
    return [
        line
        for name, case in all_cases().items()
        if record_path(name).exists()
        for line in _lines(name, case, json.loads(record_path(name).read_text()))
    ]


def _lines(name: str, case: Case, record: dict[str, Any]) -> Iterator[Line]:
    fused = record.get("fused_attention", False)
    hardware = msgspec.structs.replace(load_hardware("h100"), fused_attention=fused)  # as the program was compiled
    plan, profile = plan_of(case), profile_of(case.model)
    estimate = estimate_plan(plan, profile, hardware)
    predicted = step_collectives(plan, profile, sums_before_reducing=hardware.sums_before_reducing)
    stage_of = [s for s, stage in enumerate(plan.stages) for _ in range(stage.layer_count)]
    for number, part in enumerate(record.get("stages", [record])):
        mine = [p for p in predicted if stage_of[p.layer] % plan.slices == number]
        title = name if plan.slices == 1 else f"{name}: slice {number}"
        memory = estimate.stages[number].memory
        yield Line(
            name=title,
            fitted=case.fitted,
            has_loop=any(
                run.count >= SHORTEST_SCAN for stage in plan.stages[number :: plan.slices] for run in stage.runs
            ),
            has_fused_attention=fused,
            estimate=memory,
            compiled=part["compiled"],
            rematerialised=part["rematerialised_by_xla"],
            collectives=tuple(_rows(mine, part["collectives"])),
            measured=measured_line(title, case, number, sum(memory.values()), part["compiled"]["peak"]),
        )


def _rows(
    predicted: Iterable[PlannedCollective], compiled: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, int, float, float]]:
    """Bytes by kind and group; a partitioner may spell a reduce-scatter as an all-reduce and a slice."""
    predicted = [dataclasses.replace(p, group=PAIR) if p.kind == "collective-permute" else p for p in predicted]
    keys = {(_family(p.kind), p.group) for p in predicted} | {(_family(r["kind"]), r["group_size"]) for r in compiled}
    for kind, size in sorted(keys):
        planned = sum(p.bytes for p in predicted if (_family(p.kind), p.group) == (kind, size))
        found = sum(r["compiled_bytes"] for r in compiled if (_family(r["kind"]), r["group_size"]) == (kind, size))
        yield kind, size, planned, float(found)


def _family(kind: str) -> str:
    return "reduction" if kind in REDUCTIONS else kind


def ledger_text(lines: Sequence[Line]) -> str:
    """Return the page."""
    held = [line for line in lines if not line.fitted]
    budget = memory_budget(load_hardware("h100"))
    optimistic = [line.name for line in lines if line.estimated_peak <= budget < line.compiled["allocated"]]
    return "\n".join(
        [
            "# How accurate are the estimates?",
            "",
            "Generated by `python -m benchmarks.accuracy.ledger` from `benchmarks/records/`; do not edit. Memory and",
            "collectives are held against programs that XLA's GPU compiler makes for 2x8 H100 on a machine without any",
            "GPU (`python -m benchmarks.accuracy.compile`; attention is cuDNN's kernel where a plan says fused, else",
            "it keeps its scores; estimated likewise). No program of this page ran on a GPU.",
            "",
            "## Memory",
            "",
            f'Goal: median error at most {MEDIAN_GOAL:.0%}, worst {WORST_GOAL:.0%}, and never "fits" for a plan that',
            "the compiler puts above the budget.",
            "",
            "| plans | number | median error | worst | reached |",
            "|---|---|---|---|---|",
            _summary("read while the formulas were written", [line for line in lines if line.fitted]),
            _summary("held out", held),
            _summary("all", lines),
            _summary("with a loop over layers", [line for line in lines if line.has_loop]),
            _summary("without any", [line for line in lines if not line.has_loop]),
            _summary("attention by cuDNN's kernel", [line for line in lines if line.has_fused_attention]),
            "",
            "A slice without a run of three equal layers (marked o) has no loop. Pipeline stages of at most two layers",
            "are priced so (docs/design/0094); all others as loops, which need more (docs/design/0085).",
            "",
            f"Plans called fitting that the compiler puts above the budget of {budget / GIB:.1f} GiB:"
            f" {', '.join(optimistic) or 'none'}.",
            "",
            "![estimated against compiled peak](accuracy_memory.svg)",
            "",
            "GiB on one device; error = estimate / compiled - 1 (negative: too low); * read while the formulas were",
            "written; o no loop; XLA: operations that the compiler ran twice on its own to save memory (then the",
            "compiled peak is that of another plan).",
            "",
            "| plan | parameters | gradients | optimizer | residuals | live | estimate | compiled | error | XLA |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *[_memory_row(line) for line in lines],
            "",
            *measured_section([line.measured for line in lines if line.measured]),
            "## Collectives",
            "",
            f"Bytes of one step by kind and group size; goal: each within {BYTES_GOAL:.0%} of the plan's bytes.",
            "All-reduce and reduce-scatter are taken together: a partitioner may write one as the other and a slice.",
            "Shown are the kinds that differ by more than the goal.",
            "",
            f"Within the goal: {sum(line.collective_error <= BYTES_GOAL for line in lines)} of {len(lines)} plans.",
            "",
            "| plan | kind | group | predicted MiB | compiled MiB |",
            "|---|---|---|---|---|",
            *[row for line in lines for row in _collective_rows(line)],
            "",
            *emulated_lines(read_runs()),
            "",
        ]
    )


def _summary(name: str, lines: Sequence[Line]) -> str:
    if not lines:
        return f"| {name} | 0 | - | - | - |"
    errors = [abs(line.error) for line in lines]
    median, worst = statistics.median(errors), max(lines, key=lambda line: abs(line.error))
    reached = median <= MEDIAN_GOAL and max(errors) <= WORST_GOAL
    return (
        f"| {name} | {len(lines)} | {median:.1%} | {worst.error:+.1%} ({worst.name}) | {'yes' if reached else 'no'} |"
    )


def _memory_row(line: Line) -> str:
    names = ("parameters", "gradients", "optimizer", "residuals", "live")
    parts = " | ".join(f"{line.estimate.get(name, 0) / GIB:.2f}" for name in names)
    marks = f"{' *' if line.fitted else ''}{'' if line.has_loop else ' o'}"
    return (
        f"| {line.name}{marks} | {parts} | {line.estimated_peak / GIB:.2f} |"
        f" {line.compiled['peak'] / GIB:.2f} | {line.error:+.1%} | {line.rematerialised or ''} |"
    )


def _collective_rows(line: Line) -> Iterator[str]:
    total = sum(found for *_, found in line.collectives) or 1.0
    for kind, size, planned, found in line.collectives:
        if abs(planned - found) > BYTES_GOAL * total:
            yield f"| {line.name} | {kind} | {size} | {planned / 2**20:.1f} | {found / 2**20:.1f} |"


def write_plot(lines: Sequence[Line], path: Path) -> None:
    """Write estimated against compiled peak as SVG (needs the extra ``[viz]``)."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "galvatron_jax"  # the same picture, byte for byte, from the same records
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for fitted, colour, name in ((True, "tab:orange", "read while writing formulas"), (False, "tab:blue", "held out")):
        some = [line for line in lines if line.fitted == fitted]
        x, y = [line.compiled["peak"] / GIB for line in some], [line.estimated_peak / GIB for line in some]
        axes.scatter(x, y, s=18, color=colour, label=name)
    ends = [0.5, 1.2 * max(line.compiled["peak"] / GIB for line in lines)]
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.fill_between(ends, [e * 0.92 for e in ends], [e * 1.08 for e in ends], color="grey", alpha=0.15, label="8 %")
    axes.set(
        xscale="log", yscale="log", xlabel="compiled peak, GiB", ylabel="estimated peak, GiB", xlim=ends, ylim=ends
    )
    axes.legend()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Write the page and its plot."""
    lines = read_lines()
    (DOCS / "accuracy.md").write_text(ledger_text(lines))
    write_plot(lines, DOCS / "accuracy_memory.svg")
    print(f"{len(lines)} plans -> {DOCS / 'accuracy.md'}")


if __name__ == "__main__":
    main()
