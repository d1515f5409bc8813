"""What a practitioner would otherwise run: each at its best microbatch count and batch, priced by the same objective.

Every baseline is a family of *uniform* plans: one strategy for all layers, and for the pipelined family the repeated
layers divided evenly, the embedding with the first and the head with the last stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan import Plan, ScheduleName, Strategy
from ..schedule import in_flight_microbatches
from ._engine import Candidate, Engine
from ._knapsack import Floats
from ._paths import path_messages
from ._plan_building import peak_bytes, priced_plan
from ._pricing import Prices, message_buffers
from ._slices import fills_on
from ._space import layout_of
from ._stage import ROUNDING

SCHEDULE: ScheduleName = "1f1b"
"""What pipelined baselines run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One family at its best."""

    name: str
    description: str
    plan: Plan | None
    """The fastest one that fits; when none fits, the one that needs the least memory; None: not possible at all."""
    fits: bool

    @property
    def seconds_per_sample(self) -> float | None:
        """Predicted step time over global batch, None unless it fits."""
        if self.plan is None or self.plan.predicted is None or not self.fits:
            return None
        return self.plan.predicted.step_time_s / self.plan.global_batch

    @property
    def peak_bytes(self) -> int | None:
        """Predicted peak of the fullest stage."""
        return None if self.plan is None else peak_bytes(self.plan)


class _Family(NamedTuple):
    name: str
    description: str
    pipelined: bool
    member: Callable[[Strategy], bool]


class _Uniform(NamedTuple):
    """One uniform plan before it is priced."""

    bound_s: float
    peak_bytes: float
    candidate: Candidate
    cuts: tuple[int, ...]
    strategy: Strategy


def price_baselines(engine: Engine, patience_s: float = np.inf) -> tuple[Baseline, ...]:
    """Return all baselines for the engine's problem and batch list; after ``patience_s`` as far as they are."""
    until_s = time.monotonic() + patience_s
    priced = (_price(engine, family, until_s) for family in _families(engine))
    return tuple(baseline for baseline in priced if baseline.plan is not None or time.monotonic() <= until_s)


def _families(engine: Engine) -> tuple[_Family, ...]:
    nodes, node = engine.problem.cluster.nodes, engine.problem.cluster.gpus_per_node
    return (
        _Family("dp", "data parallel", False, lambda s: s.inner == 1 and s.zero == 0 and s.remat == "none"),
        _Family("fsdp", "zero 3", False, lambda s: _sharded(s, 1) and s.remat == "none"),
        _Family("fsdp + remat", "zero 3, full remat", False, lambda s: _sharded(s, 1) and s.remat == "full"),
        _Family(
            "hsdp",
            "zero 3 inside a node, copies across nodes",
            False,
            lambda s: nodes > 1 and _sharded(s, nodes) and s.remat == "none",
        ),
        _Family(
            "tp x dp",
            f"tp {node} with sp inside the node, data parallel across",
            False,
            lambda s: s.tp == node > 1 and s.sp and s.zero == 0 and s.remat == "none",
        ),
        _Family(
            "megatron 3d",
            "best pp x tp x dp, zero 1, even stages",
            True,
            lambda s: s.ulysses == s.replicas == 1 and s.sp == (s.tp > 1) and s.zero == (s.dp > 1),
        ),
        _Family("best uniform", "best single strategy for all layers", False, lambda s: True),
    )


def _sharded(strategy: Strategy, replicas: int) -> bool:
    """Zero 3 without anything else, in so many copies."""
    return strategy.inner == 1 and strategy.zero == 3 and strategy.replicas == replicas


def _price(engine: Engine, family: _Family, until_s: float) -> Baseline:
    """Take candidates in the order of their rough bound until none can beat the best member found."""
    best: tuple[float, Plan] | None = None
    smallest: _Uniform | None = None
    candidates = [c for c in engine.candidates() if c.slices == 1 or (family.pipelined and c.schedule == SCHEDULE)]
    for candidate in sorted(candidates, key=lambda c: (engine.rough_bound_s(c) / c.global_batch, c)):
        limit = best[0] if best else np.inf
        if engine.rough_bound_s(candidate) / candidate.global_batch >= limit or time.monotonic() > until_s:
            break
        for uniform in sorted(_members(engine, family, candidate), key=lambda u: (u.bound_s, u.strategy)):
            if uniform.peak_bytes > engine.problem.budget_bytes:
                smallest = min(smallest or uniform, uniform, key=lambda u: u.peak_bytes)
            elif uniform.bound_s / candidate.global_batch < (best[0] * (1 - ROUNDING) if best else np.inf):
                priced = _plan(engine, uniform)
                assert priced.predicted is not None
                per_sample = priced.predicted.step_time_s / priced.global_batch
                if peak_bytes(priced) <= engine.problem.budget_bytes and (best is None or per_sample < best[0]):
                    best = per_sample, priced
    plan = best[1] if best else _plan(engine, smallest) if smallest else None
    return Baseline(name=family.name, description=family.description, plan=plan, fits=best is not None)


