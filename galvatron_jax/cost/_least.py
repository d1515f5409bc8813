"""What a layer takes at least, whatever strategy it runs under: the search's first bound.

No strategy divides work by more than its number of devices, so with n samples for each device a product has at least
``n * F`` local FLOP (F: of one sample), and it takes at least the least time of any product that is no smaller. Memory-
bound traffic runs at the full bandwidth; launches of traffic, weights and communication count nothing.
"""

from __future__ import annotations

from ..profile import HardwareProfile, LayerKind
from ._compute import CAUSAL_SHARE, matmul_peak, product_seconds
from ._kind import PHASES, is_fused, summarise
from ._measured import is_measured
from ._memo import remembered
from ._values import Shares


@remembered
def least_seconds(kind: LayerKind, hardware: HardwareProfile, causal: bool, samples: float) -> float:
    """Return what both passes of a microbatch through a layer take at least, in seconds.

    Nothing where the clock was asked (``_measured``): it may say less than any formula.

    Args:
        kind: The layer kind.
        hardware: The devices.
        causal: Attention is causal.
        samples: Of the microbatch, for each device of the stage; may be a fraction.
    """
    if is_measured(kind, hardware):
        return 0.0
    sums, whole, total = summarise(kind, is_fused(kind, hardware)), Shares(1, 1), 0.0
    for phase in PHASES:
        for dot in sums.dots[phase]:
            flops = samples * dot.flops.at(whole) if dot.flops.terms[0][1] else 0.0
            if dot.fused:
                rate = matmul_peak(hardware, dot.dtype) * hardware.attention_efficiency[phase]
                seconds = max(flops * (CAUSAL_SHARE if causal else 1) / rate, hardware.kernel_launch_s)
            else:
                seconds = _no_smaller(flops, dot.dtype, hardware)
            total += dot.copies * seconds
        total += samples * sums.traffic[phase].at(whole) / hardware.memory_bandwidth_bytes_per_s
    return total


def _no_smaller(flops: float, dtype: str, hardware: HardwareProfile) -> float:
    """Least seconds of a product of at least ``flops`` (between two points of the curve time may fall)."""
    larger = [point.flops for point in hardware.matmul_efficiency if point.flops > flops]
    return min((product_seconds(f, dtype, hardware) for f in (flops, *larger) if f), default=hardware.kernel_launch_s)
