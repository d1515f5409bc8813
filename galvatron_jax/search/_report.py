"""What the user sees: the plan, its prediction, and what it is compared with, as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from .._text import Line, Piece, clean, labelled, plain, table
from ..cost import LayerCost, estimate_layer, memory_source, stage_setting, valid_memory
from ..plan import Plan, PlanRun, Stage
from ..profile import HardwareProfile, ModelProfile
from ..schedule import in_flight_units
from ..units import GIB, format_count, format_gib, format_seconds
from ._baselines import Baseline
from ._find import SearchResult

RARE = ("ulysses", "hsdp")
"""Columns that are shown only when a run uses them."""

MEMORY_COLUMNS = ("parameters", "gradients", "optimizer", "residuals", "live", "boundary")


def describe_plan(plan: Plan, *, model: ModelProfile | None = None, hardware: HardwareProfile | None = None) -> str:
    """Return a plan as plain text: what runs where, and what it should cost.

    Args:
        plan: Any plan; figures appear when it carries a prediction.
        model: With ``hardware``, adds the milliseconds and GiB of each run of layers.
        hardware: See ``model``.
    """
    return plain([*plan_lines(plan, model, hardware), *prediction_lines(plan)])


def result_lines(result: SearchResult, model: ModelProfile, hardware: HardwareProfile) -> list[Line]:
    """Return the lines for a finished search: plan, prediction, baselines, proof."""
    return [
        *plan_lines(result.plan, model, hardware),
        (),
        *prediction_lines(result.plan),
        (),
        *baseline_lines(result.plan, result.baselines),
        (),
        proof_line(result),
    ]


def plan_lines(plan: Plan, model: ModelProfile | None, hardware: HardwareProfile | None) -> list[Line]:
    """Return what runs where: one row for each run of layers."""
    stages = _many(len(plan.stages), "stage")
    chunks = f", {plan.chunks} stages on each GPU" if plan.chunks > 1 else ""
    header = labelled(
        "plan",
        Piece(f"global batch {plan.global_batch} · {stages} of {_many(plan.stages[0].devices, 'GPU')}", "bold"),
        f" · {_many(plan.microbatches, 'microbatch')} of {_many(plan.microbatch_size, 'sample')}",
        f" · {plan.schedule} schedule{chunks}" if len(plan.stages) > 1 else "",
    )
    columns, rows = run_cells(plan, model, hardware)
    lines = [header, *table(columns, rows, left=columns.index("kind") + 1)]
    if model is not None and hardware is not None and any(valid_memory(kind, hardware) for kind in model.kinds):
        lines.append(labelled("", f" memory {memory_source(plan, model, hardware)}"))
    return lines


def run_cells(
    plan: Plan, model: ModelProfile | None = None, hardware: HardwareProfile | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return column titles and one row of cells for each run of layers; columns that nothing uses are left out.

    Args:
        plan: Any plan.
        model: With ``hardware``, adds the milliseconds and GiB of each run.
        hardware: See ``model``.
    """
    rows: list[dict[str, str]] = []
    first = 0
    for s, stage in enumerate(plan.stages):
        for run in stage.runs:
            row = {"stage": f"{s + 1}"} if len(plan.stages) > 1 else {}
            row |= _run_cells(run, first)
            if model is not None and hardware is not None:
                row |= _run_prices(plan, s, stage, run, model, hardware)
            rows.append(row)
            first += run.count
    columns = [name for name in rows[0] if name not in RARE or any(row[name] != "-" for row in rows)]
    return columns, [[row[name] for name in columns] for row in rows]


def prediction_lines(plan: Plan) -> list[Line]:
    """Return step time, throughput, where the time and the memory go; nothing for a plan without a prediction."""
    predicted = plan.predicted
    if predicted is None:
        return []
    per_gpu = predicted.tokens_per_s / plan.cluster.devices
    shares = sorted(predicted.times.items(), key=lambda item: -item[1])
    budget = plan.memory_budget_bytes
    peak = max(stage.peak_bytes for stage in predicted.stages)
    return [
        labelled(
            "predicted",
            " ",
            Piece(f"{format_seconds(predicted.step_time_s)} per step", "bold"),
            f" · {format_count(predicted.tokens_per_s)} tokens/s ({format_count(per_gpu)} per GPU)",
            f" · MFU {predicted.mfu:.1%} (causal attention counted half)",
        ),
        labelled("", " " + "  ".join(f"{_words(name)} {t / predicted.step_time_s:.1%}" for name, t in shares if t > 0)),
        labelled(
            "memory", f" peak {format_gib(peak)}" + (f" of {format_gib(budget)} per GPU" if budget else " per GPU")
        ),
        *table(
            ["stage", *MEMORY_COLUMNS, "peak"],
            [
                [f"{s + 1}", *(_gib(stage.memory.get(name, 0)) for name in MEMORY_COLUMNS), _gib(stage.peak_bytes)]
                for s, stage in enumerate(predicted.stages)
            ],
        ),
    ]


