"""The breakdown of a plan as lines of text, and what the clock said beside it."""

from __future__ import annotations

from collections.abc import Sequence

from .._text import Line, Piece, clean, labelled, table
from ..cost import memory_source
from ..hardware import freshness_notes
from ..plan import Plan, Prediction
from ..profile import HardwareProfile, ModelProfile
from ..record import RunRecord
from ..units import GIB, format_count, format_gib, format_seconds
from ._breakdown import RunPrice

_TIMES = ("compute", "recompute", "tensor_communication", "data_communication", "gradient sync", "optimizer")
_TIME_TITLES = ("compute", "again", "tensor", "data", "sync", "update")
_MEMORY = ("parameters", "gradients", "optimizer", "residuals", "live", "boundary")


def breakdown_lines(
    plan: Plan, model: ModelProfile, hardware: HardwareProfile, stages: Sequence[Sequence[RunPrice]], total: Prediction
) -> list[Line]:
    """Return the whole report of one plan.

    Args:
        plan: The plan.
        model: Its model.
        hardware: What prices it.
        stages: Its parts (``stage_prices``).
        total: Its prediction by the same model and hardware.
    """
    return [
        *_head(plan, model, hardware, stages),
        (),
        labelled("time", " ms of one step on one device, by cause"),
        *_time_table(stages),
        *_step_lines(plan, total),
        (),
        labelled("memory", " GiB on one device"),
        *_memory_table(stages),
        *_peak_lines(plan, total),
    ]


def measured_lines(record: RunRecord, total: Prediction) -> list[Line]:
    """Return predicted beside measured."""
    error = total.step_time_s / record.step_time_s - 1
    rows = [
        ["step time", format_seconds(total.step_time_s), format_seconds(record.step_time_s), f"{error:+.1%}"],
        [
            "tokens/s",
            format_count(total.tokens_per_s),
            format_count(record.tokens_per_s),
            f"{1 / (1 + error) - 1:+.1%}",
        ],
        ["MFU", f"{total.mfu:.1%}", f"{record.mfu:.1%}", ""],
    ]
    peak, predicted = record.peak_bytes, max(stage.peak_bytes for stage in total.stages)
    if peak:
        rows.append(["peak memory", format_gib(predicted), format_gib(peak), f"{predicted / peak - 1:+.1%}"])
    lines = [(), *table(["", "predicted", "measured", "error"], rows)]
    steps = f"median of {len(record.step_times_s)} steps, spread {record.spread:.1%}"
    lines.append(labelled("", Piece(f"  {steps}; {clean(record.provenance.device_kind)}", "dim")))
    if not peak:
        lines.append(labelled("", Piece("  this backend does not count memory", "dim")))
    return lines


def _head(
    plan: Plan, model: ModelProfile, hardware: HardwareProfile, stages: Sequence[Sequence[RunPrice]]
) -> list[Line]:
    cluster = plan.cluster
    kinds = {price.kind: price.measured for prices in stages for price in prices}
    unmeasured = [clean(kind) for kind, measured in kinds.items() if not measured]
    source = "estimated" if len(unmeasured) == len(kinds) else "measured"
    also = f", estimated for {', '.join(unmeasured)}" if unmeasured and source == "measured" else ""
    links = "measured" if hardware.measured else "data sheet"
    return [
        labelled("plan", Piece(f"{clean(model.name)} on {cluster.mesh} {clean(hardware.name)}", "bold"), _shape(plan)),
        labelled("figures", f"compute {source}{also} · collectives {links} ({clean(hardware.name)})"),
        labelled("", f"memory {memory_source(plan, model, hardware)}"),
        *(labelled("", Piece(clean(note), "yellow")) for note in freshness_notes(hardware)),
    ]


def _shape(plan: Plan) -> str:
    stages = f" · {len(plan.stages)} stages, {plan.schedule}" if len(plan.stages) > 1 else ""
    return f" · batch {plan.global_batch} in {plan.microbatches} x {plan.microbatch_size}{stages}"


def _time_table(stages: Sequence[Sequence[RunPrice]]) -> list[Line]:
    rows = []
    for price, left in _rows(stages):
        causes = price.causes_s
        rows.append([*left, *(_ms(causes.get(name, 0.0)) for name in _TIMES), _ms(price.step_s), _source(price)])
    return table([*_left_titles(stages), *_TIME_TITLES, "all", ""], rows, left=len(_left_titles(stages)))


def _memory_table(stages: Sequence[Sequence[RunPrice]]) -> list[Line]:
    rows = []
    for price, left in _rows(stages):
        memory = price.cost.memory
        held = [price.count * memory.get(name, 0.0) for name in _MEMORY[:4]]
        rows.append([*left, *(_gib(size) for size in held), _gib(price.cost.live_bytes)])
    titles = [*_MEMORY[:3], "kept/microbatch", "live"]
    return table([*_left_titles(stages), *titles], rows, left=len(_left_titles(stages)))


def _rows(stages: Sequence[Sequence[RunPrice]]) -> list[tuple[RunPrice, list[str]]]:
    rows = []
    for s, prices in enumerate(stages):
        for price in prices:
            layers = f"{price.first}" if price.count == 1 else f"{price.first}-{price.first + price.count - 1}"
            left = [layers, clean(price.kind), str(price.strategy)]
            rows.append((price, [f"{s}", *left] if len(stages) > 1 else left))
    return rows


def _left_titles(stages: Sequence[Sequence[RunPrice]]) -> list[str]:
    return ["stage", "layers", "kind", "strategy"] if len(stages) > 1 else ["layers", "kind", "strategy"]


def _step_lines(plan: Plan, total: Prediction) -> list[Line]:
    shares = sorted(total.times.items(), key=lambda item: -item[1])
    text = "  ".join(f"{name.replace('_', ' ')} {s / total.step_time_s:.1%}" for name, s in shares if s > 0)
    lines = [
        labelled(
            "step",
            " ",
            Piece(format_seconds(total.step_time_s), "bold"),
            f" · {format_count(total.tokens_per_s)} tokens/s · MFU {total.mfu:.1%}",
        ),
        labelled("", f" {text}"),
    ]
    if len(total.stages) > 1:
        rows = [
            [f"{s}", _ms(stage.forward_s), _ms(stage.backward_s), _ms(stage.step_end_s)]
            for s, stage in enumerate(total.stages)
        ]
        lines += table(["stage", "forward/microbatch", "backward/microbatch", "step end"], rows)
    return lines


def _peak_lines(plan: Plan, total: Prediction) -> list[Line]:
    rows = [
        [f"{s}", *(_gib(stage.memory.get(name, 0)) for name in _MEMORY), _gib(stage.peak_bytes)]
        for s, stage in enumerate(total.stages)
    ]
    lines = table(["stage", *_MEMORY, "peak"], rows)
    budget, peak = plan.memory_budget_bytes, max(stage.peak_bytes for stage in total.stages)
    if budget:
        over = Piece(f" {format_gib(peak - budget)} over", "red") if peak > budget else Piece(" fits", "green")
        lines.append(labelled("", f" peak {format_gib(peak)} of {format_gib(budget)}:", over))
    return lines


def _source(price: RunPrice) -> str:
    return "measured" if price.measured else "estimated"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if 0 < seconds < 0.1 else f"{seconds * 1e3:.0f}" if seconds else "-"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.3g}" if size_bytes else "-"
