"""The runtime profiler: a room for a training loop to say "a step was started", and a record of what the steps took.

    meter = RunMeter(window=10)
    for batch in data:
        result = trainer.step(batch)
        meter.step(result.loss)
    save(meter.record(plan, provenance, model=profile, hardware=hardware), "run.json")

JAX returns before the devices are done, so a clock around one call measures the dispatch. The meter waits for the
devices once in each ``window`` steps and divides by them: in between, dispatch runs ahead as it does without a meter,
so measuring does not slow the run down. The first ``warm_up`` steps (compilation, allocation) do not count. The record
keeps every window; its step time is their median (``RunRecord``).

MFU is model FLOPs over what the devices could have done (``record.MFU_FORMULA``), as the prediction counts it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import jax

from ..cost import sample_flops
from ..errors import GalvatronError
from ..measured import Provenance
from ..plan import Plan
from ..profile import HardwareProfile, ModelProfile
from ..record import DeviceMemory, RunRecord
from ._timing import Clock, SystemClock


class RunMeter:
    """Times the steps of a run, waiting for the devices only once in each window."""

    def __init__(self, *, warm_up: int = 2, window: int = 1, clock: Clock | None = None) -> None:
        """Start a meter.

        Args:
            warm_up: Steps that do not count, at least 1: the first compiles.
            window: Steps between two moments at which the devices are waited for.
            clock: The source of time.

        Raises:
            GalvatronError: ``warm_up`` or ``window`` is below 1.
        """
        if warm_up < 1 or window < 1:
            raise GalvatronError(
                f"got warm_up={warm_up}, window={window}", expected="both at least 1", where="RunMeter"
            )
        self._clock, self._warm_up, self._window = clock or SystemClock(), warm_up, window
        self._done, self._since, self._start_s = 0, 0, 0.0
        self._times_s: list[float] = []

    def step(self, result: Any) -> None:
        """Note that a step was started whose results (any pytree of arrays, the loss is enough) are ``result``."""
        self._done += 1
        if self._done < self._warm_up:
            return
        if self._done == self._warm_up:
            jax.block_until_ready(result)
            self._start_s = self._clock.now_s()
            return
        self._since += 1
        if self._since == self._window:
            jax.block_until_ready(result)
            now_s = self._clock.now_s()
            self._times_s.append((now_s - self._start_s) / self._window)
            self._since, self._start_s = 0, now_s

    @property
    def step_times_s(self) -> tuple[float, ...]:
        """Seconds of one step, by window."""
        return tuple(self._times_s)

    def record(
        self,
        plan: Plan,
        provenance: Provenance,
        *,
        model: ModelProfile | None = None,
        hardware: HardwareProfile | None = None,
        machine_load: float | None = None,
        note: str = "",
    ) -> RunRecord:
        """Return what the steps so far took.

        Args:
            plan: What ran; with its prediction, the record holds predicted beside measured.
            provenance: Where it ran.
            model: Its profile: with ``hardware``, for the MFU.
            hardware: For the peak FLOP/s.
            machine_load: Share of the machine that others took, when known.
            note: Anything a reader should know.

        Raises:
            GalvatronError: no step after the warm-up has been waited for.
        """
        if not self._times_s:
            raise GalvatronError(
                f"{self._done} steps are too few to measure",
                expected=f"at least {self._warm_up + self._window}: {self._warm_up} to warm up and one window",
                where="RunMeter",
            )
        step_s = statistics.median(self._times_s)
        peak = hardware.matmul_flops_per_s.get(plan.model.dtype) if hardware else None
        flops = plan.global_batch * sample_flops(model) if model else 0.0
        return RunRecord(
            plan=plan,
            provenance=provenance,
            processes=jax.process_count(),
            step_times_s=tuple(self._times_s),
            mfu=flops / (step_s * plan.cluster.devices * peak) if peak else 0.0,
            memory=device_memory(jax.local_devices()),
            machine_load=machine_load,
            note=note,
        )


def device_memory(devices: Sequence[jax.Device]) -> tuple[DeviceMemory, ...]:
    """Return the peak bytes of each device, none where the backend does not count (CPU)."""
    found = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found.append(DeviceMemory(device=device.id, peak_bytes=int(stats["peak_bytes_in_use"])))
    return tuple(found)
