"""What one microbatch costs in one layer, whatever zero and remat do: computing and the collectives nothing hides.

Eight strategies (zero 0-3, with and without remat) share one ``Work``, so it is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..plan import Strategy
from ..profile import Collective, HardwareProfile, LayerKind, Phase
from ._collectives import Group, collective_seconds, device_group
from ._compute import compute_seconds
from ._kind import array_bytes, is_fused, summarise
from ._measured import Estimate, pass_seconds
from ._memo import remembered
from ._values import Shares


class PassWork(NamedTuple):
    """Seconds of one pass of one microbatch through one layer."""

    compute_s: float
    tensor_s: float
    """Collectives of tensor parallelism."""
    data_s: float
    """Collectives of sharding the batch, other than those of weights and gradients."""


class Work(NamedTuple):
    """All passes of one microbatch."""

    forward: PassWork
    backward: PassWork
    again: PassWork
    """What full rematerialisation runs again of forward."""


@remembered
def layer_work(
    kind: LayerKind,
    hardware: HardwareProfile,
    strategy: tuple[int, int, bool],
    microbatch: int,
    causal: bool,
    gpus: int,
) -> Work:
    """Return the work of one microbatch.

    Args:
        kind: The layer kind.
        hardware: The devices.
        strategy: (tp, dp, sp).
        microbatch: Samples over all devices of the stage.
        causal: Attention is causal.
        gpus: Devices of the stage that share a node.
    """
    tp, dp, sp = strategy
    spread = Strategy(tp=tp, dp=dp, sp=sp)
    shares = Shares.of(spread, microbatch)
    sums = summarise(kind, is_fused(kind, hardware))
    tensor_group, data_group = device_group(tp, 1, gpus), device_group(dp, tp, gpus)
    tensor = tensor_collectives(kind, sp)

    def formula(phase: Phase, again: bool = False) -> Estimate:
        return lambda s, samples: compute_seconds(
            sums, phase, Shares.of(s, samples), hardware, causal=causal, again=again
        )

    def work(phase: Phase, again: bool = False) -> PassWork:
        what, forward = "recompute" if again else phase, formula("forward") if again else None
        return PassWork(
            pass_seconds(kind, hardware, what, spread, microbatch, formula(phase, again), forward),
            _seconds(kind, tensor, phase, shares, tensor_group, hardware, again),
            _seconds(kind, kind.data, phase, shares, data_group, hardware, again),
        )

    return Work(work("forward"), work("backward"), work("forward", again=True))


def tensor_collectives(kind: LayerKind, sp: bool) -> tuple[Collective, ...]:
    """Return the collectives of the candidate that tensor parallelism shards, with or without sequence parallelism."""
    candidate = kind.best_candidate
    if candidate is None:
        return ()
    return candidate.sequence if sp and candidate.sequence is not None else candidate.tensor


def _seconds(
    kind: LayerKind,
    collectives: Iterable[Collective],
    phase: Phase,
    shares: Shares,
    group: Group,
    hardware: HardwareProfile,
    again: bool,
) -> float:
    if group.size == 1:
        return 0.0
    total = 0.0
    for collective in collectives:
        if collective.phase == phase and (collective.recomputed or not again):
            count = collective.merged_count if hardware.sums_before_reducing else collective.array.count
            size_bytes = array_bytes(kind, collective.array).at(_group_shares(collective, shares))
            total += count * collective_seconds(collective.kind, size_bytes, group, hardware)
    return total


def _group_shares(collective: Collective, shares: Shares) -> Shares:
    """Shares of a collective's array: whole over the tensor axes, except where its size is stated per device."""
    if collective.kind in ("all-to-all", "collective-permute"):
        return shares
    return Shares(shares.microbatch, shares.dp, 1.0, 1.0)
