"""What a layer's weights cost besides its products: casts, accumulation, gathers, reductions, the update.

* zero 0 and 1 reduce gradients once per step (microbatches are summed locally before), zero 2 and 3 reduce-scatter in
  every microbatch; zero 3 gathers weights in forward and again in backward of every microbatch; zero 1 and 2 gather the
  updated parameters once per step.
* Gathers move the compute dtype (the cast comes first). Reductions move it too, since the partitioner reduces the
  product itself (XLA:GPU, bf16: 5.77 MB for 2.4 M parameters, that is 2.4 bytes each), except the once-per-step
  reduction of several microbatches, which moves the accumulator. The once-per-step gather moves the storage dtype.
* A parameter that dp does not divide is never sharded: its gradient is all-reduced at every zero level.
* Per layer, the compiler combines reductions (and gathers) of one kind into one collective.
* Accumulating reads the gradient and the accumulator and writes the accumulator; the update reads gradient, parameter
  and optimizer state and writes the last two: both memory-bound.
"""

from __future__ import annotations

from typing import NamedTuple

from ..profile import HardwareProfile, LayerKind
from ._collectives import collective_seconds, device_group
from ._compute import traffic_seconds
from ._kind import is_fused, summarise, weigh
from ._memo import remembered
from ._values import Shares


class WeightWork(NamedTuple):
    """Seconds of one layer."""

    forward_s: float
    """Casts, each microbatch."""
    backward_s: float
    """Casts of gradients and accumulation, each microbatch."""
    gather_s: float
    """Zero-3 gather, in forward and in backward of each microbatch."""
    reduce_each_s: float
    """Gradient reduction of each microbatch."""
    reduce_once_s: float
    """Gradient reduction once per step."""
    gather_once_s: float
    """Gather of updated parameters, once per step."""
    update_s: float
    """Optimizer update, once per step."""


@remembered
def weight_work(
    kind: LayerKind, hardware: HardwareProfile, strategy: tuple[int, int, int], accumulates: bool, state: int, gpus: int
) -> WeightWork:
    """Return what the weights of a layer cost.

    Args:
        kind: The layer kind.
        hardware: The devices.
        strategy: (tp, dp, zero).
        accumulates: More than one microbatch per step.
        state: Optimizer state, bytes per parameter.
        gpus: Devices of the stage that share a node.
    """
    tp, dp, zero = strategy
    weights, sums = weigh(kind, tp, dp), summarise(kind, is_fused(kind, hardware))
    shares = Shares(1, 1, 1 / tp, 1.0)
    reduce_s = _reduction(kind, hardware, strategy, accumulates, gpus)
    group = device_group(dp, tp, gpus)
    gradient, updated = weights.held(zero >= 2), weights.held(zero >= 1)

    def memory_bound(size_bytes: float) -> float:
        return traffic_seconds(size_bytes, weights.arrays, hardware)

    accumulate_s = memory_bound(gradient.computed + 2 * gradient.stored) if accumulates else 0.0
    return WeightWork(
        forward_s=memory_bound(sums.weight_traffic["forward"].at(shares) / (dp if zero >= 3 else 1)),
        backward_s=memory_bound(sums.weight_traffic["backward"].at(shares) / (dp if zero >= 2 else 1)) + accumulate_s,
        gather_s=collective_seconds("all-gather", weights.divided.computed, group, hardware) if zero >= 3 else 0.0,
        reduce_each_s=reduce_s if zero >= 2 else 0.0,
        reduce_once_s=reduce_s if zero <= 1 else 0.0,
        gather_once_s=collective_seconds("all-gather", weights.divided.stored, group, hardware)
        if zero in (1, 2)
        else 0.0,
        update_s=memory_bound(3 * updated.stored + 2 * state * updated.elements),
    )


def _reduction(
    kind: LayerKind, hardware: HardwareProfile, strategy: tuple[int, int, int], accumulates: bool, gpus: int
) -> float:
    """Seconds of reducing one gradient of all weights."""
    tp, dp, zero = strategy
    weights, group = weigh(kind, tp, dp), device_group(dp, tp, gpus)
    stored = accumulates and zero <= 1
    divided = weights.divided.stored if stored else weights.divided.computed
    whole = weights.whole.stored if stored else weights.whole.computed
    if not zero:
        return collective_seconds("all-reduce", divided + whole, group, hardware)
    scattered_s = collective_seconds("reduce-scatter", divided, group, hardware)
    return scattered_s + collective_seconds("all-reduce", whole, group, hardware)
