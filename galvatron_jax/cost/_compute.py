"""Seconds of computing: matrix products, fused attention, memory-bound kernels.

One product of F local FLOP takes

    t = max(F / (peak(dtype) * efficiency(F)), launch)

with the efficiency interpolated linearly in (log F, log efficiency), flat outside the curve; so t is a power law
between two points and never falls while F rises, as long as the curve's own points take rising times. The launch is a
floor and not a summand because the host queues kernels ahead of the device (CUDA C++ Programming Guide, asynchronous
execution).

Fused attention (FlashAttention-2, Dao 2023; cuDNN) takes F / (peak * attention_efficiency(phase)), half of F when it is
causal. Its backward kernel computes the scores once more, a fifth product beside the 4 of the profile; the efficiency
of the hardware profile is stated for 4, so that product is in it.

Memory-bound kernels take bytes / memory bandwidth; between two products the compiler fuses them into about one kernel,
hence their floor of one launch per product. Arrays without a batch are weights, cast to the compute dtype (forward) or
gradients, cast back (backward): under zero they are cast as shards. Backward is counted from the profile's own backward
products, never as a multiple of forward. What rematerialisation runs again:

    full    forward: its traffic and its products, except those that nothing in backward needs
    dots    of these the products of two activations (attention) and the traffic inside attention; the results of
            products with weights are kept, and what loop fusion makes of them is in the backward traffic already
            (docs/design/0002-residuals.md)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import DocumentError
from ..profile import HardwareProfile, Phase
from ..strategy import Remat
from ._kind import DotSum, KindSums, LocalSum
from ._memo import remembered
from ._portable import portable
from ._values import Shares

CAUSAL_SHARE = 0.5
"""Share of the attention products below the diagonal, for long sequences."""


class Curve(NamedTuple):
    """The matmul efficiency curve in logarithms."""

    log_flops: tuple[float, ...]
    log_efficiency: tuple[float, ...]

    def at(self, flops: float) -> float:
        """Return the efficiency of a product of ``flops`` FLOP."""
        x, y = self.log_flops, self.log_efficiency
        log = math.log(flops)
        if log <= x[0]:
            return portable(math.exp(y[0]))
        if log >= x[-1]:
            return portable(math.exp(y[-1]))
        i = bisect_right(x, log)
        return portable(math.exp(y[i - 1] + (y[i] - y[i - 1]) * (log - x[i - 1]) / (x[i] - x[i - 1])))


@remembered
def efficiency_curve(hardware: HardwareProfile) -> Curve:
    """Return the matmul efficiency curve of ``hardware``."""
    points = hardware.matmul_efficiency
    return Curve(
        tuple(math.log(point.flops) for point in points), tuple(math.log(point.efficiency) for point in points)
    )


def compute_seconds(sums: KindSums, phase: Phase, shares: Shares, hardware: HardwareProfile, *, causal: bool) -> float:
    """Return the seconds that one device computes in one phase of one layer, for one microbatch, weight casts left out.

    Args:
        sums: The layer kind.
        phase: Forward or backward.
        shares: What the strategy leaves on one device.
        hardware: The device.
        causal: Attention is causal.

    Raises:
        DocumentError: the hardware profile has no matmul rate for an operand dtype.
    """
    return _seconds(sums.dots[phase], sums.traffic[phase], phase, shares, hardware, causal)


def recompute_seconds(
    sums: KindSums, remat: Remat, shares: Shares, hardware: HardwareProfile, *, causal: bool
) -> float:
    """Return the seconds that one device computes forward again in the backward pass of one layer.

    Args:
        sums: The layer kind.
        remat: What the layer keeps.
        shares: What the strategy leaves on one device.
        hardware: The device.
        causal: Attention is causal.
    """
    if remat == "none":
        return 0.0
    dots = [dot for dot in sums.dots["forward"] if dot.recomputed and (dot.batched or remat == "full")]
    traffic = sums.traffic["forward"] if remat == "full" else sums.attention_traffic
    return _seconds(dots, traffic, "forward", shares, hardware, causal)


def _seconds(
    dots: Sequence[DotSum], traffic: LocalSum, phase: Phase, shares: Shares, hardware: HardwareProfile, causal: bool
) -> float:
    products_s = sum(dot.copies * _dot_seconds(dot, phase, shares, hardware, causal) for dot in dots)
    return products_s + traffic_seconds(traffic.at(shares), sum(dot.copies for dot in dots) or 1, hardware)


def traffic_seconds(size_bytes: float, kernels: int, hardware: HardwareProfile) -> float:
    """Return the seconds of ``kernels`` memory-bound kernels that read and write ``size_bytes`` together."""
    if not size_bytes:
        return 0.0
    return max(size_bytes / hardware.memory_bandwidth_bytes_per_s, kernels * hardware.kernel_launch_s)


def matmul_peak(hardware: HardwareProfile, dtype: str) -> float:
    """Return the peak FLOP/s of matrix products with operands of ``dtype``.

    Raises:
        DocumentError: the profile has none.
    """
    if dtype not in hardware.matmul_flops_per_s:
        raise DocumentError(
            f"no matmul rate for {dtype}",
            expected="one of " + ", ".join(sorted(hardware.matmul_flops_per_s)),
            where=f"hardware profile {hardware.name!r}, matmul_flops_per_s",
            action="add it to the profile, or choose another --dtype",
        )
    return hardware.matmul_flops_per_s[dtype]


def product_seconds(flops: float, dtype: str, hardware: HardwareProfile) -> float:
    """Return the seconds of one matrix product of ``flops`` FLOP with operands of ``dtype``.

    Raises:
        DocumentError: the hardware profile has no rate for ``dtype``.
    """
    if not flops:
        return 0.0
    work_s = flops / (matmul_peak(hardware, dtype) * efficiency_curve(hardware).at(flops))
    return max(work_s, hardware.kernel_launch_s)


def _dot_seconds(dot: DotSum, phase: Phase, shares: Shares, hardware: HardwareProfile, causal: bool) -> float:
    flops = dot.flops.at(shares)
    if not dot.fused:
        return product_seconds(flops, dot.dtype, hardware)
    rate = matmul_peak(hardware, dot.dtype) * hardware.attention_efficiency[phase]
    return max(flops * (CAUSAL_SHARE if causal else 1) / rate, hardware.kernel_launch_s)
