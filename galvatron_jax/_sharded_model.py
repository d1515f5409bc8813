"""A model in training under a plan: what ``auto_shard`` returns.

Nothing happens before the first batch is seen: its shape is needed to trace the loss. Then the model is analysed, a
plan searched (unless one was given), the state built straight into its shardings, and the step compiled.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import msgspec
import optax

from ._document import encode
from ._text import plain
from ._weights import Weights, unread_parameters
from .analysis import Analysis, Loss, abstract_batch, analyse_model, analysis_lines, disagreeing_samples, sample_count
from .cluster import Cluster
from .errors import GalvatronError, PlanError, UnsupportedError
from .hardware import load_hardware
from .plan import Plan, Training, check_plan
from .profile import HardwareProfile, ModelProfile
from .runtime import LinkName, PipelinePrograms, StagePrograms, TrainState, agree, in_turn, plan_model, stage_mesh
from .search import describe_plan, find_plan

Programs = StagePrograms | PipelinePrograms


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What one training step returns."""

    loss: jax.Array
    """Mean loss of the batch before the update, a float32 scalar still on its way (convert it to wait)."""
    gradient_norm: jax.Array
    """Euclidean norm of the gradients of all parameters, a float32 scalar still on its way."""
    finite: jax.Array
    """Whether loss and norm are finite, a boolean scalar still on its way; if not, the update was left out."""
    step: int
    """Number of steps so far, this one included."""


