"""What compiled programs said of a layer's memory takes the place of the formulas (``profilers memory``).

Measured are, for a few strategies and numbers of samples n on a device, what one layer keeps, K', and the workspace, W'
(``measured.MemoryTable``). A table counts for the strategies with its spread and remat that gather weights (zero 3) if
it did. With k and w the formulas (``_memory``), s the layer's strategy and s' that of the table,

    K(s, n) = K'(n) + k(s, n) - k(s', n)        W(s, n) = W'(n) + w(s, n) - w(s', n)

Where s is s' the formulas cancel and the compiler alone speaks; other zero ranks, hsdp and accumulation add or take
away what the formulas say. All other strategies are priced by formulas alone: what these miss in one spread or remat
says little about another (docs/design/0059).

Between two numbers of samples, and beyond them, bytes are affine in the samples (the profile states the largest error
of that). The states stay formulas: they are exact. Nothing is below zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from ..measured import MeasuredMemory, MemoryTable
from ..plan import Plan
from ..profile import HardwareProfile, LayerKind, ModelProfile
from ..strategy import Strategy
from ._measured import of_device
from ._values import Setting

Formula = Callable[[Strategy, Setting], Mapping[str, float]]
"""Bytes of a layer by category."""


def valid_memory(kind: LayerKind, hardware: HardwareProfile) -> MeasuredMemory | None:
    """Return what was compiled of ``kind`` for this kind of device, with attention run the same way; None otherwise."""
    return of_device(kind.memory, kind, hardware)


def compiled_memory(kind: LayerKind, strategy: Strategy, setting: Setting, formula: Formula) -> dict[str, float]:
    """Return the bytes of a layer by category, from compiled programs where there are some.

    Args:
        kind: The layer kind.
        strategy: How the layer is spread.
        setting: Batch, stage and hardware.
        formula: The estimate.
    """
    estimated = dict(formula(strategy, setting))
    table = _matching(valid_memory(kind, setting.hardware), strategy, setting.microbatches > 1)
    if table is None:
        return estimated
    measured, samples = _strategy_of(table), max(1, setting.microbatch // strategy.dp)
    one, two = (formula(measured, _setting_of(table, setting, n)) for n in (1, 2))
    for name, points in (("residuals", table.kept_bytes), ("live", table.workspace_bytes)):
        growth = two[name] - one[name]
        by_formula = one[name] + (samples - 1) * growth
        found = _at(table.samples, points, samples, growth)
        estimated[name] = max(0.0, estimated[name] + found - by_formula)
    return estimated


def count_compiled(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> tuple[int, int]:
    """Return how many different (kind, strategy) pairs of the plan were compiled, and how many there are."""
    pairs = {(run.kind, run.strategy) for stage in plan.stages for run in stage.runs}
    known = [
        _matching(valid_memory(model.kind(kind), hardware), strategy, plan.microbatches > 1) for kind, strategy in pairs
    ]
    return sum(table is not None for table in known), len(pairs)


def memory_source(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> str:
    """Say where the memory figures of ``plan`` come from: ``"measured for 12 of 14 (kind, strategy) pairs, ..."``."""
    known, pairs = count_compiled(plan, model, hardware)
    if not known:
        return "estimated"
    rest = ", the others estimated" if known < pairs else ""
    return f"measured for {known} of {pairs} (kind, strategy) pairs{rest}"


def _matching(memory: MeasuredMemory | None, strategy: Strategy, accumulates: bool) -> MemoryTable | None:
    """Return the table that counts for ``strategy``, if there is one; of several, the likest."""
    tables = [table for table in memory.tables if _activations(table) == _activations(strategy)] if memory else []
    return min(
        tables, key=lambda table: (table.accumulates != accumulates, abs(table.zero - strategy.zero)), default=None
    )


def _at(samples: tuple[int, ...], points: tuple[int, ...], n: int, growth: float) -> float:
    """Return the bytes at ``n`` samples, on the line through the two nearest points (one: growing by ``growth``)."""
    if len(samples) == 1:
        return points[0] + (n - samples[0]) * growth
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


def _activations(spread: Strategy | MemoryTable) -> tuple[object, ...]:
    """What decides the size of activations on a device, and whether weights are gathered."""
    return spread.tp, spread.sp, spread.ulysses, spread.remat, spread.zero == 3
