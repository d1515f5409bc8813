"""Plan: how each layer is spread over the devices, as one readable JSON document.

A plan is a tuple of pipeline stages in layer order on contiguous, equal slices of the node-major device list; a stage
is a tuple of runs of consecutive layers with one kind and one strategy (``strategy``). With ``chunks`` of v
(interleaved schedules) a device slice holds v stages: stage k lives on slice ``k % (stages / v)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec

from ._document import Document, Value, load, save
from .cluster import Cluster
from .errors import ClusterError, DeviceMismatchError, PlanError
from .profile import Bytes, Count, ModelProfile, NonNegative
from .schedule import ScheduleName as ScheduleName
from .strategy import Remat as Remat
from .strategy import Strategy as Strategy
from .strategy import strategy_violations as strategy_violations
from .strategy import zero_dim as zero_dim


class PlanRun(Value, frozen=True, kw_only=True):
    """``count`` consecutive layers of one kind under one strategy."""

    kind: str
    count: Count
    strategy: Strategy


RUNS_SHOWN = 8
"""Runs of layers that a message lists."""


class Stage(Value, frozen=True, kw_only=True):
    """A contiguous slice of layers on a contiguous slice of ``devices`` devices."""

    devices: Count
    runs: tuple[PlanRun, ...]

    @property
    def layer_count(self) -> int:
        """Number of layers of this stage."""
        return sum(run.count for run in self.runs)

    def layers(self) -> Iterator[tuple[str, Strategy]]:
        """Yield (kind, strategy) of every layer in order."""
        for run in self.runs:
            yield from [(run.kind, run.strategy)] * run.count


class ModelReference(Value, frozen=True, kw_only=True):
    """Which model a plan is for."""

    name: str
    structure: str
    dtype: str
    seq: Count
    layer_count: Count
    parameter_count: Count


class HardwareReference(Value, frozen=True, kw_only=True):
    """Which hardware profile priced a plan."""

    name: str
    fingerprint: str
    measured: bool


class Training(Value, frozen=True, kw_only=True):
    """What the optimizer adds to each parameter."""

    optimizer: str = "adamw"
    state_bytes_per_parameter: Annotated[int, msgspec.Meta(ge=0, le=64)] = 8
    """Two float32 moments for Adam."""


class StagePrediction(Value, frozen=True, kw_only=True):
    """Estimated figures of one stage; memory is that of its device slice, which interleaved stages share."""

    forward_s: NonNegative
    """One microbatch, exposed communication included."""
    backward_s: NonNegative
    """One microbatch, recomputation and exposed communication included."""
    step_end_s: NonNegative
    """Once per step: gradient synchronisation that nothing hides, and the optimizer update."""
    peak_bytes: Bytes
    memory: dict[str, Bytes]
    """``peak_bytes`` by category."""


class Prediction(Value, frozen=True, kw_only=True):
    """Estimated figures of a plan (a cost model made them, no clock ran)."""

    step_time_s: NonNegative
    tokens_per_s: NonNegative
    mfu: NonNegative
    """Model FLOPs (6 per parameter and token, plus attention; causal halved) over the peak of all devices."""
    times: dict[str, NonNegative]
    """``step_time_s`` by what the time goes to, on the slowest stage: the values add up."""
    stages: tuple[StagePrediction, ...]


class Certificate(Value, frozen=True, kw_only=True):
    """What the search proved."""

    optimal: bool
    lower_bound_s: NonNegative
    """No plan in the stated space processes one sample faster than this, times the plan's global batch."""
    gap: NonNegative


class Plan(Document, frozen=True, kw_only=True):
    """How to spread one model over one cluster."""

    DOCUMENT: ClassVar[str] = "plan"

    model: ModelReference
    cluster: Cluster
    hardware: HardwareReference | None = None
    training: Training = Training()
    memory_budget_bytes: Bytes | None = None
    global_batch: Count
    """Samples per optimizer step, over all devices."""
    microbatches: Count = 1
    schedule: ScheduleName = "1f1b"
    chunks: Count = 1
    """Stages on each slice of devices (virtual stages of an interleaved schedule)."""
    stages: tuple[Stage, ...]
    """In layer order."""
    predicted: Prediction | None = None
    certificate: Certificate | None = None

    @property
    def microbatch_size(self) -> int:
        """Samples of one microbatch, over all data-parallel ranks."""
        return self.global_batch // self.microbatches

    @property
    def slices(self) -> int:
        """Number of device slices: the depth of the pipeline."""
        return len(self.stages) // self.chunks

    def layers(self) -> Iterator[tuple[str, Strategy]]:
        """Yield (kind, strategy) of every layer of the model in order."""
        for stage in self.stages:
            yield from stage.layers()


def load_plan(path: str | Path, *, model: ModelProfile | None = None) -> Plan:
    """Read a plan file and check it.

    Args:
        path: The plan file.
        model: The profile of the model that it is to run, when known.

    Raises:
        DocumentNotFoundError: there is no such file.
        DocumentError: the file is not a plan of this schema.
        PlanError: the plan contradicts itself or the model; the message lists every violation.
    """
    plan = load(path, Plan)
    check_plan(plan, model, where=str(path))
    return plan


def save_plan(plan: Plan, path: str | Path) -> Path:
    """Check a plan and write it atomically; return the path.

    Raises:
        PlanError: the plan contradicts itself.
        DocumentError: the folder cannot be written, or ``path`` is a symbolic link.
    """
    check_plan(plan, where=str(path))
    return save(plan, path)


def model_reference(model: ModelProfile) -> ModelReference:
    """Return the reference that a plan for ``model`` carries."""
    return ModelReference(
        name=model.name,
        structure=model.structure,
        dtype=model.dtype,
        seq=model.seq,
        layer_count=model.layer_count,
        parameter_count=model.parameter_count,
    )


