"""What a layer takes at least, whatever strategy it runs under: the search's first bound."""

from __future__ import annotations

from ..profile import HardwareProfile, LayerKind
from ._compute import CAUSAL_SHARE, matmul_peak
from ._kind import PHASES, is_fused, summarise
from ._measured import is_measured
from ._memo import remembered
from ._values import Shares


@remembered
def least_seconds(kind: LayerKind, hardware: HardwareProfile, causal: bool) -> float:
    """Return what one sample's passes through a layer take at least, in seconds of one device, however it is spread.

    Products at the curve's best efficiency and traffic at the full bandwidth, without launches, weights and
    communication: no strategy divides work by more than its number of devices. Nothing where the clock was asked: it
    may say less than any formula.
    """
    if is_measured(kind, hardware):
        return 0.0
    sums, whole, total = summarise(kind, is_fused(kind, hardware)), Shares(1, 1), 0.0
    best = max(point.efficiency for point in hardware.matmul_efficiency)
    for phase in PHASES:
        for dot in sums.dots[phase]:
            if not dot.flops.terms[0][1]:
                continue  # without a batch it does not grow with the samples
            share = hardware.attention_efficiency[phase] / (CAUSAL_SHARE if causal else 1) if dot.fused else best
            total += dot.copies * dot.flops.at(whole) / (matmul_peak(hardware, dot.dtype) * share)
        total += sums.traffic[phase].at(whole) / hardware.memory_bandwidth_bytes_per_s
    return total
