"""The border of attention under Ulysses: values that cross it change from sequence to heads or back, once."""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from ..analysis import Value
from ._layout import LayerLayout

EXCHANGED = "galvatron_exchanged"
"""Name of values that crossed the border; remat ``none`` keeps them, so that nothing crosses twice."""


class Border:
    """What has crossed so far, in one run of a layer."""

    def __init__(self, layout: LayerLayout) -> None:
        """Without Ulysses there is no border."""
        self._layout = layout
        self._attention = layout.kind.attention if layout.strategy.ulysses > 1 else None
        self._crossed: dict[int, Any] = {}

    def is_inside(self, position: int) -> bool:
        """Tell whether the equation at ``position`` runs inside."""
        return self._attention is not None and position in self._attention.inside

    def cross(self, array: Any, value: Value, *, inside: bool) -> Any:
        """Return ``array`` as a reader inside or outside wants it."""
        attention = self._attention
        if attention is None or id(value) not in (attention.entering if inside else attention.leaving):
            return array
        return self._exchanged(array, value, inside=inside)

    def cross_at_kernel(self, array: Any, value: Value, *, inside: bool) -> Any:
        """Return what a kernel for all of attention reads (inside), or what it made as the layer reads it."""
        return array if self._attention is None else self._exchanged(array, value, inside=inside)

    def _exchanged(self, array: Any, value: Value, *, inside: bool) -> Any:
        if id(value) not in self._crossed:
            # Both sides are pinned, for the cotangent too: else the exchange drifts into the operations around it.
            left = jax.lax.with_sharding_constraint(array, self._layout.value(value, inside=not inside))
            arrived = jax.lax.with_sharding_constraint(left, self._layout.value(value, inside=inside))
            self._crossed[id(value)] = checkpoint_name(arrived, EXCHANGED)
        return self._crossed[id(value)]
