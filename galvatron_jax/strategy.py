"""Strategy: how one layer is spread over the D devices of its stage.

    D = dp * tp        tensor parallelism over the trailing mesh axes, data parallelism over the leading ones
    D = dp * ulysses   Ulysses over the trailing axes: the sequence is sharded there, inside attention the heads

Either way strategies *nest*: a change between layers costs at most a few collectives. ZeRO shards over the ranks that
hold the same weights (``zero_ranks``): the data axes and, under Ulysses, the trailing axes too. With ``replicas`` of r
(hsdp) the r leading groups of ranks each hold a whole sharded copy: shards are gathered inside a group, gradients are
reduce-scattered inside and all-reduced across.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from ._document import Value
from .profile import BATCH, SEQ, Count, LayerKind, Parameter

Remat = Literal["none", "dots", "full"]
"""What a layer keeps for its backward pass: results of all kernels and reductions; of products with weights only
(attention runs again); or only its input."""


class Strategy(Value, frozen=True, kw_only=True, order=True):
    """How one layer is spread over the devices of its stage."""

    tp: Count = 1
    """Tensor-parallel degree."""
    sp: bool = False
    """Sequence-shard the stream over the tensor axes between the products (Megatron)."""
    ulysses: Count = 1
    """Ulysses degree (Jacobs et al. 2023): the sequence is sharded, and swapped for heads around attention."""
    dp: Count = 1
    """Data-parallel degree."""
    zero: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    """Over ``zero_ranks`` sharded: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    replicas: Count = 1
    """Groups of data-parallel ranks that each hold a whole sharded copy (hsdp); 1 shards over all ranks."""
    remat: Remat = "none"
    """What is kept for the backward pass (see ``Remat``)."""

    @property
    def inner(self) -> int:
        """Devices over which one sample is spread: the trailing mesh axes."""
        return self.tp * self.ulysses

    @property
    def zero_ranks(self) -> int:
        """Ranks over which ZeRO shards."""
        return self.dp * self.ulysses // self.replicas

    def __str__(self) -> str:
        """Compact text such as ``"tp2+sp dp4 zero3 remat"``."""
        words = [f"tp{self.tp}" + "+sp" * self.sp] if self.tp > 1 else []
        words += [f"ulysses{self.ulysses}"] if self.ulysses > 1 else []
        words += [f"dp{self.dp}"] if self.dp > 1 else []
        words += [f"zero{self.zero}"] if self.zero else []
        words += [f"hsdp{self.replicas}"] if self.replicas > 1 else []
        words += {"none": [], "dots": ["remat-dots"], "full": ["remat"]}[self.remat]
        return " ".join(words) or "one device"


def strategy_violations(kind: LayerKind, strategy: Strategy, microbatch: int) -> list[str]:
    """Return why ``strategy`` is illegal for a layer of ``kind``; empty when it is legal.

    Args:
        kind: The layer kind.
        strategy: The strategy.
        microbatch: Samples of one microbatch over all devices of the stage.
    """
    found = []
    if BATCH in kind.classes and microbatch % strategy.dp:
        found.append(f"microbatch of {microbatch} samples does not divide by dp={strategy.dp}")
    found += _zero_violations(strategy)
    if strategy.sp and strategy.tp == 1:
        found.append("sp needs tp > 1")
    if strategy.tp > 1 and strategy.ulysses > 1:
        found.append(f"tp={strategy.tp} and ulysses={strategy.ulysses} exclude each other")
    if strategy.tp > 1:
        found += _tensor_violations(kind, strategy)
    if strategy.ulysses > 1:
        found += _ulysses_violations(kind, strategy)
    if strategy.remat == "dots" and kind.residuals_dots is None:
        found.append(f"remat=dots is not known for kind {kind.name!r}: its profile names no residuals_dots")
    return found


def _zero_violations(strategy: Strategy) -> list[str]:
    ranks = strategy.dp * strategy.ulysses
    found = []
    if strategy.zero and ranks == 1:
        found.append(f"zero={strategy.zero} needs dp > 1")
    if strategy.replicas > 1 and not strategy.zero:
        found.append(f"replicas={strategy.replicas} needs zero > 0")
    if strategy.dp % strategy.replicas:
        found.append(f"replicas={strategy.replicas} does not divide dp={strategy.dp}")
    elif strategy.replicas > 1 and strategy.zero_ranks == 1:
        found.append(f"replicas={strategy.replicas} leaves nothing to shard over")
    return found


def _tensor_violations(kind: LayerKind, strategy: Strategy) -> list[str]:
    candidate = kind.best_candidate
    if candidate is None:
        return [f"tp={strategy.tp}: no class of kind {kind.name!r} may be sharded"]
    found = [
        f"tp={strategy.tp} does not divide {name}={kind.classes[name]}"
        for name in candidate.undivided(kind.classes, strategy.tp)
    ]
    if strategy.sp and candidate.sequence is None:
        found.append(f"sp is not legal for kind {kind.name!r}")
    if strategy.sp and candidate.spills(strategy.tp, kind.classes):
        found.append(f"sp with tp={strategy.tp} is not legal for kind {kind.name!r}: it spills over its classes")
    if strategy.sp and kind.classes.get(SEQ, 1) % strategy.tp:
        found.append(f"sp: tp={strategy.tp} does not divide seq={kind.classes.get(SEQ, 1)}")
    return found


def _ulysses_violations(kind: LayerKind, strategy: Strategy) -> list[str]:
    if kind.ulysses is None:
        return [f"ulysses is not legal for kind {kind.name!r}"]
    sizes = {name: kind.classes.get(name, 1) for name in (SEQ, *kind.ulysses.classes)}
    return [
        f"ulysses={strategy.ulysses} does not divide {name}={size}"
        for name, size in sizes.items()
        if size % strategy.ulysses
    ]


def zero_dim(parameter: Parameter, sizes: dict[str, int], tensor_shards: dict[str, int], ranks: int) -> int | None:
    """Return the dimension of ``parameter`` that ZeRO shards ``ranks`` ways, or None when none divides.

    The first dimension (as left by tensor parallelism) that ``ranks`` divide: its shards are whole pieces of memory, so
    that neither gathers nor reduce-scatters transpose anything. XLA:GPU does both along the first dimension only; of
    another it transposes gathered weights, whole gradients and, outside the loop, whole stacks of parameters
    (docs/design/0101).

    Args:
        parameter: The parameter.
        sizes: Size of each class.
        tensor_shards: Shards of each class by tensor parallelism (``Candidate.shards``).
        ranks: Ranks to shard over (``Strategy.zero_ranks``).
    """
    for position, dim in enumerate(parameter.dims):
        size = math.prod(f if isinstance(f, int) else sizes[f] // tensor_shards.get(f, 1) for f in dim)
        if size % ranks == 0:
            return position
    return None
