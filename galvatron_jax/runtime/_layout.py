"""Layouts: from a layer's strategy to the ``PartitionSpec`` of each of its values.

Compute layout of a value, dimension by dimension: ``batch`` over the data axes; a class of the tensor candidate over
the tensor axes; under sequence parallelism ``seq`` over the tensor axes where the value is stream-like (it carries
every class of the stream and no tensor class). Parameters have three more places to be: *stored* (zero 3 shards them
over the data axes), *gradients* (zero 2) and *optimizer state* (zero 1), all on the dimension ``plan.zero_dim`` names.
"""

from __future__ import annotations

import dataclasses
import functools
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

    def value(self, value: Value, *, sequence: bool = True) -> NamedSharding:
        """Return the compute layout of a value of the layer; without ``sequence``, as if there were no sp."""
        return self.stage.sharding(
            PartitionSpec(*[_entry(axes) for axes in self._axes_by_dim(value, sequence=sequence)])
        )

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
                axes[dim] += self.stage.data_axes(self.strategy)
        return self.stage.sharding(PartitionSpec(*[_entry(a) for a in axes]))

    def is_stream(self, value: Value) -> bool:
        """Tell whether ``value`` carries the whole stream and no tensor class."""
        classes = set(self.kind.layer.dimensions.flat_classes(value))
        return bool(self._stream) and self._stream <= classes and not classes & self.kind.tensor_classes

    @functools.cached_property
    def _stream(self) -> frozenset[int]:
        return self.kind.stream_classes

    @functools.cached_property
    def _zero_dims(self) -> list[int | None]:
        profile = self.kind.profile
        candidate = profile.best_candidate
        shards = candidate.shards(self.strategy.tp, profile.classes) if candidate else {}
        return [zero_dim(p, profile.classes, shards, self.strategy.zero_ranks) for p in profile.parameters]

    @functools.cached_property
    def _class_axes(self) -> dict[int, Axes]:
        """Mesh axes of each sharded class."""
        names = {name: f for f, name in self.kind.names.items()}
        axes = dict.fromkeys(self.kind.tensor_classes, self.stage.tensor_axes(self.strategy))
        if BATCH in names:
            axes[names[BATCH]] = self.stage.data_axes(self.strategy)
        return axes

    def _axes_by_dim(self, value: Value, *, sequence: bool = True) -> list[Axes]:
        seq_axes = self.stage.sequence_axes(self.strategy) if sequence and self.is_stream(value) else ()
        used: set[str] = set()
        dims = []
        for dim in self.kind.layer.dimensions.classes(value):
            axes: Axes = ()
            if dim:
                axes = seq_axes if self.kind.names.get(dim[0]) == SEQ else self._class_axes.get(dim[0], ())
            axes = tuple(name for name in axes if name not in used)
            used.update(axes)
            dims.append(axes)
        return dims


def _entry(axes: Axes) -> str | Axes | None:
    """Axes of one dimension as a ``PartitionSpec`` entry."""
    return None if not axes else axes[0] if len(axes) == 1 else axes
