"""A verification as text for people and as plain data for ``--json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..plan import Plan
from ..units import GIB, format_gib
from ._compare import CollectiveRow, LayerShare
from ._compile import Call, CompiledPlan
from ._verification import StageCheck, Verification

_MOST_ROWS = 8
"""Of what is alive at the peak; the rest is added up."""


def as_data(verification: Verification) -> dict[str, Any]:
    """Return what ``--json`` prints: ``{"stages": [...], "fits": ...}``, bytes of one device and one step."""
    return {"stages": [_stage_data(check, verification) for check in verification.stages], "fits": verification.fits}


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
    yield from _compiler_lines(verification.compiled)
    alike: dict[tuple[str, ...], list[StageCheck]] = {}
    for check in verification.stages:
        alike.setdefault(tuple(_stage_lines(check, verification)), []).append(check)
    for lines, checks in alike.items():
        yield from _title([check.stage for check in checks], plan)
        yield from lines
    many = len(verification.stages) > 1
    reasons = [f"stage {c.stage}: {p}" if many else p for c in verification.stages for p in c.problems]
    yield "verdict   fits" if not reasons else "verdict   does not fit: " + "; ".join(map(_clean, reasons))
    for check in verification.stages:
        if reasons and check.planned_peak_bytes < check.estimate.peak_bytes:
            yield (
                f"          as compiled, with attention scores in memory; the plan counts on a fused kernel and"
                f" {format_gib(check.planned_peak_bytes)}"
            )


# -------------------------------------------------------------------------------------------------------------- data
def _stage_data(check: StageCheck, verification: Verification) -> dict[str, Any]:
    memory, compiled = check.compiled.memory, verification.compiled
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
            "compiled": dict(memory.categories),
            "alive_at_peak": [
                {"role": role, "layer_kind": kind, "bytes": size}
                for (role, kind), size in _alive(check, compiled.segments).most_common()
            ],
        },
        "fullest": {"stage": memory.stage, "program": memory.call, "microbatch": memory.microbatch},
        "programs": [_program_data(call) for call in check.compiled.calls],
        "collectives": [_row_data(row) for row in check.collectives],
        "rematerialised_by_xla": check.compiled.rematerialised,
        "warnings": list(check.compiled.warnings),
        "problems": list(check.problems),
        "compile_s": round(sum(call.program.compile_s for call in check.compiled.calls), 3),
        "xla_options": compiled.options,
        "versions": compiled.versions,
    }


def _program_data(call: Call) -> dict[str, Any]:
    memory = call.program.memory
    return {
        "name": call.name,
        "times": call.times,
        "argument_bytes": memory.arguments,
        "peak_bytes": memory.peak,
        "allocated_bytes": memory.allocated,
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
def _compiler_lines(compiled: CompiledPlan) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in compiled.versions.items())
    programs = f", {compiled.programs} programs" if compiled.programs > 1 else ""
    yield f"compiled  by XLA:GPU in {compiled.compile_s:.0f} s{programs}, no GPU used ({versions})"
    for position, (name, value) in enumerate(compiled.options.items()):  # of the runtime, for these very programs
        yield f"{'' if position else 'options':<10}{name}={str(value).lower()}"


def _title(stages: Sequence[int], plan: Plan) -> Iterator[str]:
    """Name the stages that a report holds for, and their devices."""
    if len(plan.stages) > 1:
        slices = sorted({stage % plan.slices for stage in stages})
        shared = f", devices shared with every {plan.slices}th stage" if plan.chunks > 1 else ""
        yield f"stage{_numbers(stages)} · device slice{_numbers(slices)}{shared}"


def _numbers(numbers: Sequence[int]) -> str:
    return f"{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _stage_lines(check: StageCheck, verification: Verification) -> Iterator[str]:
    if check.attention_is_fused:
        yield "attention a fused cuDNN kernel, as the estimate assumes"
    else:
        yield "attention compiled without a fused kernel (no cuDNN call): its scores are arrays; the estimate below"
        yield "          assumes the same, so it may be above the plan's own"
        if check.planned_peak_bytes < check.estimate.peak_bytes:
            yield "          for the kernel: pip install --no-deps nvidia-cudnn-cu12 (716 MB; -cu13 beside jax-cuda13);"
            yield '          a model of your own must ask for it: dot_product_attention(implementation="cudnn")'
    yield ""
    yield from _memory_lines(check, verification.compiled.segments)
    yield ""
    yield from _collective_lines(check.collectives)
    yield from [f"warning   {_clean(warning)}" for warning in check.compiled.warnings]
    yield ""


def _memory_lines(check: StageCheck, segments: Mapping[str, str]) -> Iterator[str]:
    memory, estimate = check.compiled.memory, check.estimate
    yield f"{'memory, GiB per GPU':<24}{'estimated':>10}{'compiled':>10}"
    yield _row("peak", estimate.peak_bytes, memory.peak, f"estimate {100 * check.error:+.1f} %")
    if "arguments" in memory.categories:
        yield from _train_step_lines(check)
    else:
        names = dict.fromkeys((*estimate.memory, *memory.categories))
        for name in names:
            found = memory.categories.get(name, 0)
            if found or estimate.memory.get(name, 0):
                yield _row(f"  {name}", estimate.memory.get(name, 0), found, _NOTES.get(name, ""))
    yield _row("allocated", None, memory.allocated, f"gaps included; budget {format_gib(check.budget_bytes)}")
    if memory.call != "train":
        number = "" if memory.microbatch is None else f" of microbatch {memory.microbatch}"
        yield f"  fullest in the program '{memory.call}'{number} of stage {memory.stage}"
    yield from _alive_lines(check, segments)


def _train_step_lines(check: StageCheck) -> Iterator[str]:
    """What is known of one program for the whole step: arguments, and the rest."""
    memory, estimate = check.compiled.memory, check.estimate.memory
    arguments, state = memory.categories["arguments"], estimate["parameters"] + estimate["optimizer"]
    yield _row("  arguments", state, arguments, "parameters, optimizer state, batch")
    rest = check.estimate.peak_bytes - state
    yield _row("  the rest", rest, memory.peak - arguments, "gradients, residuals, live")
    yield "  estimated: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.items() if size)


_NOTES = {
    "gradients": "sums over microbatches",
    "residuals": "of all microbatches in flight",
    "live": "what the program adds to its arguments while it runs",
    "boundary": "messages from and to other stages",
}


def _row(name: str, estimated: int | None, found: int, note: str) -> str:
    left = "" if estimated is None else f"{estimated / GIB:.2f}"
    return f"  {name:<22}{left:>10}{found / GIB:>10.2f}  {note}".rstrip()


def _alive_lines(check: StageCheck, segments: Mapping[str, str]) -> Iterator[str]:
    alive = _alive(check, segments).most_common()
    if not alive:
        return
    parts = [f"{kind + ' ' if kind else ''}{role} {size / GIB:.2f}" for (role, kind), size in alive[:_MOST_ROWS]]
    rest = sum(size for _, size in alive[_MOST_ROWS:])
    where = "compiled peak" if check.compiled.memory.call == "train" else "peak of that program"
    yield f"  at the {where}: " + ", ".join(map(_clean, parts)) + (f", other {rest / GIB:.2f}" if rest else "")


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


def _alive(check: StageCheck, segments: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """Bytes alive at the peak, by role and layer kind."""
    found: Counter[tuple[str, str]] = Counter()
    for use in check.compiled.peak:
        found[use.role, segments.get(use.layer, "")] += use.bytes
    return found


def _clean(text: str) -> str:
    """Without control characters: names come from files."""
    return "".join(letter for letter in text if letter.isprintable())