def _members(engine: Engine, family: _Family, candidate: Candidate) -> Iterator[_Uniform]:
    """Yield the family's plans of one candidate that are legal for all layers."""
    prices, cuts = engine.prices_of(candidate), _even_cuts(engine, candidate.slices)
    if prices is None or cuts is None:
        return
    kinds = [prices.kinds[kind] for kind in dict.fromkeys(prices.order.tolist())]
    for strategy in kinds[0].every:
        if family.member(strategy) and all(strategy in kind.every for kind in kinds):
            stages = [_stage(prices, candidate, s, cuts, strategy) for s in range(candidate.slices)]
            bound_s = _bound_s(stages, prices, candidate, cuts)
            yield _Uniform(bound_s, max(float(stage[3]) for stage in stages), candidate, cuts, strategy)


def _even_cuts(engine: Engine, stages: int) -> tuple[int, ...] | None:
    """First layer of each stage, then the number of layers; None when the repeated layers do not divide."""
    runs = engine.problem.model.layers
    block = max(range(len(runs)), key=lambda r: runs[r].count)
    before = sum(run.count for run in runs[:block])
    share, rest = divmod(runs[block].count, stages)
    if rest:
        return None
    return (0, *(before + s * share for s in range(1, stages)), sum(run.count for run in runs))


def _stage(prices: Prices, candidate: Candidate, s: int, cuts: tuple[int, ...], strategy: Strategy) -> Floats:
    """(forward, backward, step end, peak bytes) of a stage with one strategy for all layers."""
    layers = prices.order[cuts[s] : cuts[s + 1]]
    kinds, counts = np.unique(layers, return_counts=True)
    here = prices.holding(int(prices.straight_layers(np.bincount(layers, minlength=len(prices.kinds)))))
    rows = np.array([here.kinds[kind].every[strategy] for kind in kinds])
    forward, backward, step_end, state, residual = (counts[:, None] * rows[:, :5]).sum(axis=0).tolist()
    layout = prices.layouts.index(layout_of(strategy))
    if s > 0:
        there, back = prices.relayouts[layers[0]].from_wire_s
        forward, backward = forward + there[layout], backward + back[layout]
    if s < candidate.slices - 1:
        there, back = prices.relayouts[prices.order[cuts[s + 1]]].to_wire_s
        forward, backward = forward + there[layout], backward + back[layout]
    in_flight = in_flight_microbatches(SCHEDULE, s, candidate.slices, candidate.microbatches)
    more = fills_on(candidate.shape, candidate.microbatches, s)
    buffers = message_buffers(prices, candidate.slices, s, (cuts[s], cuts[s + 1]), goes_on=more)
    return np.array([forward, backward, step_end, state + in_flight * residual + rows[:, 5].max() + buffers])


def _bound_s(stages: list[Floats], prices: Prices, candidate: Candidate, cuts: tuple[int, ...]) -> float:
    """The bottleneck paths (``_paths.bottleneck_path``): exact for one stage, a lower bound for several."""
    bound, before, m = 0.0, 0.0, candidate.microbatches
    wires = [prices.crossing(k, j) for k, j in enumerate(cuts[1:-1])]
    for s, (forward, backward, _, _) in enumerate(stages):
        messages = sum(path_messages(m, s, prices.meets_B, k).seconds(wire) for k, wire in enumerate(wires))
        bound = max(bound, before + m * float(forward + backward) + messages)
        before += float(forward + backward)
    return bound + float(stages[0][2])


def _plan(engine: Engine, uniform: _Uniform) -> Plan:
    kinds = [run.kind for run in engine.problem.model.layers for _ in range(run.count)]
    stages = tuple(
        tuple((kind, uniform.strategy, 1) for kind in kinds[uniform.cuts[s] : uniform.cuts[s + 1]])
        for s in range(uniform.candidate.slices)
    )
    return priced_plan(engine.problem, uniform.candidate, stages)
