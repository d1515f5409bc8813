"""What compiled programs said of a layer's memory takes the place of the formulas (``profilers memory``).

Measured are, for a few strategies and numbers of samples n on a device, what one layer keeps, K', and the workspace,
W' (``measured.MemoryTable``). With k and w the formulas of the same (``_memory``), at the measured strategy s' nearest
to the layer's strategy s,

    same spread and remat    K(s, n) = K'(n) + k(s, n) - k(s', n)      W(s, n) = W'(n) + w(s, n) - w(s', n)
    another                  K(s, n) = K'(n) * k(s, n) / k(s', n)      W(s, n) = W'(n) * w(s, n) / w(s', n)

Where s is s' the formulas cancel and the compiler alone speaks. Another zero level, other zero ranks or accumulation
add or take away copies of weights: a difference. Another spread or remat divides activations: a ratio, so that what the
formulas miss in one strategy they are corrected by in its neighbours too, and none looks cheaper for being unmeasured.

Between two numbers of samples, and beyond them, bytes are affine in the samples (the profile states the largest error
of that). The states stay formulas: they are exact. Nothing is below zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import log

from ..measured import MeasuredMemory, MemoryTable
from ..plan import Plan
from ..profile import HardwareProfile, LayerKind, ModelProfile
from ..strategy import Strategy
from ._kind import is_fused
from ._values import Setting

Formula = Callable[[Strategy, Setting], Mapping[str, float]]
"""Bytes of a layer by category."""


def valid_memory(kind: LayerKind, hardware: HardwareProfile) -> MeasuredMemory | None:
    """Return what was compiled of ``kind`` for this kind of device, with attention run the same way; None otherwise."""
    memory = kind.memory
    if memory is None or memory.provenance.device != hardware.device:
        return None
    has_attention = any(dot.attention for dot in kind.dots)
    same = not has_attention or memory.fused_attention == is_fused(kind, hardware)
    return memory if same else None


def compiled_memory(kind: LayerKind, strategy: Strategy, setting: Setting, formula: Formula) -> dict[str, float]:
    """Return the bytes of a layer by category, from compiled programs where there are some.

    Args:
        kind: The layer kind.
        strategy: How the layer is spread.
        setting: Batch, stage and hardware.
        formula: The estimate.
    """
    estimated = dict(formula(strategy, setting))
    memory = valid_memory(kind, setting.hardware)
    if memory is None:
        return estimated
    table = _nearest(memory, strategy, setting.microbatches > 1)
    measured, samples = _strategy_of(table), max(1, setting.microbatch // strategy.dp)

    def anchor(n: int) -> Mapping[str, float]:
        return formula(measured, _setting_of(table, setting, n))

    alike = _activations(measured) == _activations(strategy)
    for name, points in (("residuals", table.kept_bytes), ("live", table.workspace_bytes)):
        by_formula = anchor(samples)[name]
        if len(points) > 1:
            found = _at(table.samples, points, samples)
        else:
            found = points[0] + by_formula - anchor(table.samples[0])[name]
        if alike or by_formula <= 0:
            estimated[name] = max(0.0, found + estimated[name] - by_formula)
        else:
            estimated[name] = max(0.0, found) * estimated[name] / by_formula
    return estimated


def count_compiled(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> tuple[int, int]:
    """Return how many different (kind, strategy) pairs of the plan were compiled, and how many there are."""
    pairs = {(run.kind, run.strategy) for stage in plan.stages for run in stage.runs}
    known = [
        _is_compiled(valid_memory(model.kind(kind), hardware), strategy, plan.microbatches > 1)
        for kind, strategy in pairs
    ]
    return sum(known), len(pairs)


def memory_source(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> str:
    """Say where the memory figures of ``plan`` come from: ``"measured for 12 of 14 (kind, strategy) pairs, ..."``."""
    if not any(valid_memory(kind, hardware) for kind in model.kinds):
        return "estimated"
    known, pairs = count_compiled(plan, model, hardware)
    rest = ", formulas scaled by the nearest for the others" if known < pairs else ""
    return f"measured for {known} of {pairs} (kind, strategy) pairs{rest}"


def _is_compiled(memory: MeasuredMemory | None, strategy: Strategy, accumulates: bool) -> bool:
    return any(
        _activations(_strategy_of(table)) == _activations(strategy)
        and (table.zero == 3) == (strategy.zero == 3)
        and table.accumulates == accumulates
        for table in (memory.tables if memory else ())
    )


def _nearest(memory: MeasuredMemory, strategy: Strategy, accumulates: bool) -> MemoryTable:
    def distance(table: MemoryTable) -> tuple[object, ...]:
        measured = _strategy_of(table)
        return (
            measured.remat != strategy.remat,
            _style(measured) != _style(strategy),
            abs(log(measured.inner / strategy.inner)),
            (measured.zero == 3) != (strategy.zero == 3),
            table.accumulates != accumulates,
            abs(measured.zero - strategy.zero),
        )

    return min(memory.tables, key=distance)


def _at(samples: tuple[int, ...], points: tuple[int, ...], n: int) -> float:
    """Return the bytes at ``n`` samples, on the line through the two nearest points."""
    right = next((i for i in range(1, len(samples)) if n <= samples[i]), len(samples) - 1)
    x, x2, y, y2 = samples[right - 1], samples[right], points[right - 1], points[right]
    return y + (n - x) * (y2 - y) / (x2 - x)


def _strategy_of(table: MemoryTable) -> Strategy:
    names = ("tp", "sp", "ulysses", "dp", "zero", "replicas", "remat")
    return Strategy(**{name: getattr(table, name) for name in names})


def _setting_of(table: MemoryTable, setting: Setting, samples: int) -> Setting:
    """The setting in which ``table`` was compiled, with ``samples`` on the device."""
    return dataclasses.replace(
        setting,
        stage_devices=table.tp * table.ulysses * table.dp,
        microbatch=samples * table.dp,
        microbatches=max(2, setting.microbatches) if table.accumulates else 1,
    )


def _activations(strategy: Strategy) -> tuple[int, bool, int, str]:
    """What decides the size of activations on a device."""
    return strategy.tp, strategy.sp, strategy.ulysses, strategy.remat


def _style(strategy: Strategy) -> str:
    return "ulysses" if strategy.ulysses > 1 else "sp" if strategy.sp else "tp"
