"""Measure the layers of a model on the devices in sight and write its profile with what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from .._document import load, save
from .._user_model import UserModel
from ..analysis import Analysis, analyse_model, attention_kernel
from ..cluster import Cluster
from ..errors import DocumentNotFoundError, UnsupportedError
from ..measured import MeasuredMemory
from ..profile import ModelProfile
from ._layer_agenda import layer_agenda
from ._layer_loops import pass_loop
from ._layer_parts import assemble_layers
from ._layer_passes import PASSES
from ._log import partial_path, resume_readings, save_readings
from ._loop import Loop
from ._machine import describe_machine, largest_of_all, mesh_devices, provenance_of
from ._measure import base_profile
from ._programs import subject_loop
from ._readings import Reading, Subject
from ._runner import Outcome, Progress, Runner
from ._text import summarize
from ._timing import Clock, Effort, MeasurementError, SystemClock

TRACED_SAMPLES = 4
"""As stored profiles are traced: the same analysis, whatever is measured."""

_EFFORT = Effort(target_s=0.05, repeats=3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelOrder:
    """What to measure and where to write it."""

    model: UserModel
    name: str
    cluster: Cluster
    """Devices that run copies of the layers at the same time; one node each process."""
    out: Path
    samples: tuple[int, ...] = (1, 2, 4)
    """On each device."""
    degrees: tuple[int, ...] = (1, 2, 4, 8)
    """Tensor-parallel degrees, as shares on one device."""
    budget_s: float = 180.0
    resume: bool = False
    base: str = ""
    """Hardware profile that stands for the devices; ``""``: by their kind."""


class ModelResult(NamedTuple):
    """A profile that has been written."""

    profile: ModelProfile
    notes: tuple[str, ...]
    complete: bool


def _ignore(_: Progress) -> None:
    pass


def measure_model(
    order: ModelOrder, *, clock: Clock | None = None, show: Callable[[Progress], None] = _ignore
) -> ModelResult:
    """Measure every layer kind of a model, write its profile to ``order.out`` and return it.

    With several processes each calls this; all measure, the first writes.

    Args:
        order: What to measure and where to write it.
        clock: Of this process.
        show: Called before each measurement.

    Raises:
        AnalysisError: the model or its loss cannot be traced.
        DeviceMismatchError: fewer devices than the mesh has.
        DocumentError: the partial file belongs to something else, or ``order.out`` cannot be read or written.
        UnsupportedError: ``resume`` with several processes.
    """
    clock = clock or SystemClock()
    start_s = clock.now_s()
    devices = mesh_devices(order.cluster)
    machine = describe_machine(order.cluster, devices)
    if order.resume and machine.processes > 1:
        raise UnsupportedError("got --resume with several processes", action="measure from the start")
    provenance = provenance_of(machine, base_profile(order.base, machine).device, clock.today())
    subject = order.model.resized(TRACED_SAMPLES)
    analysis = analyse_model(subject.model, subject.loss, subject.batch, name=order.name)
    partial, first, identity = partial_path(order.out), jax.process_index() == 0, model_identity(analysis.profile)
    known = resume_readings(partial, machine, quick=False, model=identity) if order.resume else ()
    compiled = _compiled_memory(analysis.profile, order.out)  # now: a file that cannot be read costs no readings

    def record(readings: Sequence[Reading]) -> None:
        if first:
            save_readings(partial, machine, readings, quick=False, model=identity)

    record(known)
    agree = largest_of_all()
    traced_s = agree(clock.now_s() - start_s)  # all processes must leave out the same subjects
    runner = Runner(
        build=lambda asked, readings: _loop(asked, readings, analysis, devices),
        clock=clock,
        effort=_EFFORT,
        budget_s=order.budget_s - traced_s,
        agree=agree,
        record=record,
        show=show,
    )
    outcome = runner.measure(layer_agenda(analysis.profile, order.samples, order.degrees), known)
    assembly = assemble_layers(
        analysis.profile.with_memory(compiled),
        outcome.readings,
        provenance,
        fused_attention=_kernel(analysis, devices) is not None,
    )
    if first:
        save(assembly.profile, order.out)
        if not outcome.skipped:
            partial.unlink(missing_ok=True)
    return ModelResult(assembly.profile, (*_notes(outcome), *assembly.notes), not outcome.skipped)


def _notes(outcome: Outcome) -> list[str]:
    notes = summarize("failed", [f"{failed.text}: {reason}" for failed, reason in outcome.failed.items()])
    return notes + summarize("left out", [f"{subject.text} ({reason})" for subject, reason in outcome.skipped.items()])


def _loop(
    subject: Subject, readings: Mapping[Subject, Reading], analysis: Analysis, devices: Sequence[jax.Device]
) -> Loop:
    for what in PASSES:
        if subject.what == what:
            try:
                kind, kernel = analysis.kinds[subject.layer], _kernel(analysis, devices)
                return pass_loop(kind, what, subject.size, subject.group, devices, kernel)
            except UnsupportedError as error:
                raise MeasurementError(error.problem, action="skipped") from error
    return subject_loop(subject, readings, devices)


def _kernel(analysis: Analysis, devices: Sequence[jax.Device]) -> str | None:
    """What runs attention, as ``auto_shard`` would run it on these devices."""
    return attention_kernel(devices[0].platform) if analysis.asks_for_kernels else None


def _compiled_memory(fresh: ModelProfile, out: Path) -> dict[str, MeasuredMemory]:
    """Return the compiled memory that a profile of the same model at ``out`` holds, by layer kind."""
    try:
        held = load(out, ModelProfile)
    except DocumentNotFoundError:
        return {}
    same = model_identity(held) == model_identity(fresh)
    return {kind.name: kind.memory for kind in held.kinds if kind.memory} if same else {}


def model_identity(model: ModelProfile) -> str:
    """Return what readings belong to: name, structure, sequence length and dtype."""
    return f"{model.name} {model.structure} seq {model.seq} {model.dtype}"
