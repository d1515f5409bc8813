"""Who keeps a parameter that several layers of a stage read, and what brings it to the others.

The first layer that reads it keeps it (``runtime._kept``). Every other one takes it from there, and its gradient goes
back:

    stored   ->   as the keeper uses it     all-gather over the keeper's zero ranks, if its zero level is 3
             ->   whole                     all-gather over the keeper's tensor shards    } where the reader wants
             ->   as the reader uses it     nothing                                       } another layout
    gradient ->   whole                     all-gather over the reader's tensor shards    }
             ->   the keeper's place        nothing

and nothing moves where the reader uses it right as it is stored: zero 3 over the reader's tensor ranks.
A value that nobody casts is moved once in forward for all that read it; each layer's cast is a value of its own (0081).
Gradients wait for the last microbatch only where all readers make theirs over the same ranks (``runtime._layers``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..plan import Strategy, zero_dim
from ..profile import LayerKind, Parameter


class Gather(NamedTuple):
    """One all-gather of a parameter, in its compute dtype."""

    ranks: int
    bytes: float
    is_whole: bool
    """It undoes tensor sharding; otherwise that of zero 3."""


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """One parameter as one layer has it."""

    kind: LayerKind
    strategy: Strategy
    parameter: Parameter

    @property
    def used(self) -> tuple[int, tuple[int, ...]]:
        """Its layout where the layer computes: parts of each dimension, and over how many tensor ranks."""
        parts = tuple(
            math.prod(self._shards.get(f, 1) for f in dim if isinstance(f, str)) for dim in self.parameter.dims
        )
        return (self.strategy.tp if max(parts, default=1) > 1 else 1, parts)

    @property
    def parts(self) -> int:
        """Into how many parts tensor parallelism divides it."""
        return math.prod(self.used[1])

    @property
    def zero_dim(self) -> int | None:
        """The dimension that zero can share out over its ranks."""
        return zero_dim(self.parameter, self.kind.classes, self._shards, self.strategy.zero_ranks)

    def place(self, zero: int) -> tuple[object, ...]:
        """Return where what zero shares out from level ``zero`` on lives."""
        dim = self.zero_dim if self.strategy.zero >= zero else None
        return (self.used, dim, dim is not None and (self.strategy.zero_ranks, self.strategy.replicas))

    @property
    def unreduced(self) -> tuple[int, ...]:
        """Over which ranks its gradient waits for the last microbatch; none where it does not."""
        s = self.strategy
        deferred = (s.dp, s.ulysses) if s.zero <= 1 else (s.replicas,)
        return deferred if self.parameter.per_sample and max(deferred) > 1 else ()

    def size_bytes(self, *, whole: bool) -> float:
        """Bytes in the compute dtype, of one tensor shard or ``whole``."""
        array = self.parameter.array(self.parameter.compute_dtype)
        return array.local_bytes(self.kind.classes, {} if whole else self._shards)

    @property
    def _shards(self) -> dict[str, int]:
        candidate = self.kind.best_candidate
        return candidate.shards(self.strategy.tp, self.kind.classes) if candidate else {}


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """One parameter that a layer reads, and how the layer that keeps it has it (itself, mostly)."""

    own: Held
    keeper: Held
    agreed: bool
    """All layers that read it make gradients over the same ranks."""
    shared_out: int
    """From which zero level on gradients are shared out."""

    @property
    def gathers(self) -> tuple[Gather, ...]:
        """What brings it from where it is stored to where the layer uses it."""
        keeper, found = self.keeper, []
        if self._lies_ready(3):
            return ()
        if keeper.strategy.zero >= 3 and keeper.zero_dim is not None and keeper.strategy.zero_ranks > 1:
            found.append(Gather(keeper.strategy.zero_ranks, keeper.size_bytes(whole=False), False))
        if self._is_elsewhere and keeper.parts > 1:
            found.append(Gather(keeper.parts, keeper.size_bytes(whole=True), True))
        return tuple(found)

    @property
    def gradient_gathers(self) -> tuple[Gather, ...]:
        """What brings its gradient, reduced where the layer uses it, to where the keeper has gradients."""
        if not self._is_elsewhere or self.own.parts == 1 or self._lies_ready(self.shared_out):
            return ()
        return (Gather(self.own.parts, self.own.size_bytes(whole=True), True),)

    @property
    def _is_elsewhere(self) -> bool:
        """Tell whether the keeper uses it in another layout."""
        return self.own.used != self.keeper.used

    def _lies_ready(self, zero: int) -> bool:
        """Tell whether what the keeper shares out from level ``zero`` on lies as this layer uses it."""
        keeper, dim = self.keeper, self.keeper.zero_dim
        if dim is None or keeper.strategy.tp > 1 or keeper.strategy.zero < zero:
            return False
        ranks = keeper.strategy.zero_ranks
        return self.own.used == (ranks, tuple(ranks if d == dim else 1 for d in range(len(keeper.parameter.dims))))

    @property
    def scatters(self) -> bool:
        """Tell whether the layer would have its gradient where the keeper has it: it is reduced right to there."""
        return self.own.place(self.shared_out) == self.keeper.place(self.shared_out)


def read_parameters(layers: Sequence[tuple[LayerKind, Strategy]], *, shared_out: int = 1) -> Iterator[list[Reading]]:
    """Yield what each layer of a stage reads, parameter by parameter.

    Args:
        layers: Kind and strategy of each layer of the stage, in order.
        shared_out: From which zero level on gradients are shared out: 1 where a step updates as soon as it has them, 2
            where stages add them up first.
    """
    kept: dict[tuple[str, str], Held] = {}
    found: list[list[tuple[Held, Held]]] = []
    for kind, strategy in layers:
        held = [Held(kind, strategy, parameter) for parameter in kind.parameters]
        found.append([(own, _keeper(own, kept) or own) for own in held])
        for own, keeper in found[-1]:
            if keeper is own:
                kept[_base(kind), own.parameter.path] = own
    waiting: dict[int, set[tuple[int, ...]]] = {}
    for own, keeper in (pair for pairs in found for pair in pairs):
        waiting.setdefault(id(keeper), set()).add(own.unreduced)
    for pairs in found:
        yield [Reading(own, keeper, len(waiting[id(keeper)]) == 1, shared_out) for own, keeper in pairs]


def _keeper(held: Held, kept: dict[tuple[str, str], Held]) -> Held | None:
    """Return who keeps a tied parameter: paths are relative to the layer's module, where it has one."""
    parameter = held.parameter
    if not parameter.tied:
        return None
    same = kept.get((_base(held.kind), parameter.path))
    return same or next(
        (
            other
            for (kind, path), other in kept.items()
            if parameter.path in (path, f"{kind}.{path}") or path == f"{_base(held.kind)}.{parameter.path}"
        ),
        None,
    )


def _base(kind: LayerKind) -> str:
    """Name of the module of a kind: several kinds may be of one (``block``, ``block#2``)."""
    return re.sub(r"#\d+$", "", kind.name)
