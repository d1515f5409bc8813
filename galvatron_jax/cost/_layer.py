"""The price of one layer under one strategy on one device.

With f, b, r the seconds of computing forward, backward and (full remat) forward again; T the tensor-parallel and D the
other data-parallel collectives of a phase, both exposed; G the zero-3 gather; R the gradient reduction; and x(c, g)
what communication g adds beside compute c (``_overlap``):

    forward_s  = f     + T_f + D_f + x(f, G)
    backward_s = b + r + T_b + D_b + x(b + r, G + R [zero >= 2])
    sync_s     = x(b + r, R) [zero <= 1]  +  all-gather of the updated parameters [zero 1, 2]
    update_s   = memory-bound optimizer update of the parameters that this device updates

* zero 0 and 1 reduce once per step (microbatches are summed locally before), hidden behind the last backward pass;
  zero 2 and 3 reduce-scatter in every microbatch. zero 3 gathers weights in forward and again in backward.
* Gathers move the compute dtype. Reductions move it too, since the partitioner reduces the product itself (XLA:GPU: 5.77
  MB for 2.4 M parameters, that is 2.4 bytes each), except the once-per-step reduction of several microbatches, which
  moves the accumulator.
* A parameter that dp does not divide is never sharded: its gradient is all-reduced at every zero level.
* Each layer hides communication behind its own compute only. A stage of equal layers is priced exactly so; an embedding
  (no compute) is priced with everything exposed: right at the end of backward, pessimistic elsewhere.
* f and b include the cast of the weights to the compute dtype and the addition to the gradient accumulator.

Never below zero, and never falling while the batch, any size or any latency rises, or any rate falls.
"""

from __future__ import annotations

from typing import NamedTuple

from ..plan import Strategy
from ..profile import Collective, LayerKind, Phase
from ._collectives import Group, collective_seconds, device_group
from ._compute import compute_seconds, traffic_seconds
from ._kind import KindSums, WeightBytes, Weights, array_bytes, best_candidate, is_fused, summarise, weigh
from ._memory import STATE, layer_memory
from ._overlap import exposed_seconds
from ._values import LayerCost, Setting, Shares


class _Case(NamedTuple):
    """One layer, one strategy, one setting, with what is derived from them."""

    kind: LayerKind
    strategy: Strategy
    setting: Setting
    sums: KindSums
    weights: Weights
    shares: Shares
    tensor_group: Group
    data_group: Group

    @property
    def accumulates(self) -> bool:
        return self.setting.microbatches > 1

    @property
    def remat(self) -> bool:
        return self.strategy.remat == "full"


def estimate_layer(kind: LayerKind, strategy: Strategy, setting: Setting) -> LayerCost:
    """Return what one layer of ``kind`` costs under a legal ``strategy`` (``plan.strategy_violations``).

    Args:
        kind: The layer kind, at the sequence length to price.
        strategy: The strategy; ``dp * tp`` equals the stage's devices.
        setting: Batch, stage and hardware.

    Raises:
        DocumentError: the hardware profile lacks the matmul rate of an operand dtype.
    """
    case = _case(kind, strategy, setting)
    compute_f, compute_b, again = _computing(case)
    tensor_f, tensor_b = _tensor_communication(case)
    gather, reduce_each, reduce_once, gather_once = _data_communication(case)
    slowdown = setting.hardware.overlap_slowdown
    data_f = _collectives(case, kind.data, "forward", case.data_group)
    data_b = _collectives(case, kind.data, "backward", case.data_group)
    data_f += exposed_seconds(compute_f, gather, slowdown)
    data_b += exposed_seconds(compute_b + again, gather + reduce_each, slowdown)
    memory = layer_memory(case.sums, case.weights, strategy, case.shares, setting.training)
    return LayerCost(
        forward_s=compute_f + tensor_f + data_f,
        backward_s=compute_b + again + tensor_b + data_b,
        sync_s=exposed_seconds(compute_b + again, reduce_once, slowdown) + gather_once,
        update_s=_update_seconds(case),
        state_bytes=sum(memory[name] for name in STATE),
        residual_bytes=memory["residuals"],
        live_bytes=memory["live"],
        times={
            "compute": compute_f + compute_b,
            "recompute": again,
            "tensor_communication": tensor_f + tensor_b,
            "data_communication": data_f + data_b,
        },
        memory=memory,
    )


def _case(kind: LayerKind, strategy: Strategy, setting: Setting) -> _Case:
    gpus = setting.gpus_per_node
    return _Case(
        kind,
        strategy,
        setting,
        summarise(kind, is_fused(kind, setting.hardware)),
        weigh(kind, strategy.tp, strategy.dp),
        Shares.of(strategy, setting.microbatch),
        device_group(strategy.tp, 1, gpus),
        device_group(strategy.dp, strategy.tp, gpus),
    )


