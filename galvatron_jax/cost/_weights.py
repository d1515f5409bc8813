"""What a layer's weights cost besides its products: casts, accumulation, gathers, reductions, the update.

Ranks that hold the same weights: all that share a tensor shard, ``dp * ulysses`` of them (under Ulysses each rank has a
part of the sequence, so its weight gradient is a partial sum like that of a data-parallel rank). ZeRO shards over
``zero_ranks`` of them; with ``replicas`` of r (hsdp: Zhao et al. 2023, "PyTorch FSDP", section 3.2.2) the groups of
``zero_ranks`` neighbours hold a copy each: gathers and reduce-scatters stay inside a group, and the scattered gradient
is all-reduced by the r ranks with the same shard.

* zero 0 and 1 reduce gradients once per step (microbatches are summed locally before), zero 2 and 3 reduce-scatter in
  every microbatch; zero 3 gathers weights in forward and again in backward of every microbatch; zero 1 and 2 gather the
  updated parameters once per step. Across replicas the scattered gradient is all-reduced right behind the
  reduce-scatter, or once per step where microbatches are summed first.
* Gathers move the compute dtype (the cast comes first). Reductions move it too, since the partitioner reduces the
  product itself (XLA:GPU, bf16: 5.77 MB for 2.4 M parameters, that is 2.4 bytes each), except the once-per-step
  reductions of several microbatches, which move the accumulator. The once-per-step gather moves the storage dtype.
* A parameter that the ranks do not divide is never sharded: its gradient is all-reduced over all ranks at every zero
  level.
* A layer *borrows* the tied parameters that a layer before it keeps on the same stage: it does not update them. How
  they are sharded there it does not know, so its weights are priced as coming from shards at every zero level, as under
  zero 3. A tied parameter on a later stage is a copy; at the end of the step both stages send each other their
  gradients, a message between nodes.
* Per layer, the compiler combines reductions (and gathers) of one kind into one collective. XLA:CPU gathers each
  array apart, and runs the arrays of a combined all-reduce one after the other, each a message of its own
  (xla/backends/cpu/runtime/all_reduce_thunk.cc).
* Accumulating reads the gradient and the accumulator and writes the accumulator; the update reads gradient, parameter
  and optimizer state and writes the last two: both memory-bound.
"""

from __future__ import annotations

from typing import NamedTuple

from ..profile import CollectiveKind, HardwareProfile, LayerKind, Phase
from ..strategy import Strategy
from ._collectives import Group, collective_seconds, device_group, message_seconds
from ._compute import traffic_seconds
from ._kind import Weights, is_fused, summarise, weigh
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
    """Gather of updated parameters, and messages of tied gradients, once per step."""
    update_s: float
    """Optimizer update, once per step."""


class Spread(NamedTuple):
    """Over which devices the weights of a layer lie."""

    tp: int
    zero: int
    ranks: int
    """Ranks that hold the same tensor shard."""
    replicas: int

    @classmethod
    def of(cls, strategy: Strategy) -> Spread:
        """Return the part of ``strategy`` that decides where weights lie."""
        return cls(strategy.tp, strategy.zero, strategy.dp * strategy.ulysses, strategy.replicas)

    @property
    def zero_ranks(self) -> int:
        """Ranks over which ZeRO shards."""
        return self.ranks // self.replicas

    def groups(self, gpus: int) -> tuple[Group, Group, Group]:
        """Return the groups of all ranks, of one shard group, and of the replicas of one shard."""
        return (
            device_group(self.ranks, self.tp, gpus),
            device_group(self.zero_ranks, self.tp, gpus),
            device_group(self.replicas, self.tp * self.zero_ranks, gpus),
        )


