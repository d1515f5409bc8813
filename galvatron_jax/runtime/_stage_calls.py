"""How the executor calls the programs of a pipeline stage, as shapes: enough to compile them, nothing is run.

``forward`` and ``backward`` are called once per microbatch, the others once per step. What a forward program keeps for
the backward program (its residuals) lies where the compiler puts it, so ``backward`` asks for the compiled places.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ._model import StageModel
from ._passes import Kept
from ._pipeline_stage import Gradients, PipelineStage, StageState
from ._planned_pipeline import PlannedPipeline
from ._share import Crossing, StageShare

Arrays = list[jax.ShapeDtypeStruct]


class Call(NamedTuple):
    """A jitted program and what it is called with."""

    program: Any
    arguments: tuple[Any, ...]

    def lower(self) -> jax.stages.Lowered:
        """Trace and lower the program."""
        lowered: jax.stages.Lowered = self.program.lower(*self.arguments)
        return lowered


@dataclasses.dataclass(frozen=True)
class StageCalls:
    """The calls of one stage of a planned pipeline."""

    pipeline: PlannedPipeline
    number: int

    @property
    def stage(self) -> PipelineStage:
        """The stage."""
        return self.pipeline.stages[self.number]

    @property
    def share(self) -> StageShare:
        """Its share of the model."""
        return self._model.share

    # ------------------------------------------------------------------------------------------------- per microbatch
    def forward(self) -> Call:
        """Return the call of the forward pass."""
        arguments = (self.state.parameters, self.batch, self._index, self.state.model_state, self.arriving, self._loss)
        return Call(self.stage.passes.forward, arguments)

    def backward(self, residuals: Arrays) -> Call:
        """Return the call of the backward pass; ``residuals`` as the compiled forward pass returns them."""
        kept = self.kept(residuals)
        cotangents = [array for array, c in zip(self.leaving, self.share.leaving, strict=True) if c.gradient]
        arguments = (self.state.parameters, self.batch, self._index, kept, cotangents, self.stage.passes.sums)
        return Call(self.stage.passes.backward, arguments)

    def residuals(self, compiled: jax.stages.Compiled) -> Arrays:
        """Return the residuals of the compiled forward pass of this stage, or of one that is equal to it."""
        shapes = jax.eval_shape(self.stage.passes.forward, *self.forward().arguments)[2]
        places: Any = compiled.output_shardings
        pairs = zip(shapes, places[2], strict=True)
        return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf, place in pairs]

    def kept(self, residuals: Arrays) -> Kept:
        """Return what one microbatch in flight holds, the values that it refers to among it."""
        return self.stage.passes.kept(residuals, self.state.model_state, self.arriving)

    # --------------------------------------------------------------------------------------------------- once per step
    def gradients(self) -> Call:
        """Return the call of the end of the passes."""
        return Call(self.stage.gradients, (self._loss, *self.stage.passes.sums))

    def exports(self) -> Iterator[Call]:
        """Yield the call of each round of exchange."""
        for number, lengths in enumerate(self.pipeline.export_lengths):
            length = lengths[self.number // len(self.pipeline.slices)]
            arguments = (*self.found, self.state, self._vectors(number), length)
            yield Call(self.stage.exports(self.pipeline.known), arguments)

    def update(self) -> Call:
        """Return the call of the update."""
        vectors = self._vectors(len(self.pipeline.export_lengths))
        arguments = (*self.found, self.state, self.state.model_state, vectors)
        return Call(self.stage.update(self.pipeline.known), arguments)

    # ---------------------------------------------------------------------------------------------------------- shapes
    @functools.cached_property
    def state(self) -> StageState:
        """What the stage keeps from step to step."""
        trace, cut = self.pipeline.analysis.trace, self.pipeline.cut
        parameters, state = dict(enumerate(jax.tree.leaves(trace.parameters))), jax.tree.leaves(trace.state)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        shapes = jax.eval_shape(self.stage.stored_state, parameters, jax.tree.leaves(cut.state), state, step)
        placed: StageState = jax.tree.map(_placed, shapes, self.stage.state_shardings)
        return placed

    @functools.cached_property
    def batch(self) -> Arrays:
        """Batch leaves of the stage, all microbatches along dimension 0."""
        leaves = jax.tree.leaves(self.pipeline.analysis.trace.batch)
        places, count = self.pipeline.batch_places[self.number % len(self.pipeline.slices)], self._microbatches
        return [
            jax.ShapeDtypeStruct((count, *leaves[i].shape), leaves[i].dtype, sharding=places[i])
            for i in self.share.batch
        ]

    @property
    def arriving(self) -> Arrays:
        """Values of one microbatch from the stage before."""
        return _on_wire(self.share.arriving, self._model.arriving_shardings)

    @property
    def leaving(self) -> Arrays:
        """Values of one microbatch for the stage after."""
        return _on_wire(self.share.leaving, self._model.leaving_shardings)

    @property
    def found(self) -> tuple[Gradients, Arrays]:
        """Mean gradients, and those that arrive from stages that mirror a parameter of this one."""
        stage, slots = self.stage, self._model.slots
        shapes = jax.eval_shape(stage.passes.reduce, stage.passes.sums)
        means = [_placed(x, place) for x, place in zip(shapes, stage.gradient_places, strict=True)]
        tied = [_placed(means[tie.owner_slot], slots[tie.owner_slot].sharding("optimizer")) for tie in stage.owned_ties]
        return Gradients(means, self._loss), tied

    def _vectors(self, rounds: int) -> list[list[jax.ShapeDtypeStruct]]:
        whole, slices = self._model.mesh.replicated, len(self.pipeline.slices)
        return [
            [jax.ShapeDtypeStruct((slices, length), jnp.float32, sharding=whole) for length in lengths]
            for lengths in self.pipeline.export_lengths[:rounds]
        ]

    @property
    def _model(self) -> StageModel:
        return self.stage.model

    @property
    def _microbatches(self) -> int:
        return self.stage.passes.microbatches

    @property
    def _index(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.int32, sharding=self._model.mesh.replicated)

    @property
    def _loss(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), jnp.float32, sharding=self._model.mesh.replicated)


def local_bytes(tree: Any) -> int:
    """Return the bytes on one device of all arrays with a place in ``tree``."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _on_wire(crossings: Sequence[Crossing], places: Sequence[NamedSharding]) -> Arrays:
    return [_placed(crossing.variable.aval, place) for crossing, place in zip(crossings, places, strict=True)]


def _placed(array: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)
