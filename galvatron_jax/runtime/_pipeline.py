"""A pipelined plan on the devices of one or many processes.

The same operations as ``StagePrograms`` has for a plan of one stage: state, batch, train step, evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from ..analysis import Analysis
from ..plan import Plan
from ..schedule import build_schedule
from ._batches import BatchRows
from ._cut_optimizer import CutOptimizer, Values
from ._events import Event, Phase, check_order, forwards_only, global_order, project
from ._executor import Batch, Executor
from ._guard import StepMetrics
from ._links import LinkName
from ._mesh import stage_mesh
from ._model import StageModel, plan_stages
from ._passes import StagePasses
from ._pipeline_stage import PipelineStage
from ._pipeline_state import PipelineStates, States
from ._placing import is_here
from ._stage_optimizer import StageOptimizer, receive
from ._step import TrainState
from ._wiring import Tie, find_ties, gradient_place, weight_place, wire


class PipelinePrograms:
    """Programs of a pipelined plan under one optimizer."""

    def __init__(
        self,
        analysis: Analysis,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        devices: Sequence[jax.Device],
        *,
        link: LinkName = "union",
        reduces_in_float32: bool = False,
    ) -> None:
        """Build all programs (each compiles when it first runs) and check the order of the step.

        Args:
            analysis: The model, analysed at the shape of one microbatch.
            plan: Checked against the analysis (``check_plan``).
            optimizer: Any optax transformation that can be cut by parameter (``_cut_optimizer``).
            devices: All devices of all processes, node-major.
            link: What carries values between processes.
            reduces_in_float32: Gradients are reduced in the parameters' dtype (see ``StageModel``).

        Raises:
            UnsupportedError: the model's state or the optimizer cannot be cut into stages.
            PlanError: the order of the schedule can never finish.
        """
        self.analysis, self._plan = analysis, plan
        count = plan.stages[0].devices
        slices = [stage_mesh(plan.cluster, devices[s * count : (s + 1) * count]) for s in range(plan.slices)]
        meshes = [slices[k % plan.slices] for k in range(len(plan.stages))]
        models = plan_stages(analysis, plan, meshes, reduces_in_float32=reduces_in_float32)
        cut, ties = CutOptimizer(optimizer, analysis.trace.parameters), find_ties(models)
        self.stages = [_stage(k, models, cut, ties, plan.microbatches) for k in range(len(models))]
        wiring = wire(models, slices, ties, link)
        self._states = PipelineStates(analysis, cut, self.stages, wiring, link)
        self._rows = BatchRows(plan.global_batch, plan.microbatches, True, analysis.trace.has_samples)
        self.executor = Executor(
            self.stages,
            plan.slices,
            wiring,
            training=self._order(build_schedule(plan.schedule, plan.slices, plan.microbatches, plan.chunks)),
            evaluation=self._order(
                forwards_only(build_schedule(plan.schedule, plan.slices, plan.microbatches, plan.chunks))
            ),
            known=self._known,
            export_lengths=self._export_lengths(len(cut.cut.exports)),
        )

    # ---------------------------------------------------------------------------------------------------------- state
    def create(self, build: Callable[[], tuple[Any, Any]]) -> States:
        """Build the state under jit, so that each device only ever holds its own shards.

        Args:
            build: Returns (parameters, model state) with fresh values; runs inside the jit.
        """
        return self._states.create(build)

    def adopt(self, parameters: Any, model_state: Any) -> States:
        """Place existing values; copies, so that the caller's arrays are never donated."""
        return self._states.adopt(parameters, model_state)

    @property
    def abstract_neutral_state(self) -> TrainState:
        """Shape, dtype and place of each leaf of the neutral state."""
        return self._states.abstract_neutral

    def to_user(self, states: States) -> TrainState:
        """Return the neutral state."""
        return self._states.to_user(states)

    def to_stored(self, state: TrainState) -> States:
        """Return the stored state from a neutral one, placed as ``abstract_neutral_state`` says; copies."""
        return self._states.to_stored(state)

    def to_cluster(self, leaf: jax.Array) -> jax.Array:
        """Return a leaf of the neutral state spread over the devices of all stages; a copy, unless it is so already."""
        return self._states.to_cluster(leaf)

    # ----------------------------------------------------------------------------------------------------------- steps
    @functools.cached_property
    def process_rows(self) -> tuple[int, ...]:
        """Rows of the global batch that this process's devices read, ascending."""
        return self._rows.read_by(item for places in self._batch_places for item in places.items())

    def place_batch(self, leaves: Sequence[Any]) -> Batch:
        """Put a global batch, or the rows ``process_rows`` of it, on the devices."""
        return [
            {i: self._rows.place(i, leaves[i], place, self.process_rows) for i, place in places.items()}
            for places in self._batch_places
        ]

    def train(self, states: States, batch: Batch) -> tuple[States, StepMetrics]:
        """Take a step: (state, placed batch) to (new state, metrics). The state is donated."""
        return self.executor.train(states, batch)

    def evaluate(self, states: States, batch: Batch) -> jax.Array:
        """Return the mean loss of a placed batch, without update."""
        return self.executor.evaluate(states, batch)

    # ---------------------------------------------------------------------------------------------------------- pieces
    @functools.cached_property
    def _batch_places(self) -> list[dict[int, NamedSharding]]:
        """Where each leaf lives on each device slice of this process: as its first reader there wants it."""
        places: list[dict[int, NamedSharding]] = [{} for _ in range(self._plan.slices)]
        for k, stage in enumerate(self.stages):
            if is_here(stage.model.mesh.replicated):
                found = stage.model.batch_shardings(microbatched=True)
                places[k % self._plan.slices] |= {
                    i: place
                    for i, place in zip(stage.model.share.batch, found, strict=True)
                    if i not in places[k % self._plan.slices]
                }
        return places

    def _order(self, schedule: Any) -> tuple[Event, ...]:
        stages = len(self.stages)
        events = global_order(schedule, stages, self._stage_time)
        check_order(project(events, self._plan.slices), stages)
        return events

    def _stage_time(self, stage: int, phase: Phase) -> float:
        """Return the predicted time of a pass (of any unit, when nothing is predicted)."""
        predicted = self._plan.predicted
        if predicted is None or len(predicted.stages) != len(self.stages):
            return 1.0 if phase == "forward" else 2.0
        times = predicted.stages[stage]
        return times.forward_s if phase == "forward" else times.backward_s

    def _known(self, vectors: list[list[Any]]) -> Values:
        """Return the exchanged values of all rounds so far."""
        slices, optimizers = self._plan.slices, [stage.optimizer for stage in self.stages]
        values: Values = {}
        for number, chunks in enumerate(vectors):
            values |= receive(optimizers, number, [chunks[k // slices][k % slices] for k in range(len(optimizers))])
        return values

    def _export_lengths(self, rounds: int) -> list[list[int]]:
        """Length of the exchanged vectors, by round and chunk: the longest of its stages."""
        slices = self._plan.slices
        sizes = [
            [sum(v.aval.size for v in s.optimizer.exported(number)) for s in self.stages] for number in range(rounds)
        ]
        return [[max(1, *row[c * slices : (c + 1) * slices]) for c in range(self._plan.chunks)] for row in sizes]


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
