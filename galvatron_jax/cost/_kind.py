"""A layer kind boiled down to sums that price any strategy and batch in a few multiplications.

An array of a layer is a monomial over classes, so on one device it has

    size = coefficient * microbatch^p / (dp if p else 1) * share

where ``p`` counts its batch dimensions (a mesh axis can shard one of them only), and the share, one dimension sharded
over the trailing mesh axes again, depends on what the array carries (``Shares.share``):

* classes of the kind's best candidate: under tensor parallelism 1 / shards of these classes (``Candidate.shards``).
  That is 1 / tp; with kv heads that tp exceeds, keys and values (which carry the kv heads but not the group) have
  gcd(tp, kv heads) shards only: they are copied;
* ``seq`` but no class of the candidate: 1 / tp under sequence parallelism;
* ``seq``, or batch and heads (``Ulysses.classes``): 1 / ulysses; weights are whole there;
* otherwise 1.

Arrays with equal ``p`` that carry the same add up, so every sum of a kind has a handful of terms. Complexity: one pass
over the arrays of the kind, once; then O(terms) per price.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..plan import zero_dim
from ..profile import BATCH, SEQ, Array, Dot, HardwareProfile, LayerKind, Live, Parameter, Phase
from ..strategy import Remat
from ..units import ITEM_BYTES
from ._memo import remembered
from ._values import Carried, Shares

PHASES: tuple[Phase, ...] = ("forward", "backward")
FUSABLE_DTYPES = ("bfloat16", "float16")
"""Fused attention kernels (FlashAttention, cuDNN) exist for these operand dtypes."""


class LocalSum(NamedTuple):
    """A sum of array sizes as a function of the strategy's shares: (coefficient, batch power, carried) of each term."""

    terms: tuple[tuple[float, int, Carried], ...]

    def at(self, shares: Shares) -> float:
        """Return the sum on one device."""
        total = 0.0
        for coefficient, power, carried in self.terms:
            size = coefficient * shares.microbatch**power / shares.dp if power else coefficient
            total += size * shares.share(carried)
        return total


class DotSum(NamedTuple):
    """``copies`` equal matrix products."""

    flops: LocalSum
    """FLOP of one of them."""
    dtype: str
    copies: int
    fused: bool
    """Part of a fused attention kernel."""
    recomputed: bool
    """Full rematerialisation runs it again."""
    batched: bool
    """Remat ``dots`` runs it again too, if it is ``recomputed``."""


class LiveSums(NamedTuple):
    """What is alive in the backward pass under one remat policy (``profile.Live``)."""

    moments: tuple[tuple[LocalSum, LocalSum], ...]
    """(arrays, weights) of each."""
    prefetched: LocalSum
    waiting: LocalSum


class KindSums(NamedTuple):
    """All sums of one layer kind; attention arrays are left out when attention is fused."""

    dots: dict[Phase, tuple[DotSum, ...]]
    traffic: dict[Phase, LocalSum]
    """Bytes that memory-bound kernels read and write, of arrays with a batch."""
    weight_traffic: dict[Phase, LocalSum]
    """The same of arrays without a batch: casts of the weights to the compute dtype and of their gradients back."""
    attention_traffic: LocalSum
    """The part of the forward traffic inside attention: what remat ``dots`` runs again."""
    stream_input: LocalSum
    """Bytes of the layer's stream input: all that full remat keeps."""
    residuals: LocalSum
    residuals_dots: LocalSum
    """The same under remat ``dots``; nothing when the profile does not know it."""
    workspace: LocalSum
    live: dict[Remat, LiveSums]
    """By remat policy; empty when the profile does not know it."""
    gathered: LocalSum
    """Bytes of what sequence parallelism gathers along the sequence in one backward pass: cotangents, and the stream
    once more."""
    flops: float
    """FLOP of all forward and backward products of one sample on one device, causal attention counted whole."""
    attention_flops: float
    """The part of ``flops`` inside attention."""


class WeightBytes(NamedTuple):
    """Bytes of a kind's parameters on one device after tensor parallelism, before zero."""

    elements: float
    stored: float
    """In the storage dtype."""
    computed: float
    """In the compute dtype."""
    cast: float
    """In the compute dtype, of those parameters whose compute dtype is not their storage dtype."""

    def scaled(self, factor: float) -> WeightBytes:
        """Return ``factor`` times all bytes."""
        return WeightBytes(*(factor * value for value in self))

    def plus(self, other: WeightBytes) -> WeightBytes:
        """Return the sum of both."""
        return WeightBytes(*(a + b for a, b in zip(self, other, strict=True)))


