"""A layer kind boiled down to sums that price any strategy and batch in a few multiplications.

An array of a layer is a monomial over classes, so on one device it has

    size = coefficient * microbatch^p / (dp if p else 1) * share,     share in {1, 1/tp, 1/tp with sp else 1}

where ``p`` counts its batch dimensions (a mesh axis can shard one of them only), and the share is

* ``tensor``: 1/tp, when it carries a class of the kind's best candidate;
* ``sequence``: 1/tp under sequence parallelism, when it carries ``seq`` but no class of the candidate;
* ``whole``: 1, otherwise.

Arrays with equal ``p`` and share add up, so every sum of a kind has a handful of terms. Complexity: one pass over the
arrays of the kind, once; then O(terms) per price.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from ..plan import zero_dim
from ..profile import BATCH, SEQ, Array, Dot, HardwareProfile, LayerKind, Phase
from ..units import ITEM_BYTES
from ._memo import remembered
from ._values import Shares

Share = Literal["whole", "tensor", "sequence"]
PHASES: tuple[Phase, ...] = ("forward", "backward")
FUSABLE_DTYPES = ("bfloat16", "float16")
"""Fused attention kernels (FlashAttention, cuDNN) exist for these operand dtypes."""


class LocalSum(NamedTuple):
    """A sum of array sizes as a function of the strategy's shares: (coefficient, batch power, share) of each term."""

    terms: tuple[tuple[float, int, Share], ...]

    def at(self, shares: Shares) -> float:
        """Return the sum on one device."""
        total = 0.0
        for coefficient, power, share in self.terms:
            size = coefficient * shares.microbatch**power / shares.dp if power else coefficient
            if share == "tensor":
                size *= shares.tensor
            elif share == "sequence":
                size *= shares.sequence
            total += size
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


class KindSums(NamedTuple):
    """All sums of one layer kind; attention arrays are left out when attention is fused."""

    dots: dict[Phase, tuple[DotSum, ...]]
    traffic: dict[Phase, LocalSum]
    """Bytes that memory-bound kernels read and write, of arrays with a batch."""
    weight_traffic: dict[Phase, LocalSum]
    """The same of arrays without a batch: casts of the weights to the compute dtype and of their gradients back."""
    stream_input: LocalSum
    """Bytes of the layer's stream input: all that full remat keeps."""
    residuals: LocalSum
    workspace: LocalSum
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
    """Parameters of a kind under one (tp, dp), by whether zero can shard them."""

    divided: WeightBytes
    """Those with a dimension that dp divides (``plan.zero_dim``)."""
    whole: WeightBytes
    """The others: every data-parallel rank keeps all of them."""
    replicated: WeightBytes
    """What one device holds where zero does not shard: divided + whole."""
    sharded: WeightBytes
    """What one device holds where zero shards: divided / dp + whole."""
    arrays: int
    """How many parameters there are."""

    def held(self, is_sharded: bool) -> WeightBytes:
        """Return what one device holds."""
        return self.sharded if is_sharded else self.replicated


@remembered
def is_fused(kind: LayerKind, hardware: HardwareProfile) -> bool:
    """Return whether the attention of ``kind`` runs as a fused kernel on ``hardware``."""
    scores = _scores(kind)
    return hardware.fused_attention and bool(scores) and all(dot.dtype in FUSABLE_DTYPES for dot in scores)


@remembered
def summarise(kind: LayerKind, fused: bool) -> KindSums:
    """Return the sums of ``kind``, with or without fused attention."""
    stream = [boundary.array for boundary in kind.inputs if boundary.stream]
    return KindSums(
        dots={phase: tuple(_dot(kind, dot, fused) for dot in kind.dots if dot.phase == phase) for phase in PHASES},
        traffic={phase: _traffic(kind, phase, fused, batch=True) for phase in PHASES},
        weight_traffic={phase: _traffic(kind, phase, fused, batch=False) for phase in PHASES},
        stream_input=_total(kind, stream, fused),
        residuals=_total(kind, kind.residuals, fused),
        workspace=_total(kind, kind.workspace, fused),
        gathered=_gathered(kind),
        flops=_sample_flops(kind, kind.dots),
        attention_flops=_sample_flops(kind, (dot for dot in kind.dots if dot.attention)),
    )