@remembered
def weight_work(
    kind: LayerKind,
    hardware: HardwareProfile,
    spread: Spread,
    accumulates: bool,
    state: int,
    gpus: int,
    pipelined: bool,
) -> WeightWork:
    """Return what the weights of a layer cost.

    Args:
        kind: The layer kind.
        hardware: The devices.
        spread: Where the weights lie.
        accumulates: More than one microbatch per step.
        state: Optimizer state, bytes per parameter.
        gpus: Devices of the stage that share a node.
        pipelined: Another stage keeps the layer's tied parameters, not a layer before it.
    """
    weights = weigh(kind, spread.tp, spread.zero_ranks)
    updated = weights.held(spread.zero >= 1) if pipelined else weights.own(spread.zero >= 1)
    spread = spread._replace(zero=3) if borrows(weights, pipelined) else spread
    zero, group = spread.zero, spread.groups(gpus)[1]
    sums, shares = summarise(kind, is_fused(kind, hardware)), Shares.of(kind, Strategy(tp=spread.tp), 1)
    gradient = weights.held(zero >= 2)

    def memory_bound(size_bytes: float) -> float:
        return traffic_seconds(size_bytes, weights.arrays, hardware)

    def casts(phase: Phase, is_sharded: bool) -> float:
        return memory_bound(sums.weight_traffic[phase].at(shares) / (spread.zero_ranks if is_sharded else 1))

    def gather(size_bytes: float) -> float:
        return _apart("all-gather", size_bytes, weights, group, hardware)

    reduce_each_s, reduce_once_s = _reductions(weights, hardware, spread, accumulates, gpus)
    message_s = message_seconds(weights.tied.stored, hardware.inter_node) if pipelined and weights.tied.stored else 0.0
    return WeightWork(
        forward_s=casts("forward", zero >= 3),
        backward_s=casts("backward", zero >= 2)
        + (memory_bound(gradient.computed + 2 * gradient.stored) if accumulates else 0.0),
        gather_s=gather(weights.divided.computed) if zero >= 3 else 0.0,
        reduce_each_s=reduce_each_s,
        reduce_once_s=reduce_once_s,
        gather_once_s=(gather(weights.divided.stored) if zero in (1, 2) else 0.0) + message_s,
        update_s=memory_bound(3 * updated.stored + 2 * state * updated.elements),
    )


def _apart(kind: CollectiveKind, size_bytes: float, weights: Weights, group: Group, hardware: HardwareProfile) -> float:
    """Seconds of one collective of all weights, or of one for each array where the backend moves them apart.

    Each by its own size: measured times bend, so as many of the mean size take longer (a Llama layer's nine: 3 %).
    """
    parts = (1.0,) if hardware.combines_gathers else weights.shares
    return sum(collective_seconds(kind, size_bytes * share, group, hardware) for share in parts)


def borrows(weights: Weights, pipelined: bool) -> bool:
    """Return whether a layer before it on the same stage keeps some of a layer's parameters."""
    return not pipelined and weights.tied.elements > 0


def _reductions(
    weights: Weights, hardware: HardwareProfile, spread: Spread, accumulates: bool, gpus: int
) -> tuple[float, float]:
    """Seconds of reducing the gradient of all weights: in each microbatch, and once per step."""
    everyone, group, across = spread.groups(gpus)
    deferred = accumulates and spread.zero <= 1
    divided = weights.divided.stored if deferred else weights.divided.computed
    whole = weights.whole.stored if deferred else weights.whole.computed
    if not spread.zero:
        return 0.0, _apart("all-reduce", divided + whole, weights, everyone, hardware)
    inside_s = _apart("reduce-scatter", divided, weights, group, hardware)
    inside_s += collective_seconds("all-reduce", whole, everyone, hardware)
    summed = weights.divided.stored if accumulates else weights.divided.computed
    across_s = _apart("all-reduce", summed / spread.zero_ranks, weights, across, hardware)
    if spread.zero == 1:
        return 0.0, inside_s + across_s
    return (inside_s, across_s) if accumulates else (inside_s + across_s, 0.0)
