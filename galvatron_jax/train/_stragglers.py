"""Stragglers: which process holds up the others.

In lock step all processes take equally long, so what is compared is the time that each spends on its own before a step
is sent to the devices (waiting for data, host work), as a share of the step; and, where NVML can be read (``pynvml``),
the clocks of its GPUs. A device that is slow while NVML cannot be read shows as a slow step only.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from typing import Any

import msgspec

from ._ranks import Ranks

_log = logging.getLogger(__name__)

WINDOW_STEPS = 20
WINDOWS = 3
"""In a row, before anybody is named."""
SLOW_CLOCK = 0.85
"""Of the median clock of all processes' slowest GPUs."""


class RankStatistics(msgspec.Struct, frozen=True):
    """What one process tells of a window."""

    host: str
    own_s: float
    """Median time of a step before it is sent off."""
    step_s: float
    """Median time of a step."""
    clock_mhz: int
    """Of its slowest GPU; 0 when not known."""
    condition: str
    """Clock, temperature, memory errors and throttle reasons, as far as NVML tells."""


class StragglerWatch:
    """Compares the processes every ``WINDOW_STEPS`` steps."""

    def __init__(self, ranks: Ranks, host: str, share: float) -> None:
        """Begin.

        Args:
            ranks: The processes.
            host: Name of this machine.
            share: Of a step that a process may hold up the others.
        """
        self._ranks, self._host, self._share = ranks, host, share
        self._own_s: list[float] = []
        self._step_s: list[float] = []
        self._counts: dict[int, int] = {}

    def record(self, own_s: float, step_s: float) -> None:
        """Take one step of this process; every ``WINDOW_STEPS`` compare with the others."""
        if self._ranks.count == 1:
            return
        self._own_s.append(own_s)
        self._step_s.append(step_s)
        if len(self._own_s) < WINDOW_STEPS:
            return
        clock, condition = gpu_condition()
        own = RankStatistics(
            self._host, statistics.median(self._own_s), statistics.median(self._step_s), clock, condition
        )
        self._own_s, self._step_s = [], []
        said = self._ranks.exchange("statistics", msgspec.json.encode(own).decode())
        self.compare([msgspec.json.decode(text, type=RankStatistics) for text in said if text is not None])

    def compare(self, everyone: list[RankStatistics]) -> list[int]:
        """Return (and name in the log) the ranks that were slow in ``WINDOWS`` windows in a row."""
        usual_s = statistics.median(rank.own_s for rank in everyone)
        usual_clock = statistics.median(rank.clock_mhz for rank in everyone)
        named = []
        for index, rank in enumerate(everyone):
            late = rank.own_s - usual_s > self._share * rank.step_s
            slow = 0 < rank.clock_mhz < SLOW_CLOCK * usual_clock
            self._counts[index] = self._counts.get(index, 0) + 1 if late or slow else 0
            if self._counts[index] >= WINDOWS:
                named.append(index)
                self._counts[index] = 0
                _log.warning(
                    "rank %d on %s is slow: %.1f ms of its own per step, the median rank %.1f ms, step %.1f ms; GPU %s",
                    index,
                    rank.host,
                    1e3 * rank.own_s,
                    1e3 * usual_s,
                    1e3 * rank.step_s,
                    rank.condition or "condition not known",
                )
        return named


THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons that slow a busy GPU down; idling and set clocks are none."""

NVML_NAMES = (
    "nvmlInit",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetTotalEccErrors",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "NVML_CLOCK_SM",
    "NVML_TEMPERATURE_GPU",
    "NVML_MEMORY_ERROR_TYPE_UNCORRECTED",
    "NVML_VOLATILE_ECC",
)
"""All that is asked of ``pynvml``."""


def gpu_condition() -> tuple[int, str]:
    """Return (clock of the slowest GPU of this machine in MHz, its condition); (0, "") where NVML cannot be read."""
    try:
        import pynvml

        return slowest_gpu(pynvml)
    except Exception:  # no driver, no library, no right: all mean "not known"
        return 0, ""


def slowest_gpu(nvml: Any) -> tuple[int, str]:
    """Return (clock in MHz, condition) of the GPU with the lowest clock, as the library ``nvml`` tells it."""
    nvml.nvmlInit()
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    clocks = [int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)) for handle in handles]
    slowest = min(range(len(handles)), key=clocks.__getitem__)
    heat = nvml.nvmlDeviceGetTemperature(handles[slowest], nvml.NVML_TEMPERATURE_GPU)
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handles[slowest])
    reasons = ", ".join(text for bit, text in THROTTLE_REASONS.items() if bits & bit) or "nothing"
    condition = f"{slowest}: {clocks[slowest]} MHz, {heat} °C, slowed by {reasons}"
    with contextlib.suppress(Exception):  # not every GPU counts them
        kind, counter = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        errors = nvml.nvmlDeviceGetTotalEccErrors(handles[slowest], kind, counter)
        condition += f", {errors} memory errors (ECC)"
    return clocks[slowest], condition