@remembered
def weigh(kind: LayerKind, tp: int, dp: int) -> Weights:
    """Return the parameter bytes of ``kind`` under ``tp``, split by whether ``dp`` divides them."""
    candidate = kind.best_candidate
    tensor_shards = candidate.shards(tp, kind.classes) if candidate else {}
    divided = whole = WeightBytes(0.0, 0.0, 0.0, 0.0)
    for parameter in kind.parameters:
        elements = parameter.array().elements(kind.classes, tensor_shards)
        stored = elements * ITEM_BYTES[parameter.dtype]
        computed = elements * ITEM_BYTES[parameter.compute_dtype]
        cast = computed if parameter.compute_dtype != parameter.dtype else 0.0
        weight = WeightBytes(elements, stored, computed, cast)
        if zero_dim(parameter, kind.classes, tensor_shards, dp) is None:
            whole = whole.plus(weight)
        else:
            divided = divided.plus(weight)
    sharded = divided.scaled(1 / dp).plus(whole)
    return Weights(divided, whole, divided.plus(whole), sharded, len(kind.parameters))


def array_bytes(kind: LayerKind, array: Array) -> LocalSum:
    """Return the bytes of one of the ``array.count`` arrays."""
    share, power, size = _monomial(kind, array.classes, array.factor)
    return LocalSum(((ITEM_BYTES[array.dtype] * size, power, share),))


def _dot(kind: LayerKind, dot: Dot, fused: bool) -> DotSum:
    share, power, size = _monomial(kind, dot.classes, dot.factor)
    flops = LocalSum(((2 * size, power, share),))
    if fused and dot.attention:  # one kernel, in the operands' dtype also where the traced backward was wider
        return DotSum(flops, next(d.dtype for d in _scores(kind)), dot.count, True, dot.recomputed)
    return DotSum(flops, dot.dtype, dot.count, False, dot.recomputed)


def _scores(kind: LayerKind) -> list[Dot]:
    """Attention products of the forward pass: their dtype is that of query, key and value."""
    return [dot for dot in kind.dots if dot.attention and dot.phase == "forward"]


def _traffic(kind: LayerKind, phase: Phase, fused: bool, *, batch: bool) -> LocalSum:
    arrays = (t.array for t in kind.traffic if t.phase == phase and (BATCH in t.array.classes) == batch)
    return _total(kind, arrays, fused)


def _total(kind: LayerKind, arrays: Iterable[Array], fused: bool) -> LocalSum:
    found: dict[tuple[int, Share], float] = defaultdict(float)
    for array in arrays:
        if not (fused and array.attention):
            share, power, size = _monomial(kind, array.classes, array.factor)
            found[power, share] += ITEM_BYTES[array.dtype] * array.count * size
    return LocalSum(tuple((size, power, share) for (power, share), size in found.items()))


def _gathered(kind: LayerKind) -> LocalSum:
    candidate = kind.best_candidate
    found: dict[int, float] = defaultdict(float)
    for collective in (candidate.sequence or ()) if candidate else ():
        if collective.kind == "all-gather" and collective.phase == "backward":
            array = collective.array
            _, power, size = _monomial(kind, array.classes, array.factor)
            found[power] += ITEM_BYTES[array.dtype] * array.count * size
    return LocalSum(tuple((size, power, "whole") for power, size in found.items()))


def _monomial(kind: LayerKind, classes: tuple[str, ...], factor: int) -> tuple[Share, int, float]:
    """Return (share, batch power, size at one sample) of an array or product."""
    size = factor * math.prod(kind.classes[name] for name in classes if name != BATCH)
    return _share(kind, classes), classes.count(BATCH), float(size)


def _share(kind: LayerKind, classes: tuple[str, ...]) -> Share:
    candidate = kind.best_candidate
    if candidate is None:
        return "whole"
    if not set(candidate.classes).isdisjoint(classes):
        return "tensor"
    return "sequence" if SEQ in classes else "whole"


def _sample_flops(kind: LayerKind, dots: Iterable[Dot]) -> float:
    sizes: Mapping[str, int] = {**kind.classes, BATCH: 1}
    return sum(dot.count * dot.flops(sizes, {}) for dot in dots)