class ShardedModel:
    """A model in training under a plan; made by ``auto_shard``."""

    def __init__(
        self,
        model: Any,
        *,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        plan: Plan | None,
        cluster: Cluster,
        hardware: HardwareProfile | None,
        link: LinkName = "union",
        layers: str | None = None,
        float32_reductions: bool = False,
        weights: Weights | None = None,
    ) -> None:
        """Hold the parts; see ``auto_shard``."""
        self._source, self._loss, self._optimizer, self._weights = model, loss, optimizer, weights
        self._link, self._layers, self._float32_reductions = link, layers, float32_reductions
        self._plan, self._cluster, self._hardware = plan, cluster, hardware
        self._analysis: Analysis | None = None
        self._programs: Programs | None = None
        self._state: Any = None
        self._steps = 0
        self._most_stages: int | None = None
        """1 where the model or the optimizer cannot be cut."""

    def prepare(self, batch: Any) -> Plan:
        """Analyse, search and build the state for batches shaped like ``batch``; return the plan.

        Done by the first ``step`` or ``eval`` on its own.

        Args:
            batch: A pytree of arrays whose dimension 0 is the global batch (under a given plan, the rows
                ``process_rows`` of it are enough).

        Raises:
            AnalysisError: the model or loss cannot be traced.
            InfeasibleError: no plan fits the devices' memory.
            PlanError: the given plan does not belong to this model or batch, or differs between processes.
            ModelError: the given weights are not those of this model.
            UnsupportedError: the given plan cuts the model or the optimizer where they cannot be cut.
        """
        if self._programs is None:
            samples = _batch_size(batch)
            if self._plan is None:
                self._programs = self._search_and_build(batch, samples)
            else:
                self._check_samples(samples)
                self._programs = self._build(batch, self._plan)
            agree("plan", encode(self.plan), action="give all processes the same plan file")
            self._state = self._build_state(self._programs)
        return self.plan

    def step(self, batch: Any) -> StepResult:
        """Train on one global batch.

        Args:
            batch: A pytree of host or device arrays, always of the same shape. Dimension 0 is the global batch, or only
                the rows ``process_rows`` of it.

        Raises:
            PlanError: the batch has another number of samples than the plan.
        """
        programs: Any = self._ready(batch)
        placed = programs.place_batch(jax.tree.leaves(batch))
        self._state, metrics = in_turn(programs.train(self.state, placed))
        self._steps += 1
        return StepResult(**metrics._asdict(), step=self._steps)

    def eval(self, batch: Any) -> jax.Array:
        """Return the mean loss of a batch (see ``step``) under the same plan, without an update."""
        programs: Any = self._ready(batch)
        loss: jax.Array = in_turn(programs.evaluate(self.state, programs.place_batch(jax.tree.leaves(batch))))
        return loss

    @property
    def plan(self) -> Plan:
        """The plan in use.

        Raises:
            GalvatronError: no plan was given, and no batch has been seen yet.
        """
        if self._plan is None:
            raise GalvatronError("there is no plan yet", action="call prepare(batch) or step(batch) first")
        return self._plan

    @property
    def state(self) -> Any:
        """Parameters, optimizer state, model state and step number, as global arrays in their stored form.

        Runs of layers are stacked there, and a pipelined plan has one part for each stage; ``neutral_state`` has the
        user's own structure.

        Raises:
            GalvatronError: no batch has been seen yet.
        """
        if self._state is None:
            raise GalvatronError("there is no state yet", action="call prepare(batch) or step(batch) first")
        return self._state

    def neutral_state(self) -> TrainState:
        """Return the state in the user's own structure, whatever the plan: what a checkpoint holds.

        Leaves are global arrays of the user's shapes, on the devices where the plan keeps them: of a pipelined plan on
        those of the first stage that holds the leaf, or, when some process has none of these, spread over the devices
        of all stages. So every process holds a part of every leaf.
        """
        programs: Any = self._ready_programs()
        neutral: TrainState = in_turn(programs.to_user(self.state))
        return neutral

    def abstract_state(self) -> TrainState:
        """Return shape, dtype and sharding of each leaf of ``neutral_state`` (``jax.ShapeDtypeStruct``).

        Call ``prepare`` first. A checkpoint restored to these needs no further copy.
        """
        return self._ready_programs().abstract_neutral_state

    def restore_state(self, state: TrainState) -> None:
        """Go on from ``state``, a ``neutral_state`` of this model under any plan, placed as ``abstract_state`` says."""
        self._state = self._ready_programs().to_stored(state)
        self._steps = int(state.step)

    @property
    def process_rows(self) -> tuple[int, ...]:
        """Rows of the global batch that this process's devices read, ascending: all that ``step`` must be given.

        Call ``prepare`` first.
        """
        return self._ready_programs().process_rows

    @property
    def model(self) -> Any:
        """The user's own kind of object with copies of the trained parameters: global arrays over all devices.

        An NNX module; the variables of a Linen module; the tree of parameters of a pure function. The arrays are
        sharded as the plan stores them, and where it is pipelined also over the stages, so that the module can be
        called (under ``jax.jit``, in all processes together).
        """
        programs, state = self._ready_programs(), self.neutral_state()
        assert self._analysis is not None, "programs follow an analysis"
        copied = programs.to_cluster if isinstance(programs, PipelinePrograms) else lambda leaf: leaf.copy()
        trace = self._analysis.trace
        return trace.model.restore(*trace.rows.together(*jax.tree.map(copied, (state.parameters, state.model_state))))

    def next_plan(self, hardware: HardwareProfile, *, max_stages: int | None = None, max_tp: int | None = None) -> Plan:
        """Search a plan for the same batch with other figures or narrower limits; what is in use stays as it is.

        Raises:
            GalvatronError: no batch has been seen yet.
            InfeasibleError: nothing fits.
        """
        if self._analysis is None:
            raise GalvatronError("there is no analysis yet", action="call prepare(batch) or step(batch) first")
        return self._found(self._analysis.profile, hardware, self.plan.global_batch, max_stages, max_tp)

    def explain(self) -> str:
        """Return as text what runs where and what it should cost; and, after the first batch, what the analysis found.

        The second part is what ``python -m galvatron_jax.analysis`` prints: layers, kinds, shapes with named classes,
        how each may be sharded.
        """
        found = plain(analysis_lines(self._analysis)) if self._analysis else ""
        return f"{describe_plan(self.plan)}\n{found}".rstrip("\n") + "\n"

    # ---------------------------------------------------------------------------------------------------------- pieces
    def _ready_programs(self) -> Programs:
        if self._programs is None:
            raise GalvatronError("there is no state yet", action="call prepare(batch) or step(batch) first")
        return self._programs

    def _ready(self, batch: Any) -> Programs:
        self.prepare(batch)
        self._check_samples(_batch_size(batch))
        return self._ready_programs()

    def _check_samples(self, samples: int) -> None:
        """Refuse a batch of another size than the plan's, as early as it can be known."""
        rows = self.plan.global_batch
        if self._programs is not None:
            rows = len(self._programs.process_rows)
        elif jax.process_count() > 1:
            return
        if samples not in (self.plan.global_batch, rows):
            mine = f" (or the {rows} rows of process_rows)" if rows < self.plan.global_batch else ""
            raise PlanError(
                f"got a batch of {samples} samples",
                expected=f"{self.plan.global_batch}, the plan's global batch{mine}",
                where="batch",
                action="drop the remainder of the data, or search a plan for this batch",
            )

    def _build(self, batch: Any, plan: Plan) -> Programs:
        """Build the programs of a plan; none of them is compiled yet."""
        analysis = self._analyse(batch, plan.microbatch_size, plan.model.name)
        check_plan(plan, analysis.profile)
        if plan.microbatches > 1:
            _warn_of_microbatches(analysis, plan)
        if len(plan.stages) > 1:
            return PipelinePrograms(
                analysis,
                plan,
                self._optimizer,
                jax.devices(),
                link=self._link,
                reduces_in_float32=self._float32_reductions,
            )
        mesh = stage_mesh(self._cluster, jax.devices())
        planned = plan_model(analysis, plan, mesh, reduces_in_float32=self._float32_reductions)
        return StagePrograms(planned, self._optimizer, plan.microbatches)

    def _search_and_build(self, batch: Any, samples: int) -> Programs:
        """Search a plan and build its programs; of one stage, where stages cannot be cut."""
        try:
            self._plan = self._search(batch, samples)
            return self._build(batch, self._plan)
        except UnsupportedError:
            self._most_stages = 1
            self._plan = self._search(batch, samples)
            return self._build(batch, self._plan)

    def _analyse(self, batch: Any, samples: int, name: str | None = None) -> Analysis:
        """Analyse at a batch of ``samples``: one microbatch, or all while there is no plan; the last trace is kept."""
        spec = abstract_batch(batch, samples)
        if self._analysis is None or jax.tree.leaves(self._analysis.trace.batch) != jax.tree.leaves(spec):
            self._analysis = analyse_model(self._source, self._loss, spec, name=name, layers=self._layers)
        return self._analysis

    def _search(self, batch: Any, samples: int) -> Plan:
        profile = self._analyse(batch, samples).profile
        return self._found(profile, self._hardware or load_hardware(self._cluster.gpu), samples, None, None)

    def _found(
        self,
        profile: ModelProfile,
        hardware: HardwareProfile,
        samples: int,
        max_stages: int | None,
        max_tp: int | None,
    ) -> Plan:
        assert self._analysis is not None, "the search follows an analysis"
        # A plan may count on a fused kernel only where the model asks for one: no call is changed unasked.
        fused = hardware.fused_attention and self._analysis.asks_for_kernels
        hardware = msgspec.structs.replace(hardware, fused_attention=fused)
        return find_plan(
            profile,
            self._cluster,
            hardware,
            global_batches=(samples,),
            max_stages=max_stages or self._most_stages,
            max_tp=max_tp,
            training=self._training(),
        ).plan

    def _training(self) -> Training:
        """What this optimizer keeps for each parameter."""
        assert self._analysis is not None, "the search follows an analysis"
        parameters = self._analysis.trace.parameters
        count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
        state = jax.eval_shape(self._optimizer.init, parameters)
        state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        return Training(optimizer="optax", state_bytes_per_parameter=round(state_bytes / max(count, 1)))

    def _build_state(self, programs: Programs) -> Any:
        assert self._analysis is not None, "programs follow an analysis"
        trace = self._analysis.trace
        if self._weights is not None:
            parameters = unread_parameters(trace.rows, self._weights)
            return programs.adopt(parameters, trace.rows.fresh_state())
        if trace.model.is_built:
            return programs.adopt(*trace.rows.apart(*trace.model.build()))
        return programs.create(lambda: trace.rows.apart(*trace.model.build()))


