"""Why a layer has its strategy: what every other one would cost, and what decides between them.

An alternative is the plan with this layer, or with its whole run of equal layers, under another strategy; its figures
are those that ``cost.estimate_plan`` gives for that plan. An overview of all runs prices only the most promising ones,
by the price of a layer alone (changes of layout left out), so that it stays fast for long pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...cost import LayerCost, estimate_layer, memory_budget, stage_setting
from ...plan import Plan, Strategy
from ...profile import HardwareProfile, ModelProfile
from .._space import Limits, legal, stage_strategies
from ._changes import Place, Price, place_of, places, price, with_strategy

PROMISING = 4
"""Alternatives priced for a run in an overview, of the fastest ones and of the fastest that need no more memory."""

EQUAL = 1e-9
"""Relative difference below which two step times are called equal."""

Verdict = Literal["fastest", "memory", "better exists"]


class Subject(NamedTuple):
    """A plan and what it is priced with."""

    plan: Plan
    model: ModelProfile
    hardware: HardwareProfile

    @property
    def budget_bytes(self) -> int:
        """Bytes that a device has for arrays."""
        return self.plan.memory_budget_bytes or memory_budget(self.hardware)

    @property
    def present(self) -> Price:
        """What the plan itself costs."""
        return price(self.plan, self.model, self.hardware, self.budget_bytes)

    def changed(self, layers: Sequence[int], strategy: Strategy) -> Price:
        """Return what the plan costs with another strategy for ``layers``."""
        return price(with_strategy(self.plan, layers, strategy), self.model, self.hardware, self.budget_bytes)

    def layer_cost(self, place: Place, strategy: Strategy) -> LayerCost:
        """Return what one layer costs by itself."""
        setting = stage_setting(self.plan, self.plan.stages[place.stage], self.model, self.hardware)
        return estimate_layer(self.model.kind(place.run.kind), strategy, setting)

    def step_seconds(self, cost: LayerCost) -> float:
        """Return the seconds of one layer over a step."""
        return self.plan.microbatches * (cost.forward_s + cost.backward_s) + cost.sync_s + cost.update_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another strategy for a layer."""

    strategy: Strategy
    layer: Price
    """The plan with this layer changed."""
    run: Price
    """The plan with all layers of its run changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a run of layers has its strategy."""

    stage: int
    first: int
    last: int
    kind: str
    strategy: Strategy
    verdict: Verdict
    """``fastest``: no other strategy of the whole run is faster, memory or not; ``memory``: one is, but does not fit;
    ``better exists``: one is faster and fits, so the plan is not the optimum of the whole space."""
    faster: tuple[Strategy, Price] | None
    """The fastest alternative that is faster than the plan."""
    next_best: tuple[Strategy, Price] | None
    """The fastest alternative that fits and is not faster."""


def layer_alternatives(subject: Subject, layer: int) -> tuple[Alternative, ...]:
    """Return every legal alternative for ``layer``, the fastest for its whole run first."""
    place = place_of(subject.plan, layer)
    found = [
        Alternative(
            strategy=strategy, layer=subject.changed([layer], strategy), run=subject.changed(place.layers, strategy)
        )
        for strategy in _choices(subject, place)
    ]
    return tuple(sorted(found, key=lambda a: (a.run.step_time_s, a.layer.step_time_s, a.run.peak_bytes, a.strategy)))


def plan_reasons(subject: Subject) -> tuple[Reason, ...]:
    """Return the reason for every run of the plan."""
    present = subject.present
    return tuple(_reason(subject, place, present) for place in places(subject.plan))


def verdict_of(present: Price, faster: Price | None) -> Verdict:
    """Return what decides, given the fastest alternative that is faster than the plan."""
    if faster is None:
        return "fastest"
    return "better exists" if faster.fits else "memory"


def is_faster(a: Price, b: Price) -> bool:
    """Return whether ``a`` takes less time than ``b`` by more than rounding."""
    return a.step_time_s < b.step_time_s * (1 - EQUAL)


def _reason(subject: Subject, place: Place, present: Price) -> Reason:
    costs = {strategy: subject.layer_cost(place, strategy) for strategy in _choices(subject, place)}
    ranked = sorted(costs, key=lambda s: (subject.step_seconds(costs[s]), s))
    now = _size(subject.layer_cost(place, place.run.strategy))
    small = [strategy for strategy in ranked if _size(costs[strategy]) <= now]
    promising = list(dict.fromkeys([*ranked[:PROMISING], *small[:PROMISING]]))
    priced = sorted(
        ((subject.changed(place.layers, s), s) for s in promising), key=lambda found: (found[0].step_time_s, found[1])
    )
    faster = [(s, p) for p, s in priced if is_faster(p, present)]
    fitting = [(s, p) for s, p in faster if p.fits]
    slower = [(s, p) for p, s in priced if p.fits and not is_faster(p, present)]
    decisive = fitting[0] if fitting else faster[0] if faster else None
    return Reason(
        stage=place.stage,
        first=place.layers[0],
        last=place.layers[-1],
        kind=place.run.kind,
        strategy=place.run.strategy,
        verdict=verdict_of(present, decisive and decisive[1]),
        faster=decisive,
        next_best=slower[0] if slower else None,
    )


def _size(cost: LayerCost) -> float:
    return cost.state_bytes + cost.residual_bytes


def _choices(subject: Subject, place: Place) -> list[Strategy]:
    plan = subject.plan
    every = stage_strategies(plan.cluster, plan.stages[place.stage].devices, Limits())
    kind = subject.model.kind(place.run.kind)
    return [s for s in legal(kind, every, plan.microbatch_size) if s != place.run.strategy]
