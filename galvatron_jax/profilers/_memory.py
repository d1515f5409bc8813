"""Compile probes of a model for GPUs that need not be there, and write its profile with what the compiler said."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from .._document import load, save
from .._user_model import UserModel
from ..analysis import analyse_model, has_cudnn
from ..cluster import Cluster
from ..errors import DocumentError, DocumentNotFoundError
from ..hardware import load_hardware
from ..measured import Provenance
from ..plan import Plan
from ..profile import ModelProfile
from ._log import partial_path
from ._memory_agenda import MemoryAgenda, Wanted, planned_strategies, usual_strategies
from ._memory_parts import assemble_memory
from ._memory_probe import MemoryLog, MemoryReading, ProbeSession
from ._memory_process import ProbeProcess
from ._memory_readings import ProbeProgress, read_probes
from ._model import TRACED_SAMPLES, model_identity
from ._text import summarize
from ._timing import Clock, SystemClock

TIME_LIMIT_S = 300.0
"""For one program; seconds on an idle machine."""

_WITHOUT_KERNEL = (
    "attention was compiled with its scores in memory: this counts for plans with --attention xla only"
    " (a fused kernel needs a model that asks for it, and pip install --no-deps nvidia-cudnn-cu12)"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOrder:
    """What to compile and where to write it."""

    model: UserModel
    name: str
    """Of the model, in documents."""
    session: ProbeSession
    out: Path
    """A profile of the same model that is there already keeps what else was measured."""
    plans: tuple[Plan, ...] = ()
    """Compile what these use before what searches usually choose from."""
    budget_s: float = 180.0
    resume: bool = False


class MemoryResult(NamedTuple):
    """A profile that has been written."""

    profile: ModelProfile
    notes: tuple[str, ...]
    complete: bool


def _ignore(_: ProbeProgress) -> None:
    pass


def measure_memory(
    order: MemoryOrder, *, clock: Clock | None = None, show: Callable[[ProbeProgress], None] = _ignore
) -> MemoryResult:
    """Compile the probes of a model, write its profile to ``order.out`` and return it.

    Args:
        order: What to compile and where to write it.
        clock: Of this process.
        show: Called before each probe.

    Raises:
        AnalysisError: the model or its loss cannot be traced.
        DocumentError: the partial file belongs to something else, or a file cannot be read or written.
        ToolchainError: there is no compiler for this GPU here.
    """
    clock = clock or SystemClock()
    start_s = clock.now_s()
    subject, cluster = order.model.resized(TRACED_SAMPLES), order.session.cluster
    analysis = analyse_model(subject.model, subject.loss, subject.batch, name=order.name)
    model, hardware = _present_profile(order.out, analysis.profile), load_hardware(cluster.gpu)
    fused = hardware.fused_attention and analysis.asks_for_kernels and has_cudnn()  # as the programs are compiled
    hardware = msgspec.structs.replace(hardware, fused_attention=fused)
    agenda = MemoryAgenda(model=model.with_memory({}), session=order.session, hardware=hardware)
    partial = partial_path(order.out.with_stem(f"{order.out.stem}.memory"))
    identity = model_identity(model) + " with fused attention" * fused
    known = _resumed(partial, identity, cluster) if order.resume else ()

    def record(readings: Sequence[MemoryReading]) -> None:
        version = importlib.metadata.version("jax")
        save(MemoryLog(model=identity, cluster=cluster, jax_version=version, readings=tuple(readings)), partial)

    with ProbeProcess(order.session, time_limit_s=TIME_LIMIT_S) as process:
        found = read_probes(
            agenda.probes(_wanted(order, model)),
            process,
            clock,
            order.budget_s - (clock.now_s() - start_s),
            known=known,
            record=record,
            show=show,
        )
    provenance = Provenance(
        device=hardware.device,
        device_kind=f"{cluster.gpu} (compiled for)",
        jax_version=importlib.metadata.version("jax"),
        date=clock.today(),
    )
    assembly = assemble_memory(model, found.readings, order.session, hardware, provenance)
    save(assembly.profile, order.out)
    if not found.left_out:
        partial.unlink(missing_ok=True)
    notes = summarize("left out", [probe.text for probe in found.left_out])
    if analysis.calls_attention and not fused:
        notes += [_WITHOUT_KERNEL]
    return MemoryResult(assembly.profile, (*notes, *assembly.notes), not found.left_out)


def _wanted(order: MemoryOrder, model: ModelProfile) -> list[Wanted]:
    cluster = order.session.cluster
    planned = planned_strategies(model, order.plans, cluster.devices)
    return planned + usual_strategies(model, cluster.devices, cluster.gpus_per_node)


def _present_profile(out: Path, fresh: ModelProfile) -> ModelProfile:
    """Return the model's profile, with the passes that ``out`` holds of the same model."""
    try:
        held = load(out, ModelProfile)
    except DocumentNotFoundError:
        return fresh
    if model_identity(held) != model_identity(fresh):
        return fresh
    return fresh.with_measured({kind.name: kind.measured for kind in held.kinds if kind.measured})


def _resumed(path: Path, identity: str, cluster: Cluster) -> tuple[MemoryReading, ...]:
    """Return the readings of an interrupted run, none when there was none.

    Raises:
        DocumentError: the file cannot be read, or belongs to another model, cluster or version.
    """
    try:
        log = load(path, MemoryLog)
    except DocumentNotFoundError:
        return ()
    found = (log.model, log.cluster, log.jax_version)
    wanted = (identity, cluster, importlib.metadata.version("jax"))
    if found != wanted:
        raise DocumentError(
            f"was compiled for something else: {found[0]}, {found[1].mesh} {found[1].gpu}, jax {found[2]}",
            expected=f"{wanted[0]}, {wanted[1].mesh} {wanted[1].gpu}, jax {wanted[2]}",
            where=str(path),
            action="run again without --resume to start over",
        )
    return log.readings
