"""Where two plans differ, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from ...plan import Plan, Strategy

N = TypeVar("N", int, float)

FIELDS = ("global_batch", "microbatches", "schedule", "chunks", "memory_budget_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field, or the strategy of some layers."""

    what: str
    a: str
    b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """All differences of two plans."""

    differences: tuple[Difference, ...]
    step_time_s: tuple[float | None, float | None]
    tokens_per_s: tuple[float | None, float | None]
    times_s: dict[str, tuple[float, float]]
    """Step time by category on the slowest stage."""
    memory_bytes: dict[str, tuple[int, int]]
    """By category, of the fullest stage of each plan."""
    peak_bytes: tuple[int | None, int | None]


def diff_plans(a: Plan, b: Plan) -> PlanDiff:
    """Return where ``a`` and ``b`` differ; figures where both carry a prediction."""
    times: dict[str, tuple[float, float]] = {}
    memory: dict[str, tuple[int, int]] = {}
    if a.predicted is not None and b.predicted is not None:
        full = [max(p.stages, key=lambda s: s.peak_bytes) for p in (a.predicted, b.predicted)]
        times = _pairs(a.predicted.times, b.predicted.times, 0.0)
        memory = _pairs(full[0].memory, full[1].memory, 0)
    return PlanDiff(
        differences=tuple(_differences(a, b)),
        step_time_s=(_figure(a, "step_time_s"), _figure(b, "step_time_s")),
        tokens_per_s=(_figure(a, "tokens_per_s"), _figure(b, "tokens_per_s")),
        times_s=times,
        memory_bytes=memory,
        peak_bytes=(_peak(a), _peak(b)),
    )


def _differences(a: Plan, b: Plan) -> Iterator[Difference]:
    pairs = [
        (
            "model",
            f"{a.model.name} seq {a.model.seq} {a.model.dtype}",
            f"{b.model.name} seq {b.model.seq} {b.model.dtype}",
        )
    ]
    pairs += [("cluster", f"{a.cluster.mesh} {a.cluster.gpu}", f"{b.cluster.mesh} {b.cluster.gpu}")]
    pairs += [("hardware profile", _hardware(a), _hardware(b))]
    pairs += [(name.replace("_", " "), str(getattr(a, name)), str(getattr(b, name))) for name in FIELDS]
    pairs += [("stages", _stages(a), _stages(b))]
    for what, left, right in pairs:
        if left != right:
            yield Difference(what=what, a=left, b=right)
    yield from _layer_differences(list(a.layers()), list(b.layers()))


def _layer_differences(a: list[tuple[str, Strategy]], b: list[tuple[str, Strategy]]) -> Iterator[Difference]:
    """Runs of layers whose strategies differ in the same way."""
    first = 0
    for layer in range(1, min(len(a), len(b)) + 1):
        if layer < min(len(a), len(b)) and (a[layer], b[layer]) == (a[first], b[first]):
            continue
        if a[first] != b[first]:
            what = f"layer {first}" if layer - 1 == first else f"layers {first}-{layer - 1}"
            yield Difference(what=f"{what} {a[first][0]}", a=str(a[first][1]), b=str(b[first][1]))
        first = layer


def _pairs(a: Mapping[str, N], b: Mapping[str, N], absent: N) -> dict[str, tuple[N, N]]:
    names = dict.fromkeys([*a, *b])
    return {name: (a.get(name, absent), b.get(name, absent)) for name in names}


def _stages(plan: Plan) -> str:
    counts = ", ".join(str(stage.layer_count) for stage in plan.stages)
    return f"{len(plan.stages)} of {plan.stages[0].devices} GPUs, layers {counts}"


def _hardware(plan: Plan) -> str:
    return "none" if plan.hardware is None else f"{plan.hardware.name} ({plan.hardware.fingerprint[:8]})"


def _figure(plan: Plan, name: Literal["step_time_s", "tokens_per_s"]) -> float | None:
    return None if plan.predicted is None else float(getattr(plan.predicted, name))


def _peak(plan: Plan) -> int | None:
    return None if plan.predicted is None else max(stage.peak_bytes for stage in plan.predicted.stages)
