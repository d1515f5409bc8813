"""A stage's share of the model under its plan, as a pure function of arrays; and where each array lives.

This is what every program of the runtime is built from: the one-stage train step and the programs of a pipeline. A
stage is a contiguous range of the cut program's segments on its own mesh; a one-stage plan is the range of all.

    stage = plan_stages(analysis, plan, meshes)[k]

    run         (parameters, state, batch, arriving) -> (leaving, loss or None, state)       pure, differentiable
    parameters  one stored array per ``stage.slots`` entry: a leaf of the user's tree, or the same leaf of a run of
                layers stacked. A leaf that several stages hold (tied) is a slot of its own on each; the sum of their
                gradients is its gradient.
    state       the model-state leaves ``stage.share.state``
    batch       the leaves ``stage.share.batch`` of one microbatch
    arriving    the values ``stage.share.arriving`` on the wire (``arriving_shardings``); ``leaving`` likewise, equal in
                order, shape, dtype and spec to ``arriving`` of the stage after. Those without ``Crossing.gradient``
                have no cotangent.

``vjp`` of ``run`` with respect to (parameters, arriving values with a gradient) is the backward pass.

Between two layers the stream is put into the layout of the next layer (``_relayout``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal
from jax.sharding import NamedSharding, PartitionSpec

from ..analysis import run_equation
from ._layers import StageLayers
from ._share import Crossing, program_leaves
from ._walk import Environment, Walk, placed
from ._wire import wire_spec


class StageResults(NamedTuple):
    """What a stage computes from one microbatch."""

    leaving: list[Any]
    """The values ``share.leaving``, on the wire."""
    loss: Any
    """The loss, a scalar in the user's dtype; None on all stages but the last."""
    state: list[Any]
    """New values of the model-state leaves ``share.state``."""


@dataclasses.dataclass(frozen=True)
class StageModel(StageLayers):
    """One stage's share of an analysed model, with a layout for every segment (see the module docstring)."""

    # ------------------------------------------------------------------------------------------------------- running
    def run(
        self, parameters: Sequence[Any], state: Sequence[Any], batch: Sequence[Any], arriving: Sequence[Any] = ()
    ) -> StageResults:
        """Run the stage on one microbatch; see the module docstring for the arguments."""
        environment, stacked = self._environment(parameters, state, batch, arriving)
        Walk(self, environment, stacked).through(self.pieces)
        program = self.share.analysis.cut.source
        leaving = [self._to_wire(environment[c.variable], c) for c in self.share.leaving]
        loss = _read(environment, program.outputs[0]) if self.share.makes_loss else None
        return StageResults(leaving, loss, [_read(environment, program.outputs[1 + i]) for i in self.share.state])

    def _environment(
        self, parameters: Sequence[Any], state: Sequence[Any], batch: Sequence[Any], arriving: Sequence[Any]
    ) -> tuple[Environment, Environment]:
        """Return what is known before the first segment runs; and the stacked parameters, by their first variable."""
        share, leaves = self.share, program_leaves(self.share.analysis)
        environment: Environment = dict(share.analysis.cut.source.constants)
        stacked: Environment = {}
        for slot, array in zip(self.slots, parameters, strict=True):
            (stacked if slot.is_stacked else environment)[leaves.parameters[slot.leaves[0]]] = array
        environment.update(zip([leaves.state[i] for i in share.state], state, strict=True))
        environment.update(zip([leaves.batch[i] for i in share.batch], batch, strict=True))
        environment.update(zip([c.variable for c in share.arriving], arriving, strict=True))
        for equation in share.remade:
            results = run_equation(equation.eqn, [_read(environment, v) for v in equation.inputs])
            environment.update(zip(equation.outputs, results, strict=True))
        return environment, stacked

    # -------------------------------------------------------------------------------------------------------- places
    @property
    def state_shardings(self) -> list[NamedSharding]:
        """Model state is small and stands whole on every device."""
        return [self.mesh.replicated] * len(self.share.state)

    def batch_shardings(self, *, microbatched: bool = False) -> list[NamedSharding]:
        """Return where each leaf of ``share.batch`` is fed: dimension 0 over the data axes of its first reader.

        Args:
            microbatched: Leaves have a leading microbatch dimension.
        """
        return [self._batch_sharding(leaf, microbatched) for leaf in self.share.batch]

    @functools.cached_property
    def arriving_shardings(self) -> list[NamedSharding]:
        """Where the values ``share.arriving`` stand when they enter: on the wire."""
        return [self._wire(crossing) for crossing in self.share.arriving]

    @functools.cached_property
    def leaving_shardings(self) -> list[NamedSharding]:
        """Where the values ``share.leaving`` stand when they leave: on the wire."""
        return [self._wire(crossing) for crossing in self.share.leaving]

    def _batch_sharding(self, leaf: int, microbatched: bool) -> NamedSharding:
        variable = program_leaves(self.share.analysis).batch[leaf]
        if not self.share.analysis.trace.has_samples[leaf]:
            return self.mesh.replicated
        pairs = zip(self.share.segments, self.layouts, strict=True)
        first = next((layout for segment, layout in pairs if variable in segment.inputs), self.layouts[0])
        axes = self.mesh.data_axes(first.strategy) or None
        return self.mesh.sharding(PartitionSpec(*[None] * microbatched, axes))

    def _wire(self, crossing: Crossing) -> NamedSharding:
        analysis = self.share.analysis
        kind = analysis.kinds[analysis.cut.segments[crossing.maker].kind]
        return self.mesh.sharding(wire_spec(self.mesh, kind, kind.layer.outputs[crossing.output]))

    def _to_wire(self, value: Any, crossing: Crossing) -> Any:
        return placed(value, self._wire(crossing))


def _read(environment: Environment, atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else environment[atom]
