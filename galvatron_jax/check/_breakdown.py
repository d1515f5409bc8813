"""A plan taken apart: what each run of layers costs in one step, in seconds by cause and in bytes by use."""

from __future__ import annotations

from dataclasses import dataclass

from ..cost import LayerCost, estimate_layer, is_measured, stage_setting
from ..plan import Plan
from ..profile import HardwareProfile, ModelProfile
from ..strategy import Strategy


@dataclass(frozen=True, slots=True)
class RunPrice:
    """``count`` equal layers of a stage under one strategy."""

    first: int
    """Position of the first of them in the model."""
    count: int
    kind: str
    strategy: Strategy
    microbatches: int
    cost: LayerCost
    """Of one of them: seconds of one microbatch, and what comes once a step."""
    measured: bool
    """Its compute was measured, on these devices."""

    @property
    def causes_s(self) -> dict[str, float]:
        """Seconds of one step by cause, of all layers of the run on one device."""
        times = {name: self.count * self.microbatches * s for name, s in self.cost.times.items()}
        times["gradient sync"] = self.count * self.cost.sync_s
        times["optimizer"] = self.count * self.cost.update_s
        return times

    @property
    def step_s(self) -> float:
        """Seconds of one step, of all layers of the run on one device."""
        each_s = self.microbatches * (self.cost.forward_s + self.cost.backward_s)
        return self.count * (each_s + self.cost.sync_s + self.cost.update_s)


def stage_prices(plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> list[list[RunPrice]]:
    """Return the price of every run of layers, by stage.

    Args:
        plan: A plan for ``model``, found or hand-written.
        model: The model's profile at the plan's sequence length and dtype.
        hardware: The devices.
    """
    first, stages = 0, []
    for stage in plan.stages:
        setting, prices = stage_setting(plan, stage, model, hardware), []
        for run in stage.runs:
            kind = model.kind(run.kind)
            cost = estimate_layer(kind, run.strategy, setting)
            measured = is_measured(kind, hardware)
            prices.append(RunPrice(first, run.count, run.kind, run.strategy, plan.microbatches, cost, measured))
            first += run.count
        stages.append(prices)
    return stages