def baseline_lines(plan: Plan, baselines: Sequence[Baseline]) -> list[Line]:
    """Return the table of what else could be run."""
    assert plan.predicted is not None
    rows = [_baseline_cells("this plan", plan, plan.predicted.tokens_per_s, "")]
    for baseline in sorted(baselines, key=_speed):
        if baseline.plan is None:
            rows.append([baseline.name, *["-"] * 6, f"not possible here ({baseline.description})"])
        elif baseline.fits:
            rows.append(
                _baseline_cells(baseline.name, baseline.plan, plan.predicted.tokens_per_s, baseline.description)
            )
        else:
            needs = f"does not fit: needs {format_gib(baseline.peak_bytes or 0)} ({baseline.description})"
            batch, microbatches = f"{baseline.plan.global_batch}", f"{baseline.plan.microbatches}"
            rows.append([baseline.name, batch, microbatches, "-", "-", "-", _gib(baseline.peak_bytes or 0), needs])
    header = ["beside it", "batch", "microbatches", "s/step", "tokens/s", "speed", "peak GiB", ""]
    return table(header, rows, indent=0)


def proof_line(result: SearchResult) -> Line:
    """Return what the search proved, and how long it took."""
    certificate = result.plan.certificate
    if certificate is None:
        verdict = Piece("best estimate within the smaller budget; faster ones do not fit as compiled", "yellow")
        return labelled("proof", verdict, f" · {result.search_s:.1f} s")
    if certificate.optimal:
        even = " (interleaved stages: of even cuts)" if result.plan.schedule == "interleaved-1f1b" else ""
        verdict = Piece(f"optimal in the stated space{even}", "green")
    else:
        verdict = Piece(f"within {certificate.gap:.2%} of the optimum (stopped early)", "yellow")
    counts = f" · {result.solved} of {result.candidates} combinations of batch, microbatches and stages solved, bounds"
    counts += " exclude the others"
    return labelled("proof", verdict, counts if certificate.optimal else "", f" · {result.search_s:.1f} s")


def _run_cells(run: PlanRun, first: int) -> dict[str, str]:
    last, strategy = first + run.count - 1, run.strategy
    return {
        "layers": f"{first}-{last}" if run.count > 1 else f"{first}",
        "kind": clean(run.kind),
        "tp": f"{strategy.tp}",
        "sp": "yes" if strategy.sp else "-",
        "ulysses": f"{strategy.ulysses}" if strategy.ulysses > 1 else "-",
        "dp": f"{strategy.dp}",
        "zero": f"{strategy.zero}" if strategy.zero_ranks * strategy.replicas > 1 else "-",
        "hsdp": f"{strategy.replicas} x {strategy.zero_ranks}" if strategy.replicas > 1 else "-",
        "remat": strategy.remat if strategy.remat != "none" else "-",
    }


def _run_prices(
    plan: Plan, s: int, stage: Stage, run: PlanRun, model: ModelProfile, hardware: HardwareProfile
) -> dict[str, str]:
    """Milliseconds per step and persistent GiB of all layers of a run."""
    cost = _layer_cost(plan, stage, run, model, hardware)
    slice_, chunk = s % plan.slices, s // plan.slices
    moments = in_flight_units(plan.schedule, slice_, plan.slices, plan.microbatches, plan.chunks)
    in_flight = max(held[chunk] for held in moments)
    seconds = plan.microbatches * (cost.forward_s + cost.backward_s) + cost.sync_s + cost.update_s
    size = cost.state_bytes + in_flight * cost.residual_bytes
    return {"ms/step": f"{run.count * seconds * 1e3:.1f}", "GiB": _gib(run.count * size)}


def _layer_cost(plan: Plan, stage: Stage, run: PlanRun, model: ModelProfile, hardware: HardwareProfile) -> LayerCost:
    setting = stage_setting(plan, stage, model, hardware)
    return estimate_layer(model.kind(run.kind), run.strategy, setting)


def _baseline_cells(name: str, plan: Plan, reference: float, note: str) -> list[str]:
    predicted = plan.predicted
    assert predicted is not None
    peak = max(stage.peak_bytes for stage in predicted.stages)
    return [
        name,
        f"{plan.global_batch}",
        f"{plan.microbatches}",
        f"{predicted.step_time_s:.3g}",
        format_count(predicted.tokens_per_s),
        f"{predicted.tokens_per_s / reference:.1%}",
        _gib(peak),
        note,
    ]


def _speed(baseline: Baseline) -> tuple[float, int]:
    """Fastest first, then those that do not fit, then those that are not possible."""
    return (baseline.seconds_per_sample or float("inf"), baseline.peak_bytes or 2**62)


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f}" if size_bytes >= GIB / 20 or not size_bytes else f"{size_bytes / GIB:.2g}"


def _words(name: str) -> str:
    return clean(name.replace("_", " "))


def _many(count: int, word: str) -> str:
    plural = "es" if word.endswith("ch") else "s"
    return f"{count} {word}" if count == 1 else f"{count} {word}{plural}"
