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
from ._batches import BatchRows
from ._executor import Batch, Executor
from ._guard import StepMetrics
from ._links import LinkName
from ._pipeline_state import PipelineStates, States
from ._placing import is_here
from ._planned_pipeline import plan_pipeline
from ._step import TrainState
from ._wiring import wire


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
        planned = plan_pipeline(analysis, plan, optimizer, devices, reduces_in_float32=reduces_in_float32)
        self.analysis, self.planned, self.stages = analysis, planned, list(planned.stages)
        wiring = wire(planned.models, planned.slices, planned.ties, link)
        self._states = PipelineStates(analysis, planned.cut, self.stages, wiring, link)
        self._rows = BatchRows(plan.global_batch, plan.microbatches, True, analysis.trace.has_samples)
        self.executor = Executor(planned, wiring)

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
        """Where each leaf lives on each device slice of this process."""
        slices = zip(self.planned.batch_places, self.planned.slices, strict=True)
        return [places if is_here(mesh.replicated) else {} for places, mesh in slices]
