"""What one microbatch costs in one layer, whatever zero does: computing and the collectives nothing hides.

Collectives of the trailing mesh axes, by strategy:

* **tensor parallelism**: those of the profile's candidate, with or without sequence parallelism. Where tp exceeds the
  kv heads, each key and value is copied to ``r = tp / gcd(tp, kv heads)`` ranks that hold different query heads of its
  group; its cotangent is a sum over all heads of the group, so backward all-reduces it over these ``r`` ranks (beside
  each other). Source: the rule of docs/design/0003-backward-pass.md, "an operation that sums over a sharded class
  leaves partial results".
* **Ulysses** (Jacobs et al. 2023, section 3.1): all-to-alls of queries, keys, values and of the result, over the
  ``ulysses`` ranks, and what else the profile names; gradients of weights are ``_weights``'s.

Rematerialisation runs those again that ``recomputed`` marks: all of them under ``full``; under ``dots`` only the
all-to-alls around attention (attention itself runs again, from kept projections in the layout of the sequence). A
reduced product is kept as reduced, so no collective of tensor parallelism runs again.

Strategies that differ in zero alone share one ``Work``, so it is remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..measured import Pass
from ..plan import Strategy
from ..profile import Collective, HardwareProfile, LayerKind, Phase
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

    def size_bytes(self, kind: LayerKind, shares: Shares) -> float:
        """Return the bytes of the array of one of them."""
        return array_bytes(kind, self.collective.array).at(
            shares if self.local else Shares(shares.microbatch, shares.dp)
        )

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
    if strategy.ulysses > 1 and kind.ulysses is not None:
        yield from _spread(kind.ulysses.collectives, strategy.ulysses, 1)
    candidate = kind.best_candidate
    if strategy.tp > 1 and candidate is not None:
        sequence = candidate.sequence if strategy.sp else None
        yield from _spread(candidate.tensor if sequence is None else sequence, strategy.tp, 1)
        yield from _copy_reductions(kind, strategy.tp)


def data_collectives(kind: LayerKind, strategy: Strategy) -> Iterator[SpreadCollective]:
    """Yield the collectives of sharding the batch, parameter gradients left out."""
    if strategy.dp > 1:
        yield from _spread(kind.data, strategy.dp, strategy.inner)


def runs_again(collective: Collective, remat: Remat) -> bool:
    """Return whether rematerialisation repeats ``collective`` in the backward pass."""
    if not collective.recomputed or collective.phase != "forward":
        return False
    return remat == "full" or (remat == "dots" and collective.kind == "all-to-all")


def _spread(collectives: Iterable[Collective], ranks: int, stride: int) -> Iterator[SpreadCollective]:
    for collective in collectives:
        local = collective.kind in ("all-to-all", "collective-permute")
        yield SpreadCollective(collective, ranks, stride, local)


def _copy_reductions(kind: LayerKind, tp: int) -> Iterator[SpreadCollective]:
    """Yield the sums of the cotangents of copied keys and values, each over the ranks that hold the same kv heads."""
    candidate = kind.best_candidate
    assert candidate is not None
    shards = candidate.shards(tp, kind.classes)
    for name, rest in candidate.spill.items():
        if shards.get(rest, 1) > 1:
            for array in summarise(kind, False).copied:
                if name in array.classes:
                    summed = Collective(phase="backward", kind="all-reduce", array=array, merged_count=array.count)
                    yield SpreadCollective(summed, shards[rest], 1, True)
