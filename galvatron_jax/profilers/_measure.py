"""Measure the devices in sight and write their hardware profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from .._document import save
from ..cluster import Cluster
from ..errors import DocumentNotFoundError, UnsupportedError
from ..hardware import hardware_names, load_hardware
from ..profile import HardwareProfile
from ._agenda import hardware_agenda
from ._hardware import assemble_profile
from ._log import partial_path, resume_readings, save_readings
from ._machine import describe_machine, largest_of_all, mesh_devices
from ._programs import subject_loop
from ._readings import Machine, Reading
from ._runner import Progress, Runner
from ._text import summarize
from ._timing import Clock, Effort, SystemClock

_EFFORT = Effort(target_s=0.02, repeats=5)
_QUICK_EFFORT = Effort(target_s=0.005, repeats=3)
"""k trips of 20 ms: 1 us of jitter (a wake-up of the host) is far below a percent of it, five pairs take 0.3 s."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HardwareOrder:
    """What to measure and where to write it."""

    cluster: Cluster
    out: Path
    budget_s: float = 300.0
    quick: bool = False
    resume: bool = False
    base: str = ""
    """Bundled profile (or path) for what is not measured; ``""``: by the kind of device."""


class HardwareResult(NamedTuple):
    """A profile that has been written."""

    profile: HardwareProfile
    base: HardwareProfile
    notes: tuple[str, ...]
    """Outliers, failures, what was left out."""
    complete: bool
    """False when the budget was too short: the partial file is kept, and ``resume`` goes on from it."""


def _ignore(_: Progress) -> None:
    pass


def measure_hardware(
    order: HardwareOrder, *, clock: Clock | None = None, show: Callable[[Progress], None] = _ignore
) -> HardwareResult:
    """Measure the devices of a mesh, write the profile to ``order.out`` and return it.

    With several processes each calls this; all measure, the first writes. A device error in one of them only is not
    caught: the others wait for it.

    Args:
        order: What to measure and where to write it.
        clock: Of this process.
        show: Called before each measurement.

    Raises:
        DeviceMismatchError: fewer devices than the mesh has.
        DocumentNotFoundError: no bundled profile for this kind of device, and none named.
        DocumentError: the partial file belongs to something else, or the output cannot be written.
        UnsupportedError: ``resume`` with several processes.
    """
    clock = clock or SystemClock()
    devices = mesh_devices(order.cluster)
    machine = describe_machine(order.cluster, devices)
    base = base_profile(order.base, machine)
    if order.resume and machine.processes > 1:
        raise UnsupportedError("got --resume with several processes", action="measure from the start")
    partial = partial_path(order.out)
    known = resume_readings(partial, machine, quick=order.quick) if order.resume else ()
    first = jax.process_index() == 0

    def record(readings: Sequence[Reading]) -> None:
        if first:
            save_readings(partial, machine, readings, quick=order.quick)

    record(known)  # an output that cannot be written is better known before than after five minutes
    runner = Runner(
        build=lambda subject, readings: subject_loop(subject, readings, devices),
        clock=clock,
        effort=_QUICK_EFFORT if order.quick else _EFFORT,
        budget_s=order.budget_s,
        agree=largest_of_all(),
        record=record,
        show=show,
    )
    outcome = runner.measure(hardware_agenda(order.cluster, machine.platform, quick=order.quick), known)
    assembly = assemble_profile(outcome.readings, base, order.cluster, machine, date=clock.today())
    if first:
        save(assembly.profile, order.out)
        if not outcome.skipped:
            partial.unlink(missing_ok=True)
    notes = summarize("failed", [f"{subject.text}: {reason}" for subject, reason in outcome.failed.items()])
    notes += summarize("left out", [f"{subject.text} ({reason})" for subject, reason in outcome.skipped.items()])
    return HardwareResult(assembly.profile, base, (*notes, *assembly.notes), not outcome.skipped)


def base_profile(name: str, machine: Machine) -> HardwareProfile:
    """Return the bundled profile of the kind of device, or the one called ``name``.

    Raises:
        DocumentNotFoundError: there is none of this kind, and none is named.
    """
    if name or machine.platform == "cpu":
        return load_hardware(name or "cpu")
    try:
        return load_hardware(machine.device_kind)
    except DocumentNotFoundError:
        raise DocumentNotFoundError(
            f"no bundled profile for {machine.device_kind!r}",
            expected="one of " + ", ".join(hardware_names()),
            where="--base",
            action="name the one nearest to it: it gives what is not measured (memory, attention, float8)",
        ) from None