class Weights(NamedTuple):
    """Parameters of a kind under one tensor degree, by whether zero can shard them over its ranks."""

    divided: WeightBytes
    """Those with a dimension that the ranks divide (``plan.zero_dim``)."""
    whole: WeightBytes
    """The others: every rank keeps all of them."""
    replicated: WeightBytes
    """What one device holds where zero does not shard: divided + whole."""
    sharded: WeightBytes
    """What one device holds where zero shards: divided / ranks + whole."""
    shares: tuple[float, ...]
    """Each parameter's share of all elements of the layer."""
    tied: WeightBytes
    """The part of divided + whole that a layer before holds too."""
    own_divided: WeightBytes
    """The part of divided that no layer before holds."""
    own_replicated: WeightBytes
    """What one device holds besides these where zero does not shard."""
    own_sharded: WeightBytes
    """The same where zero shards."""

    def held(self, is_sharded: bool) -> WeightBytes:
        """Return what one device holds."""
        return self.sharded if is_sharded else self.replicated

    @property
    def arrays(self) -> int:
        """How many parameters there are."""
        return len(self.shares)

    def own(self, is_sharded: bool) -> WeightBytes:
        """Return what one device holds besides the arrays that a layer before it on the same stage keeps."""
        return self.own_sharded if is_sharded else self.own_replicated


@remembered
def is_fused(kind: LayerKind, hardware: HardwareProfile) -> bool:
    """Return whether the attention of ``kind`` runs as a fused kernel on ``hardware``."""
    scores = _scores(kind)
    return hardware.fused_attention and bool(scores) and all(dot.dtype in FUSABLE_DTYPES for dot in scores)


@remembered
def summarise(kind: LayerKind, fused: bool) -> KindSums:
    """Return the sums of ``kind``, with or without fused attention."""
    stream = [boundary.array for boundary in kind.inputs if boundary.stream]
    forward = [traffic.array for traffic in kind.traffic if traffic.phase == "forward"]
    return KindSums(
        dots={phase: tuple(_dot(kind, dot, fused) for dot in kind.dots if dot.phase == phase) for phase in PHASES},
        traffic={phase: _traffic(kind, phase, fused, batch=True) for phase in PHASES},
        weight_traffic={phase: _traffic(kind, phase, fused, batch=False) for phase in PHASES},
        attention_traffic=_total(kind, [array for array in forward if array.attention], fused),
        stream_input=_total(kind, stream, fused),
        residuals=_total(kind, kind.residuals, fused),
        residuals_dots=_total(kind, kind.residuals_dots or (), fused),
        workspace=_total(kind, kind.workspace, fused),
        live={remat: _live(kind, live, fused) for remat, live in kind.live.items()},
        gathered=_gathered(kind),
        flops=_sample_flops(kind, kind.dots),
        attention_flops=_sample_flops(kind, (dot for dot in kind.dots if dot.attention)),
    )


@remembered
def weigh(kind: LayerKind, tp: int, ranks: int) -> Weights:
    """Return the parameter bytes of ``kind`` under ``tp``, split by whether zero can shard them over ``ranks``."""
    candidate = kind.best_candidate
    shards = candidate.shards(tp, kind.classes) if candidate else {}
    untied = [parameter for parameter in kind.parameters if not parameter.tied]
    divided, whole = _by_zero(kind, kind.parameters, shards, ranks)
    own_divided, own_whole = _by_zero(kind, untied, shards, ranks)
    tied_divided, tied_whole = _by_zero(kind, [p for p in kind.parameters if p.tied], shards, ranks)
    return Weights(
        divided=divided,
        whole=whole,
        replicated=divided.plus(whole),
        sharded=divided.scaled(1 / ranks).plus(whole),
        shares=_shares(kind, shards),
        tied=tied_divided.plus(tied_whole),
        own_divided=own_divided,
        own_replicated=own_divided.plus(own_whole),
        own_sharded=own_divided.scaled(1 / ranks).plus(own_whole),
    )


def _shares(kind: LayerKind, shards: dict[str, int]) -> tuple[float, ...]:
    elements = [parameter.array().elements(kind.classes, shards) for parameter in kind.parameters]
    return tuple(each / sum(elements) for each in elements)


