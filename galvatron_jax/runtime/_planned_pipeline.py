"""The stages of a pipelined plan and the order of a step, before anything connects or runs them.

All that can be said of a pipeline without touching a device: so also of one for GPUs that are not there, which
``verify`` compiles.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from ..analysis import Analysis
from ..plan import Plan
from ..schedule import Schedule, build_schedule
from ._cut_optimizer import CutOptimizer, Values
from ._events import Event, check_order, forwards_only, global_order, project
from ._mesh import StageMesh, stage_mesh
from ._model import StageModel
from ._passes import StagePasses
from ._pipeline_stage import PipelineStage
from ._stage_optimizer import StageOptimizer, receive
from ._stages import plan_stages
from ._wiring import Tie, find_ties, gradient_place, weight_place


@dataclasses.dataclass(frozen=True)
class PlannedPipeline:
    """A pipelined plan under one optimizer, see ``plan_pipeline``."""

    analysis: Analysis
    plan: Plan
    slices: tuple[StageMesh, ...]
    """The device slices; stage ``k`` lives on slice ``k % len(slices)``."""
    models: tuple[StageModel, ...]
    cut: CutOptimizer
    ties: tuple[Tie, ...]
    stages: tuple[PipelineStage, ...]

    # ----------------------------------------------------------------------------------------------------- the order
    @functools.cached_property
    def training(self) -> tuple[Event, ...]:
        """The global order of a training step.

        Raises:
            PlanError: it can never finish.
        """
        return self._order(self._schedule)

    @functools.cached_property
    def evaluation(self) -> tuple[Event, ...]:
        """The global order of an evaluation; errors as ``training``."""
        return self._order(forwards_only(self._schedule))

    @property
    def _schedule(self) -> Schedule:
        plan = self.plan
        return build_schedule(plan.schedule, plan.slices, plan.microbatches, plan.chunks)

    def _order(self, schedule: Schedule) -> tuple[Event, ...]:
        events = global_order(schedule, len(self.stages))
        check_order(project(events, self.plan.slices), len(self.stages))
        return events

    # ----------------------------------------------------------------------------------------------- what is exchanged
    def known(self, vectors: list[list[Any]]) -> Values:
        """Return the exchanged values of all rounds so far, from vectors [slices, n] by round and chunk."""
        slices, optimizers = self.plan.slices, [stage.optimizer for stage in self.stages]
        values: Values = {}
        for number, chunks in enumerate(vectors):
            values |= receive(optimizers, number, [chunks[k // slices][k % slices] for k in range(len(optimizers))])
        return values

    @functools.cached_property
    def export_lengths(self) -> list[list[int]]:
        """Length of the exchanged vectors, by round and chunk: the longest of its stages."""
        slices, rounds = self.plan.slices, len(self.cut.cut.exports)
        sizes = [
            [sum(v.aval.size for v in s.optimizer.exported(number)) for s in self.stages] for number in range(rounds)
        ]
        return [[max(1, *row[c * slices : (c + 1) * slices]) for c in range(self.plan.chunks)] for row in sizes]

    # ---------------------------------------------------------------------------------------------------------- places
    @functools.cached_property
    def batch_places(self) -> list[dict[int, NamedSharding]]:
        """Where each batch leaf lives on each device slice: as its first reader there wants it."""
        places: list[dict[int, NamedSharding]] = [{} for _ in self.slices]
        for k, stage in enumerate(self.stages):
            here = places[k % len(self.slices)]
            for leaf, place in zip(
                stage.model.share.batch, stage.model.batch_shardings(microbatched=True), strict=True
            ):
                here.setdefault(leaf, place)
        return places


def plan_pipeline(
    analysis: Analysis,
    plan: Plan,
    optimizer: optax.GradientTransformation,
    devices: Sequence[jax.Device],
    *,
    reduces_in_float32: bool = False,
) -> PlannedPipeline:
    """Build the stages of a pipelined plan; nothing is compiled and no device is touched.

    Args:
        analysis: The model, analysed at the shape of one microbatch.
        plan: Checked against the analysis (``check_plan``).
        optimizer: Any optax transformation that can be cut by parameter (``_cut_optimizer``).
        devices: All devices of all processes, node-major.
        reduces_in_float32: See ``StageModel``.

    Raises:
        UnsupportedError: the model's state or the optimizer cannot be cut into stages.
    """
    count = plan.stages[0].devices
    slices = tuple(stage_mesh(plan.cluster, devices[s * count : (s + 1) * count]) for s in range(plan.slices))
    meshes = [slices[k % plan.slices] for k in range(len(plan.stages))]
    models = plan_stages(analysis, plan, meshes, reduces_in_float32=reduces_in_float32)
    views = {leaf: s.view for model in models for s in model.slots if s.view for leaf in s.leaves}
    cut, ties = CutOptimizer(optimizer, analysis.trace.parameters, views), tuple(find_ties(models))
    stages = tuple(_stage(k, models, cut, ties, plan.microbatches) for k in range(len(models)))
    return PlannedPipeline(analysis, plan, slices, models, cut, ties, stages)


def _stage(
    number: int, models: Sequence[StageModel], cut: CutOptimizer, ties: Sequence[Tie], microbatches: int
) -> PipelineStage:
    mirrored = {tie.mirror_slot: gradient_place(models, tie) for tie in ties if tie.mirror == number}
    owned = tuple(tie for tie in ties if tie.owner == number)
    model = models[number]
    return PipelineStage(
        number=number,
        passes=StagePasses(model, microbatches),
        optimizer=StageOptimizer(cut, model.slots, frozenset(mirrored), makes_loss=model.share.makes_loss),
        owned_ties=owned,
        mirrored_places=mirrored,
        tied_places=[weight_place(models, tie) for tie in owned],
    )