def _batch_size(batch: Any) -> int:
    samples, sizes = sample_count(batch), disagreeing_samples(batch)
    if samples is None or sizes:
        raise PlanError(
            f"got batch leaves with {sizes} samples",
            expected="arrays that agree in dimension 0, the global batch",
            where="batch",
            action="pass a pytree of arrays such as {'inputs': ..., 'targets': ...}",
        )
    return samples


def _warn_of_microbatches(analysis: Analysis, plan: Plan) -> None:
    """Say what several microbatches compute otherwise than one batch would."""
    of = f"of each of {plan.microbatches} microbatches of {plan.microbatch_size} samples, not of the batch of"
    keep = f"{plan.global_batch}; a plan of one microbatch keeps"
    if statistics := analysis.statistics:
        names = f"{', '.join(statistics[:3])}{' ...' if len(statistics) > 3 else ''}"
        text = f"{names}: statistics {of} {keep} them (--microbatches 1)"
    elif mixed := analysis.mixed_samples:
        names = f"{', '.join(mixed[:3])}{' ...' if len(mixed) > 3 else ''}"
        text = f"the loss is no mean over samples ({names}): the mean of the losses {of} {keep} it (--microbatches 1)"
    else:
        return
    warnings.warn(text, UserWarning, stacklevel=5)
