"""What one microbatch costs in one layer, whatever zero does: computing and the collectives nothing hides.

Collectives of the trailing mesh axes, by strategy:

* **tensor parallelism**: those of the profile's candidate, with or without sequence parallelism. Where tp exceeds the
  kv heads, keys and values are computed alike by the ranks that share a kv head, and the profile has other collectives
  (``Candidate.spilled``): sums over kv heads take in fewer ranks than sums over all heads, and the cotangents of keys
  and values are sums over the heads of a group;
* **Ulysses** (Jacobs et al. 2023, section 3.1): all-to-alls of queries, keys, values and of the result, over the
  ``ulysses`` ranks, and what else the profile names; gradients of weights are ``_weights``'s.

A collective's group has the ranks that shard the classes it sums over (``Collective.over``). Rematerialisation runs
those again that the profile marks (``recomputed``, ``recomputed_dots``).

Strategies that differ in zero alone share one ``Work``, so it is remembered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from ..measured import Pass
from ..plan import Strategy
from ..profile import BATCH, SEQ, Candidate, Collective, HardwareProfile, LayerKind, Phase
from ..strategy import Remat
from ._collectives import collective_seconds, device_group
from ._compute import compute_seconds, recompute_seconds
from ._kind import array_bytes, is_fused, summarise
from ._measured import Estimate, pass_seconds
from ._memo import remembered
from ._values import Shares


class PassWork(NamedTuple):
    """Seconds of one pass of one microbatch through one layer."""

    compute_s: float
    tensor_s: float
    """Collectives over the trailing mesh axes: tensor parallelism or Ulysses."""
    data_s: float
    """Collectives of sharding the batch, other than those of weights and gradients."""


class Work(NamedTuple):
    """All passes of one microbatch."""

    forward: PassWork
    backward: PassWork
    again: dict[Remat, PassWork]
    """What rematerialisation runs again of forward."""


class SpreadCollective(NamedTuple):
    """A collective of the profile over ``ranks`` devices, every ``stride``-th."""

    collective: Collective
    ranks: int
    stride: int
    local: bool
    """Its array is what one device holds; otherwise the whole array of the group."""
    along_sequence: bool
    """Where sp shards its array along the sequence, it moves the shard: only sums over the batch do."""

    def size_bytes(self, kind: LayerKind, shares: Shares) -> float:
        """Return the bytes of the array of one of them."""
        # What tensor ranks reduce or gather is whole along the sequence; all but gathers are local otherwise.
        if self.local:
            shares = dataclasses.replace(shares, sp=shares.sp and self.along_sequence)
        else:
            shares = Shares(shares.microbatch, shares.dp)
        return array_bytes(kind, self.collective.array).at(shares)

    def number(self, *, merged: bool) -> int:
        """Return how many there are when the compiler does or does not sum before it reduces."""
        return self.collective.merged_count if merged else self.collective.array.count


@remembered
def layer_work(
    kind: LayerKind,
    hardware: HardwareProfile,
    strategy: Strategy,
    microbatch: int,
    causal: bool,
    gpus: int,
) -> Work:
    """Return the work of one microbatch.

    Args:
        kind: The layer kind.
        hardware: The devices.
        strategy: Its tp, sp, ulysses and dp count; zero and remat are at their defaults (``spread_of``).
        microbatch: Samples over all devices of the stage.
        causal: Attention is causal.
        gpus: Devices of the stage that share a node.
    """
    shares = Shares.of(kind, strategy, microbatch)
    sums = summarise(kind, is_fused(kind, hardware))
    inner, data = tuple(inner_collectives(kind, strategy)), tuple(data_collectives(kind, strategy))

    def communicate(spread: Iterable[SpreadCollective]) -> float:
        return sum(
            c.number(merged=hardware.sums_before_reducing)
            * collective_seconds(
                c.collective.kind, c.size_bytes(kind, shares), device_group(c.ranks, c.stride, gpus), hardware
            )
            for c in spread
        )

    def formula(phase: Phase) -> Estimate:
        return lambda s, n: compute_seconds(sums, phase, Shares.of(kind, s, n), hardware, causal=causal)

    def repeated(remat: Remat) -> float:
        if remat == "none":
            return 0.0

        def estimate(s: Strategy, n: int) -> float:
            return recompute_seconds(sums, remat, Shares.of(kind, s, n), hardware, causal=causal)

        what: Pass = "recompute" if remat == "full" else "recompute-dots"
        return pass_seconds(kind, hardware, what, strategy, microbatch, estimate, formula("forward"))

    def work(phase: Phase) -> PassWork:
        return PassWork(
            pass_seconds(kind, hardware, phase, strategy, microbatch, formula(phase)),
            communicate(c for c in inner if c.collective.phase == phase),
            communicate(c for c in data if c.collective.phase == phase),
        )

    def again(remat: Remat) -> PassWork:
        return PassWork(
            repeated(remat),
            communicate(c for c in inner if runs_again(c.collective, remat)),
            communicate(c for c in data if runs_again(c.collective, remat)),
        )

    return Work(
        work("forward"), work("backward"), {"none": again("none"), "dots": again("dots"), "full": again("full")}
    )


def spread_of(strategy: Strategy) -> Strategy:
    """Return the part of ``strategy`` that decides where activations lie: what ``layer_work`` depends on."""
    return Strategy(tp=strategy.tp, sp=strategy.sp, ulysses=strategy.ulysses, dp=strategy.dp)


def inner_collectives(kind: LayerKind, strategy: Strategy) -> Iterator[SpreadCollective]:
    """Yield the collectives over the trailing mesh axes that one microbatch causes."""
    candidate = kind.best_candidate
    if strategy.ulysses > 1 and kind.ulysses is not None:
        yield from _spread(kind, kind.ulysses.collectives, strategy)
    if strategy.tp > 1 and candidate is not None:
        yield from _spread(kind, candidate.collectives(strategy.tp, kind.classes, sp=strategy.sp), strategy)


def data_collectives(kind: LayerKind, strategy: Strategy) -> Iterator[SpreadCollective]:
    """Yield the collectives of sharding the batch, without parameter gradients (parts of one stay in hsdp's group)."""
    for collective in kind.data:
        over = collective.over if strategy.ulysses > 1 and collective.over else (BATCH,)
        replicas = strategy.replicas if collective.gradient else 1
        inside = msgspec.structs.replace(strategy, dp=strategy.dp // replicas)
        yield from _spread(kind, [msgspec.structs.replace(collective, over=over)], inside)


def runs_again(collective: Collective, remat: Remat) -> bool:
    """Return whether rematerialisation repeats ``collective`` in the backward pass."""
    if collective.phase != "forward":
        return False
    return (remat == "full" and collective.recomputed) or (remat == "dots" and collective.recomputed_dots)


def _spread(kind: LayerKind, collectives: Iterable[Collective], strategy: Strategy) -> Iterator[SpreadCollective]:
    candidate = kind.best_candidate
    shards = candidate.shards(strategy.tp, kind.classes) if candidate and strategy.tp > 1 else {}
    sizes = {**shards, BATCH: strategy.dp}
    if strategy.ulysses > 1 or strategy.sp:
        sizes[SEQ] = strategy.inner
    for collective in collectives:
        ranks = math.prod(sizes.get(name, 1) for name in collective.over) if collective.over else strategy.inner
        if ranks > 1:
            local = bool(collective.over) or collective.kind in ("all-to-all", "collective-permute")
            stride, over_batch = _stride(candidate, collective, shards, strategy), BATCH in collective.over
            yield SpreadCollective(collective, ranks, stride, local, over_batch)


def _stride(candidate: Candidate | None, collective: Collective, shards: Mapping[str, int], strategy: Strategy) -> int:
    """Return the distance of neighbours in the group: batch outside, then classes, then what they spill into."""
    if set(collective.over) == {BATCH}:
        return strategy.inner
    spill = candidate.spill if candidate else {}
    inside = [rest for name, rest in spill.items() if name in collective.over and rest not in collective.over]
    return math.prod(shards.get(rest, 1) for rest in inside)
