"""Layouts: from a layer's strategy to the ``PartitionSpec`` of each of its values.

Compute layout of a value, dimension by dimension: ``batch`` over the data axes; a class of the tensor candidate over
the tensor axes (one that spills takes the leading ones, what it spills into the rest); under sequence parallelism
``seq`` over the tensor axes, in device order (docs/design/0004), where the value is stream-like (it carries every class
of the stream and no tensor class).
Under Ulysses ``seq`` over the trailing axes, and inside attention the heads in place of it; a value with two positions
(scores, masks) is inside. Parameters have three more places to be: *stored* (zero 3 shards them over the ranks that
hold the same), *gradients* (zero 2) and *optimizer state* (zero 1), all on the dimension ``plan.zero_dim`` names; with
``replicas`` (hsdp) over the trailing part of those ranks only, so that every leading group holds a whole copy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import AnalysedKind, Value
from ..plan import Strategy, zero_dim
from ..profile import BATCH, SEQ
from ._mesh import Axes, StageMesh

Role = Literal["parameter", "gradient", "optimizer"]

_ZERO_LEVEL: dict[Role, int] = {"optimizer": 1, "gradient": 2, "parameter": 3}
"""From which zero level on the data axes shard it (Rajbhandari et al. 2020, section 5)."""


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """One layer kind under one strategy on one mesh."""

    kind: AnalysedKind
    strategy: Strategy
    stage: StageMesh

    def value(self, value: Value, *, sequence: bool = True, inside: bool = False) -> NamedSharding:
        """Return the compute layout of a value of the layer.

        Args:
            value: The value.
            sequence: False: as if its sequence were not sharded.
            inside: As Ulysses has it inside attention.
        """
        axes = self._axes_by_dim(value, sequence=sequence, inside=inside)
        return self.stage.sharding(PartitionSpec(*[_entry(dim) for dim in axes]))

    def stored(self, index: int, role: Role) -> NamedSharding:
        """Return where a parameter, its gradient or its optimizer state lives between uses.

        Args:
            index: Position among the layer's parameters.
            role: Which of the three.
        """
        value = self.kind.layer.inputs[self.kind.layer.parameters[index]]
        axes = self._axes_by_dim(value)
        if self.strategy.zero >= _ZERO_LEVEL[role]:
            dim = self._zero_dims[index]
            if dim is not None:
                axes[dim] += self._zero_axes
        return self.stage.sharding(PartitionSpec(*[_entry(a) for a in axes]))

    def is_stream(self, value: Value) -> bool:
        """Tell whether ``value`` carries the whole stream and no tensor class."""
        classes = set(self.kind.layer.dimensions.flat_classes(value))
        return bool(self._stream) and self._stream <= classes and not classes & self.kind.tensor_classes

    def is_tensor_sharded(self, value: Value) -> bool:
        """Tell whether ``value`` carries a tensor class."""
        return not self.kind.tensor_classes.isdisjoint(self.kind.layer.dimensions.flat_classes(value))

    @functools.cached_property
    def _stream(self) -> frozenset[int]:
        return self.kind.stream_classes

    @functools.cached_property
    def _zero_dims(self) -> list[int | None]:
        profile = self.kind.profile
        candidate = profile.best_candidate
        shards = candidate.shards(self.strategy.tp, profile.classes) if candidate else {}
        return [zero_dim(p, profile.classes, shards, self.strategy.zero_ranks) for p in profile.parameters]

    @property
    def replica_axes(self) -> Axes:
        """Leading data axes, across the groups that each hold a whole sharded copy (hsdp)."""
        return self.stage.first_axes(self.stage.data_axes(self.strategy), self.strategy.replicas)

    @property
    def _zero_axes(self) -> Axes:
        """Mesh axes of the ranks that share the same weights out among them."""
        trailing = self.stage.tensor_axes(self.strategy) if self.strategy.ulysses > 1 else ()
        return self.stage.data_axes(self.strategy)[len(self.replica_axes) :] + trailing

    @property
    def sample_axes(self) -> dict[int, Axes]:
        """Mesh axes of the classes that are shared out like samples: the batch and, under Ulysses, the sequence."""
        names = {name: f for f, name in self.kind.names.items()}
        axes = {BATCH: self.stage.data_axes(self.strategy)}
        if self.strategy.ulysses > 1:
            axes[SEQ] = self.stage.tensor_axes(self.strategy)
        return {names[name]: found for name, found in axes.items() if name in names}

    @functools.cached_property
    def _class_axes(self) -> dict[int, Axes]:
        """Mesh axes of each sharded class, outside attention."""
        names = {name: f for f, name in self.kind.names.items()}
        axes = {names[name]: part for name, part in self._tensor_axes().items()} if self.strategy.tp > 1 else {}
        return axes | self.sample_axes

    @functools.cached_property
    def _inside_axes(self) -> dict[int, Axes]:
        """Mesh axes of each sharded class inside attention under Ulysses."""
        names = {f: name for f, name in self.kind.names.items()}
        axes = {f: part for f, part in self._class_axes.items() if names[f] != SEQ}
        heads = self.kind.attention.heads if self.kind.attention else ()
        return axes | dict.fromkeys(heads, self.stage.tensor_axes(self.strategy))

    def _tensor_axes(self) -> dict[str, Axes]:
        """Axes of each tensor class: all of them, but a class that spills takes what it has indices for."""
        candidate, axes = self.kind.profile.best_candidate, self.stage.tensor_axes(self.strategy)
        if candidate is None:
            return {}
        shards = candidate.shards(self.strategy.tp, self.kind.profile.classes)
        found = {name: self.stage.first_axes(axes, count) for name, count in shards.items()}
        for name, rest in candidate.spill.items():
            if rest in found:
                found[rest] = axes[len(found[name]) :]
        return found

    def _axes_by_dim(self, value: Value, *, sequence: bool = True, inside: bool = False) -> list[Axes]:
        dims = self.kind.layer.dimensions.classes(value)
        quadratic = sum(self.kind.names.get(f) == SEQ for dim in dims for f in dim) > 1
        class_axes = self._class_axes
        if self.strategy.ulysses > 1 and (inside or quadratic or not sequence):
            class_axes = self._inside_axes
        elif sequence and self.strategy.sp and self.is_stream(value):
            seq = {f: self.stage.tensor_axes(self.strategy) for f, name in self.kind.names.items() if name == SEQ}
            class_axes = class_axes | seq
        used: set[str] = set()
        return [self._dim_axes(dim, class_axes, used) for dim in dims]

    def _dim_axes(self, dim: list[int], class_axes: Mapping[int, Axes], used: set[str]) -> Axes:
        """Axes of one dimension: a minor factor can be sharded only where the major ones are, to the last index."""
        found: Axes = ()
        for factor in dim:
            axes = tuple(name for name in class_axes.get(factor, ()) if name not in used)
            used.update(axes)
            found += axes
            if self.stage.size(axes) != self.kind.layer.dimensions.factors.size(factor):
                break
        return found


def _entry(axes: Axes) -> str | Axes | None:
    """Axes of one dimension as a ``PartitionSpec`` entry."""
    return None if not axes else axes[0] if len(axes) == 1 else axes