def _by_zero(
    kind: LayerKind, parameters: Iterable[Parameter], shards: dict[str, int], ranks: int
) -> tuple[WeightBytes, WeightBytes]:
    """Bytes of the parameters that ``ranks`` ranks can shard, and of the others."""
    divided = whole = WeightBytes(0.0, 0.0, 0.0, 0.0)
    for parameter in parameters:
        elements = parameter.array().elements(kind.classes, shards)
        computed = elements * ITEM_BYTES[parameter.compute_dtype]
        cast = computed if parameter.compute_dtype != parameter.dtype else 0.0
        weight = WeightBytes(elements, elements * ITEM_BYTES[parameter.dtype], computed, cast)
        if zero_dim(parameter, kind.classes, shards, ranks) is None:
            whole = whole.plus(weight)
        else:
            divided = divided.plus(weight)
    return divided, whole


def array_bytes(kind: LayerKind, array: Array) -> LocalSum:
    """Return the bytes of one of the ``array.count`` arrays."""
    carried, power, size = _monomial(kind, array.classes, array.factor)
    return LocalSum(((ITEM_BYTES[array.dtype] * size, power, carried),))


def _dot(kind: LayerKind, dot: Dot, fused: bool) -> DotSum:
    carried, power, size = _monomial(kind, dot.classes, dot.factor)
    flops = LocalSum(((2 * size, power, carried),))
    # a fused kernel works in the operands' dtype also where the traced backward was wider
    dtype = next(d.dtype for d in _scores(kind)) if fused and dot.attention else dot.dtype
    return DotSum(flops, dtype, dot.count, fused and dot.attention, dot.recomputed, dot.batched)


def _scores(kind: LayerKind) -> list[Dot]:
    """Attention products of the forward pass: their dtype is that of query, key and value."""
    return [dot for dot in kind.dots if dot.attention and dot.phase == "forward"]


def _traffic(kind: LayerKind, phase: Phase, fused: bool, *, batch: bool) -> LocalSum:
    arrays = (t.array for t in kind.traffic if t.phase == phase and (BATCH in t.array.classes) == batch)
    return _total(kind, arrays, fused)


def _total(kind: LayerKind, arrays: Iterable[Array], fused: bool) -> LocalSum:
    found: dict[tuple[int, Carried], float] = defaultdict(float)
    for array in arrays:
        if not (fused and array.attention):
            carried, power, size = _monomial(kind, array.classes, array.factor)
            found[power, carried] += ITEM_BYTES[array.dtype] * array.count * size
    return LocalSum(tuple((size, power, carried) for (power, carried), size in found.items()))


def _live(kind: LayerKind, live: Live, fused: bool) -> LiveSums:
    return LiveSums(
        moments=tuple((_total(kind, m.arrays, fused), _total(kind, m.weights, False)) for m in live.moments),
        prefetched=_total(kind, live.prefetched, False),
        waiting=_total(kind, live.waiting, fused),
    )


def _gathered(kind: LayerKind) -> LocalSum:
    candidate = kind.best_candidate
    found: dict[int, float] = defaultdict(float)
    for collective in (candidate.sequence or ()) if candidate else ():
        if collective.kind == "all-gather" and collective.phase == "backward":
            array = collective.array
            _, power, size = _monomial(kind, array.classes, array.factor)
            found[power] += ITEM_BYTES[array.dtype] * array.count * size
    return LocalSum(tuple((size, power, NOTHING_CARRIED) for power, size in found.items()))


NOTHING_CARRIED = Carried((), sequence=False, heads=False)


def _monomial(kind: LayerKind, classes: tuple[str, ...], factor: int) -> tuple[Carried, int, float]:
    """Return (carried classes, batch power, size at one sample) of an array or product."""
    size = factor * math.prod(kind.classes[name] for name in classes if name != BATCH)
    return _carried(kind, classes), classes.count(BATCH), float(size)


def _carried(kind: LayerKind, classes: tuple[str, ...]) -> Carried:
    candidate, ulysses = kind.best_candidate, kind.ulysses
    sharded = {*candidate.classes, *candidate.spill.values()} if candidate else set()
    heads = ulysses is not None and BATCH in classes and not set(ulysses.classes).isdisjoint(classes)
    return Carried(tuple(sorted(sharded.intersection(classes))), SEQ in classes, heads)


def _sample_flops(kind: LayerKind, dots: Iterable[Dot]) -> float:
    sizes: Mapping[str, int] = {**kind.classes, BATCH: 1}
    return sum(dot.count * dot.flops(sizes, {}) for dot in dots)
