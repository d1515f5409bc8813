"""A verification as text for people and as plain data for ``--json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..units import GIB, format_gib
from ._compare import CollectiveRow, LayerShare
from ._verification import StageCheck, Verification

_MOST_ROWS = 8
"""Of what is alive at the peak; the rest is added up."""


def as_data(verification: Verification) -> dict[str, Any]:
    """Return what ``--json`` prints: ``{"stages": [...], "fits": ...}``, bytes of one device and one step."""
    return {"stages": [_stage_data(check) for check in verification.stages], "fits": verification.fits}


def report_lines(verification: Verification, where: str) -> Iterator[str]:
    """Yield the report line by line.

    Args:
        verification: What was found.
        where: The plan's file.
    """
    plan = verification.plan
    yield (
        f"plan      {_clean(where)} · {_clean(plan.model.name)} · {plan.cluster.mesh} {plan.cluster.gpu} · "
        f"{plan.microbatches} × {plan.microbatch_size} samples"
    )
    for check in verification.stages:
        yield from _stage_lines(check)
    reasons = [problem for check in verification.stages for problem in check.problems]
    yield "verdict   fits" if not reasons else "verdict   does not fit: " + "; ".join(map(_clean, reasons))
    for check in verification.stages:
        if reasons and check.planned_peak_bytes < check.estimate.peak_bytes:
            yield (
                f"          as compiled, with attention scores in memory; the plan counts on a fused kernel and"
                f" {format_gib(check.planned_peak_bytes)}, which this version cannot verify"
            )


# -------------------------------------------------------------------------------------------------------------- data
def _stage_data(check: StageCheck) -> dict[str, Any]:
    memory = check.compiled.memory
    return {
        "stage": check.stage,
        "estimated_peak_bytes": check.estimate.peak_bytes,
        "planned_peak_bytes": check.planned_peak_bytes,
        "compiled_peak_bytes": memory.peak,
        "compiled_allocated_bytes": memory.allocated,
        "budget_bytes": check.budget_bytes,
        "attention_is_fused": check.attention_is_fused,
        "categories": {
            "estimated": dict(check.estimate.memory),
            "compiled": {"arguments": memory.arguments, "temporaries": memory.temporaries},
            "alive_at_peak": [
                {"role": role, "layer_kind": kind, "bytes": size} for (role, kind), size in _alive(check).most_common()
            ],
        },
        "collectives": [_row_data(row) for row in check.collectives],
        "rematerialised_by_xla": check.compiled.rematerialised,
        "warnings": list(check.compiled.warnings),
        "problems": list(check.problems),
        "compile_s": round(check.compiled.compile_s, 3),
        "xla_options": check.compiled.options,
        "versions": check.compiled.versions,
    }


def _row_data(row: CollectiveRow) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "group_size": row.group_size,
        "predicted_count": row.predicted_count,
        "predicted_bytes": row.predicted_bytes,
        "compiled_count": row.compiled_count,
        "compiled_bytes": row.compiled_bytes,
        "assumed": row.assumed,
        "estimated_s": row.seconds,
        "exposed_s": row.exposed_s,
        "layers": [
            {
                "layer_kind": s.layer_kind,
                "phase": s.phase,
                "count": s.count,
                "bytes": s.bytes,
                "estimated_s": s.seconds,
                "exposed_s": s.exposed_s,
            }
            for s in row.shares
        ],
    }


# -------------------------------------------------------------------------------------------------------------- text
def _stage_lines(check: StageCheck) -> Iterator[str]:
    compiled = check.compiled
    versions = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    yield f"compiled  by XLA:GPU in {compiled.compile_s:.0f} s, no GPU used ({versions})"
    yield from _option_lines(compiled.options)
    if check.attention_is_fused:
        yield "attention a fused cuDNN kernel, as the estimate assumes"
    else:
        yield "attention compiled without a fused kernel (no cuDNN call): its scores are arrays; the estimate below"
        yield "          assumes the same, so it may be above the plan's own"
    yield ""
    yield from _memory_lines(check)
    yield ""
    yield from _collective_lines(check.collectives)
    yield from [f"warning   {_clean(warning)}" for warning in compiled.warnings]
    yield ""


def _option_lines(options: Mapping[str, bool | int]) -> Iterator[str]:
    """Name the options of the runtime, which this program was compiled with."""
    for position, (name, value) in enumerate(options.items()):
        yield f"{'' if position else 'options':<10}{name}={str(value).lower()}"


def _memory_lines(check: StageCheck) -> Iterator[str]:
    memory, estimate = check.compiled.memory, check.estimate.memory
    state = estimate["parameters"] + estimate["optimizer"]
    rows = [
        ("peak", check.estimate.peak_bytes, memory.peak, f"estimate {100 * check.error:+.1f} %"),
        ("  arguments", state, memory.arguments, "parameters, optimizer state, batch"),
        ("  the rest", check.estimate.peak_bytes - state, memory.peak - memory.arguments, "gradients, residuals, live"),
        ("allocated", None, memory.allocated, f"gaps included; budget {format_gib(check.budget_bytes)}"),
    ]
    yield f"{'memory, GiB per GPU':<24}{'estimated':>10}{'compiled':>10}"
    for name, estimated, found, note in rows:
        left = "" if estimated is None else f"{estimated / GIB:.2f}"
        yield f"  {name:<22}{left:>10}{found / GIB:>10.2f}  {note}"
    yield "  estimated: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.items() if size)
    yield from _alive_lines(check)


def _alive_lines(check: StageCheck) -> Iterator[str]:
    alive = _alive(check).most_common()
    if not alive:
        return
    parts = [f"{kind + ' ' if kind else ''}{role} {size / GIB:.2f}" for (role, kind), size in alive[:_MOST_ROWS]]
    rest = sum(size for _, size in alive[_MOST_ROWS:])
    yield "  at the compiled peak: " + ", ".join(map(_clean, parts)) + (f", other {rest / GIB:.2f}" if rest else "")


def _collective_lines(rows: Sequence[CollectiveRow]) -> Iterator[str]:
    if not rows:
        yield "collectives  none, as predicted"
        return
    yield f"{'collectives, per GPU and step':<38}{'predicted':>22}{'compiled':>22}{'exposed ms':>20}  assumed"
    for row in rows:
        name = f"{row.kind} over {row.group_size}"
        predicted = _amount(row.predicted_count, row.predicted_bytes) if row.planned else "nobody planned it"
        amount = _amount(row.compiled_count, row.compiled_bytes)
        yield f"  {name:<36}{predicted:>22}{amount:>22}{_exposed(row):>20}  {row.assumed}".rstrip()
        for share in row.shares:
            place = f"{share.layer_kind} {share.phase}".strip()
            yield f"    {_clean(place):<56}{_amount(share.count, share.bytes):>22}{_exposed(share):>20}"


def _exposed(part: CollectiveRow | LayerShare) -> str:
    """Milliseconds that the compiled schedule does not hide, of all of them."""
    return f"{part.exposed_s * 1e3:.1f} of {part.seconds * 1e3:.1f}" if part.seconds else ""


def _amount(count: int, size_bytes: int) -> str:
    return f"{count:>5} × {size_bytes / 2**20:>9.1f} MiB" if count else "–"


def _alive(check: StageCheck) -> Counter[tuple[str, str]]:
    """Bytes alive at the peak, by role and layer kind."""
    found: Counter[tuple[str, str]] = Counter()
    for use in check.compiled.peak:
        found[use.role, check.compiled.segments.get(use.layer, "")] += use.bytes
    return found


def _clean(text: str) -> str:
    """Without control characters: names come from files."""
    return "".join(letter for letter in text if letter.isprintable())
