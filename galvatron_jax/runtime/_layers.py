"""The layers of a stage: how they are grouped, where their parameters live, and how gradients are reduced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

from jax.sharding import NamedSharding

from ..analysis import Variable
from ._copies import Copies, unreduced_axes, unreduced_by_parameter
from ._cycles import Cycle, fold_runs
from ._kept import Kept
from ._layout import LayerLayout, Role
from ._mesh import Axes, StageMesh
from ._runs import Run, find_runs, private_parameters
from ._scatter import reduce_sums, reduced_shardings, united
from ._segment import Reduction, SegmentFunction, build_segment
from ._share import StageShare, program_leaves
from ._slots import Slot, make_slots

_FunctionKey = tuple[int, bool, Reduction, frozenset[int], tuple[tuple[int, Kept], ...]]
"""What the function of a layer depends on."""


@dataclasses.dataclass(frozen=True)
class StageLayers:
    """The segments of one stage, with a layout for each of them."""

    share: StageShare
    mesh: StageMesh
    layouts: tuple[LayerLayout, ...]
    """One per segment of the share, in order; equal (kind, strategy) share one object."""
    gradient_role: Role = "gradient"
    """Where gradients are put as they are made: a step that updates at once puts them where the optimizer is."""
    reduces_in_float32: bool = False
    """Gradients are reduced over data-parallel ranks in the parameters' storage dtype, not in the compute dtype."""
    is_copied: bool = False
    """Parameters come as ``spread`` makes them, with a copy per data-parallel rank where that spares reductions."""

    # -------------------------------------------------------------------------------------------------------- pieces
    @functools.cached_property
    def pieces(self) -> tuple[Run | Cycle, ...]:
        """The segments as single layers, loops over layers, and loops over turns of these."""
        cut = self.share.analysis.cut
        parameters = private_parameters(program_leaves(self.share.analysis).parameters, cut.segments)
        runs = find_runs(self.share.first, self.share.segments, self.layouts, parameters)
        results = {v for v in cut.source.outputs if isinstance(v, Variable)}
        return fold_runs(runs, parameters, cut.segments, results)

    def function(self, run: Run, *, in_loop: bool) -> SegmentFunction:
        """Return one layer of ``run`` as a function under its layout (see ``build_segment``)."""
        key = (id(run.layout), in_loop, self._reduction(run), run.rows, self._kept(run))
        if key not in self._functions:
            self._functions[key] = build_segment(
                run.layout, in_loop=in_loop, reduction=key[2], rows=run.rows, kept=dict(key[4])
            )
        return self._functions[key]

    def _kept(self, run: Run) -> tuple[tuple[int, Kept], ...]:
        """Parameters of a run's layers (by position) that are stored as another layer wants them."""
        reduction, found = self._reduction(run), []
        for position, index in enumerate(run.layout.kind.layer.parameters):
            slot = self._slot_of[run.segments[0].inputs[index]]
            if slot.layout is not None and slot.layout is not run.layout:
                found.append((position, Kept.of(slot.layout, slot.position, reduction.role_of(position))))
        return tuple(found)

    def read_outside(self, run: Run) -> set[Variable]:
        """Return what segments outside ``run`` read, and the program's results."""
        cut = self.share.analysis.cut
        inside = {id(segment) for segment in run.segments}
        read = {v for segment in cut.segments if id(segment) not in inside for v in segment.inputs}
        return read | {v for v in cut.source.outputs if isinstance(v, Variable)}

    # -------------------------------------------------------------------------------------------------------- places
    @functools.cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The stored parameter arrays, in order."""
        variables = program_leaves(self.share.analysis).parameters
        return make_slots(self.mesh, self.pieces, self.share.parameters, variables)

    @functools.cached_property
    def _slot_of(self) -> dict[Variable, Slot]:
        """The slot of each parameter, by its variable."""
        variables = program_leaves(self.share.analysis).parameters
        return {variables[leaf]: slot for slot in self.slots for leaf in slot.leaves}

    def parameter_shardings(self, role: Role) -> list[NamedSharding]:
        """Return where each stored array (or its gradient, or its optimizer state) lives."""
        return [slot.sharding(role) for slot in self.slots]

    # -------------------------------------------------------------------------------------------------------- copies
    @functools.cached_property
    def copied(self) -> Self:
        """The same stage with a copy of its parameters per data-parallel rank: gradients are summed up unreduced."""
        return dataclasses.replace(self, is_copied=True)

    def spread(self, parameters: Sequence[Any]) -> list[Any]:
        """Return the parameters that ``copied.run`` takes: no bytes move, and no device holds more than before."""
        return [
            copies.spread(slot.by_turn(array), slot.leaf_sharding("parameter"), lead=len(slot.lead))
            if copies
            else array
            for slot, array, copies in zip(self.slots, parameters, self._slot_copies, strict=True)
        ]

    def reduce(self, sums: Sequence[Any]) -> list[Any]:
        """Return gradients of the stored arrays from gradients of ``spread`` ones: the reduction over the ranks.

        They are put where the optimizer is, so that zero 1 scatters what it reduces; but see ``united``.
        """
        return reduce_sums(self.slots, sums, self._slot_copies)

    @property
    def reduced_shardings(self) -> list[NamedSharding]:
        """Where ``reduce`` leaves gradients."""
        return reduced_shardings(self.slots, self._slot_copies)

    def united(self, reduced: Sequence[Any]) -> list[Any]:
        """Return what ``reduce`` leaves as equal copies as one array each, where the optimizer is."""
        return united(self.slots, reduced, self._slot_copies)

    @functools.cached_property
    def spread_shardings(self) -> list[NamedSharding]:
        """Where ``spread`` arrays live."""
        return [
            copies.place(slot.leaf_sharding("parameter"), lead=len(slot.lead)) if copies else slot.sharding("parameter")
            for slot, copies in zip(self.slots, self._slot_copies, strict=True)
        ]

    @functools.cached_property
    def sum_shardings(self) -> list[NamedSharding]:
        """Where sums of the gradients of ``spread`` arrays live."""
        return [
            copies.place(slot.leaf_sharding("gradient"), lead=len(slot.lead))
            if copies
            else slot.sharding(self.gradient_role)
            for slot, copies in zip(self.slots, self._slot_copies, strict=True)
        ]

    @property
    def sums_in_place(self) -> list[bool]:
        """Which gradients of ``spread`` arrays are reduced by nobody before the last microbatch (see ``_sums``)."""
        copied = zip(self.slots, self._slot_copies, strict=True)
        return [bool(copies) and slot.layout is not None and slot.layout.strategy.zero <= 1 for slot, copies in copied]

    # ----------------------------------------------------------------------------------------------------- gradients
    @functools.cached_property
    def gradient_places(self) -> dict[Variable, NamedSharding]:
        """Where the gradient of each stored array is put, by the variable of its first leaf."""
        variables = program_leaves(self.share.analysis).parameters
        places = self.sum_shardings if self.is_copied else self.parameter_shardings(self.gradient_role)
        return {variables[slot.leaves[0]]: place for slot, place in zip(self.slots, places, strict=True)}

    def row_place(self, run: Run, position: int) -> NamedSharding:
        """Return where the gradient of one layer's parameter is put inside a loop."""
        if position in self._reduction(run).spread:
            return Copies(run.layout, unreduced_axes(run.layout)).place(run.layout.stored(position, "gradient"))
        return run.layout.stored(position, self.gradient_role)

    def _reduction(self, run: Run) -> Reduction:
        """How gradients of a run's layers are reduced."""
        if not self.is_copied:
            return Reduction(self.gradient_role, in_float32=self.reduces_in_float32)
        leaf_of = {v: i for i, v in enumerate(program_leaves(self.share.analysis).parameters)}
        leaves = [leaf_of[run.segments[0].inputs[index]] for index in run.layout.kind.layer.parameters]
        spread = frozenset(position for position, leaf in enumerate(leaves) if leaf in self._copied_leaves)
        return Reduction(self.gradient_role, spread, in_float32=self.reduces_in_float32)

    @functools.cached_property
    def _slot_copies(self) -> list[Copies | None]:
        """The copies of each slot; None where there is one array for all ranks."""
        return [
            Copies(slot.layout, unreduced_axes(slot.layout))
            if slot.layout is not None and slot.leaves[0] in self._copied_leaves
            else None
            for slot in self.slots
        ]

    @functools.cached_property
    def _copied_leaves(self) -> frozenset[int]:
        """Parameter leaves that every layer that reads them can read as copies, along the same axes."""
        leaf_of = {v: i for i, v in enumerate(program_leaves(self.share.analysis).parameters)}
        wanted: dict[int, set[Axes]] = {leaf: set() for leaf in self.share.parameters}
        unreduced = {id(layout): unreduced_by_parameter(layout) for layout in {id(x): x for x in self.layouts}.values()}
        for segment, layout in zip(self.share.segments, self.layouts, strict=True):
            for index, axes in zip(layout.kind.layer.parameters, unreduced[id(layout)], strict=True):
                wanted[leaf_of[segment.inputs[index]]].add(axes)
        return frozenset(leaf for leaf, axes in wanted.items() if len(axes) == 1 and () not in axes)

    @functools.cached_property
    def _functions(self) -> dict[_FunctionKey, SegmentFunction]:
        return {}
