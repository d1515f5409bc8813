"""Out of device memory: what was predicted, what happened, and a plan that leaves more free."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax
import msgspec

from .._document import save
from ..errors import DeviceMemoryError
from ..plan import Plan
from ..profile import HardwareProfile
from ..record import DeviceMemory
from ..units import format_gib
from ._plans import HARDWARE_NAME, PLAN_NAME

MARGIN = 0.08
"""Of the device's memory, left free more after each out-of-memory error: more than the estimate's worst error."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether XLA ran out of device memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def memory_error(error: BaseException, plan: Plan, when: str, action: str) -> DeviceMemoryError:
    """Return what to tell the user: predicted beside actual, and what to do.

    Args:
        error: What XLA raised.
        plan: The plan that was predicted to fit.
        when: During what.
        action: What the user can do.
    """
    said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0][:200]
    predicted = "the plan holds no prediction"
    if plan.predicted:
        stage = max(plan.predicted.stages, key=lambda stage: stage.peak_bytes)
        parts = ", ".join(f"{name} {format_gib(size)}" for name, size in stage.memory.items() if size)
        predicted = f"predicted {format_gib(stage.peak_bytes)} ({parts})"
    return DeviceMemoryError(
        f"a device ran out of memory in {when}: {said} {predicted}; {_actual()}",
        expected="a plan that fits",
        where="plan",
        action=action,
    )


def learn_margin(hardware: HardwareProfile, folder: Path) -> HardwareProfile:
    """Return ``hardware`` with more memory held back, and keep it with the run for later searches.

    The run's plan is set aside, so that the next start searches another one.
    """
    reserved = hardware.reserved_bytes + round(MARGIN * hardware.memory_bytes)
    learnt = msgspec.structs.replace(
        hardware,
        reserved_bytes=reserved,
        sources={**hardware.sources, "reserved_bytes": "raised after an out-of-memory error of this run"},
    )
    save(learnt, folder / HARDWARE_NAME)
    with contextlib.suppress(FileNotFoundError):
        (folder / PLAN_NAME).rename(folder / f"too-large-{PLAN_NAME}")
    return learnt


def device_memory() -> tuple[DeviceMemory, ...]:
    """Return the peak of each local device; nothing where the backend does not tell (CPU)."""
    stats = [(device.id, device.memory_stats()) for device in jax.local_devices()]
    return tuple(
        DeviceMemory(device=number, peak_bytes=int(s["peak_bytes_in_use"]))
        for number, s in stats
        if s and "peak_bytes_in_use" in s
    )


def peak_bytes() -> int | None:
    """Return the peak of the fullest local device; None where the backend does not tell."""
    return max((memory.peak_bytes for memory in device_memory()), default=None)


def _actual() -> str:
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    if not stats:
        return "this backend does not tell what was in use"
    fullest = max(stats, key=lambda s: int(s.get("bytes_in_use", 0)))
    used, limit = int(fullest.get("bytes_in_use", 0)), int(fullest.get("bytes_limit", 0))
    return f"in use before it {format_gib(used)} of {format_gib(limit)}"