def check_plan(plan: Plan, model: ModelProfile | None = None, *, where: str = "plan") -> None:
    """Check that a plan agrees with itself and, when given, with the model.

    Args:
        plan: The plan.
        model: The profile of the model that it is to run.
        where: Named in the error, usually the plan's file.

    Raises:
        PlanError: with every violation, not only the first.
    """
    found = _shape_violations(plan)
    if model is not None:
        found += _model_violations(plan, model)
    if found:
        raise PlanError(
            f"{len(found)} violation{'s' * (len(found) > 1)}:\n  - " + "\n  - ".join(found),
            where=where,
            action="fix the plan, or search again: python -m galvatron_jax.search --mesh " + plan.cluster.mesh,
        )


def check_devices(plan: Plan, devices: int, *, where: str = "plan") -> None:
    """Check that ``devices`` devices are visible, as the plan's cluster has.

    Raises:
        DeviceMismatchError: another number is visible.
    """
    if plan.cluster.devices != devices:
        raise DeviceMismatchError(
            f"the plan is for {plan.cluster.mesh} ({plan.cluster.devices} devices), {devices} are visible",
            expected="equal numbers",
            where=where,
            action=f"search again: python -m galvatron_jax.search --mesh 1x{devices}",
        )


def _shape_violations(plan: Plan) -> list[str]:
    found = []
    if not plan.stages:
        return ["stages: the plan has none"]
    if plan.global_batch % plan.microbatches:
        found.append(f"microbatches={plan.microbatches} does not divide global_batch={plan.global_batch}")
    if len(plan.stages) % plan.chunks:
        return [*found, f"chunks={plan.chunks} does not divide {len(plan.stages)} stages"]
    found += _schedule_violations(plan)
    used = sum(stage.devices for stage in plan.stages[: plan.slices])
    if used != plan.cluster.devices:
        found.append(f"stages use {used} devices, the cluster {plan.cluster.mesh} has {plan.cluster.devices}")
    found += _slice_violations(plan)
    for s, stage in enumerate(plan.stages):
        if not stage.runs:
            found.append(f"stages[{s}] has no layers")
        try:
            degrees = plan.cluster.tensor_degrees(stage.devices)
        except ClusterError as error:
            found.append(f"stages[{s}]: {error}")
            continue
        for r, run in enumerate(stage.runs):
            problems = _degree_violations(run.strategy, stage.devices, degrees)
            found += [f"stages[{s}].runs[{r}]: {problem}" for problem in problems]
    return found


def _degree_violations(strategy: Strategy, devices: int, degrees: tuple[int, ...]) -> list[str]:
    """Degrees that are no products of adjacent mesh axes, or do not multiply to the stage's ``devices``."""
    found = []
    name = "ulysses" if strategy.ulysses > 1 else "tp"
    if strategy.inner not in degrees:
        found.append(f"{name}={strategy.inner} is none of {degrees}")
    if strategy.inner * strategy.dp != devices:
        found.append(f"{name}={strategy.inner} * dp={strategy.dp} is not {devices} devices")
    if devices % strategy.replicas or devices // strategy.replicas not in degrees:
        found.append(f"replicas={strategy.replicas} is no product of leading mesh axes of {devices} devices")
    return found


def _schedule_violations(plan: Plan) -> list[str]:
    if plan.schedule != "interleaved-1f1b":
        return [f"chunks={plan.chunks} needs schedule interleaved-1f1b"] if plan.chunks > 1 else []
    if plan.chunks == 1:
        return ["schedule interleaved-1f1b needs chunks > 1"]
    if plan.microbatches % plan.slices:
        return [f"interleaved-1f1b: {plan.slices} device slices do not divide microbatches={plan.microbatches}"]
    return []


def _slice_violations(plan: Plan) -> list[str]:
    """Stages are equal slices of the device list, and each is whole nodes or an even part of one."""
    counts = [stage.devices for stage in plan.stages]
    if len(set(counts)) > 1:
        return [f"stages have {', '.join(map(str, counts))} devices, not equally many"]
    try:
        plan.cluster.slice_shape(counts[0])
    except ClusterError as error:
        return [error.message]
    return []


def _model_violations(plan: Plan, model: ModelProfile) -> list[str]:
    found = []
    if plan.model.structure != model.structure:
        found.append(
            f"made for model {plan.model.name!r} (structure {plan.model.structure}),"
            f" got {model.name!r} (structure {model.structure})"
        )
    order = [run.kind for run in model.layers for _ in range(run.count)]
    planned = [kind for kind, _ in plan.layers()]
    if planned != order:
        found.append(f"the plan has {_runs_text(planned)}, the model {_runs_text(order)}")
    kinds = {kind.name: kind for kind in model.kinds}
    for s, stage in enumerate(plan.stages):
        for r, run in enumerate(stage.runs):
            if run.kind in kinds:
                problems = strategy_violations(kinds[run.kind], run.strategy, plan.microbatch_size)
                found += [f"stages[{s}].runs[{r}]: {problem}" for problem in problems]
    return found


def _runs_text(kinds: list[str]) -> str:
    """``["embed", "block", "block"]`` as ``"1 embed, 2 block"``; of many runs the first ones."""
    runs: list[list[object]] = []
    for kind in kinds:
        if runs and runs[-1][1] == kind:
            runs[-1][0] = int(str(runs[-1][0])) + 1
        else:
            runs.append([1, kind])
    more = f", ... ({len(kinds)} layers in {len(runs)} runs)" if len(runs) > RUNS_SHOWN else ""
    return ", ".join(f"{count} {kind}" for count, kind in runs[:RUNS_SHOWN]) + more or "no layers"