def _computing(case: _Case) -> tuple[float, float, float]:
    """Seconds of computing forward, backward, and forward again."""
    hardware, causal = case.setting.hardware, case.setting.causal_attention
    cast = _cast_seconds(case)
    forward = compute_seconds(case.sums, "forward", case.shares, hardware, causal=causal) + cast
    backward = compute_seconds(case.sums, "backward", case.shares, hardware, causal=causal)
    if case.accumulates:
        backward += _accumulate_seconds(case)
    if not case.remat:
        return forward, backward + (cast if case.strategy.zero >= 3 else 0.0), 0.0
    again = compute_seconds(case.sums, "forward", case.shares, hardware, causal=causal, again=True)
    return forward, backward, again + cast


def _cast_seconds(case: _Case) -> float:
    """Read the stored weights, write them in the compute dtype (under zero 3 the shard, before it is gathered)."""
    held = case.weights.held(case.strategy.zero >= 3, case.strategy.dp)
    if not held.cast:
        return 0.0
    return traffic_seconds(held.stored + held.computed, case.weights.arrays, case.setting.hardware)


def _accumulate_seconds(case: _Case) -> float:
    """Read the gradient and the accumulator, write the accumulator."""
    held = case.weights.held(case.strategy.zero >= 2, case.strategy.dp)
    return traffic_seconds(held.computed + 2 * held.stored, case.weights.arrays, case.setting.hardware)


def _update_seconds(case: _Case) -> float:
    """Read gradient, parameter and optimizer state, write parameter and state."""
    held = case.weights.held(case.strategy.zero >= 1, case.strategy.dp)
    state = held.elements * case.setting.training.state_bytes_per_parameter
    return traffic_seconds(3 * held.stored + 2 * state, case.weights.arrays, case.setting.hardware)


def _tensor_communication(case: _Case) -> tuple[float, float]:
    candidate = best_candidate(case.kind)
    if candidate is None or case.strategy.tp == 1:
        return 0.0, 0.0
    collectives = candidate.tensor
    if case.strategy.sp and candidate.sequence is not None:
        collectives = candidate.sequence
    forward = _collectives(case, collectives, "forward", case.tensor_group)
    backward = _collectives(case, collectives, "backward", case.tensor_group)
    if case.remat:
        recomputed = tuple(collective for collective in collectives if collective.recomputed)
        backward += _collectives(case, recomputed, "forward", case.tensor_group)
    return forward, backward


def _collectives(case: _Case, collectives: tuple[Collective, ...], phase: Phase, group: Group) -> float:
    """Seconds of all collectives of one phase, for one microbatch."""
    if group.size == 1:
        return 0.0
    merges, total = case.setting.hardware.sums_before_reducing, 0.0
    for collective in collectives:
        if collective.phase == phase:
            count = collective.merged_count if merges else collective.array.count
            size = array_bytes(case.kind, collective.array).at(_group_shares(case, collective))
            total += count * collective_seconds(collective.kind, size, group, case.setting.hardware)
    return total


def _group_shares(case: _Case, collective: Collective) -> Shares:
    """Shares of a collective's array: whole over the tensor axes, except where its size is stated per device."""
    if collective.kind in ("all-to-all", "collective-permute"):
        return case.shares
    return Shares(case.shares.microbatch, case.shares.dp, 1.0, 1.0)


def _data_communication(case: _Case) -> tuple[float, float, float, float]:
    """Seconds of (zero-3 gather, reduction per microbatch, reduction per step, parameter gather per step)."""
    zero, group, hardware = case.strategy.zero, case.data_group, case.setting.hardware
    if group.size == 1:
        return 0.0, 0.0, 0.0, 0.0
    divided, whole = case.weights.divided, case.weights.whole
    sharded, replicated = _reduced_bytes(case, divided), _reduced_bytes(case, whole)
    reduce = collective_seconds("reduce-scatter" if zero else "all-reduce", sharded, group, hardware)
    reduce += collective_seconds("all-reduce", replicated, group, hardware)
    gather = collective_seconds("all-gather", divided.computed, group, hardware) if zero >= 3 else 0.0
    gather_once = collective_seconds("all-gather", divided.stored, group, hardware) if zero in (1, 2) else 0.0
    return (gather, reduce, 0.0, gather_once) if zero >= 2 else (gather, 0.0, reduce, gather_once)


def _reduced_bytes(case: _Case, weight: WeightBytes) -> float:
    """Bytes of a gradient when it is reduced."""
    return weight.stored if case.accumulates and case.strategy.zero <= 1 else weight.computed
