"""Forward and backward programs of one pipeline stage, each a ``jax.jit`` on the stage's own devices.

The backward program runs no part of the forward pass again but what the plan's remat policies say: the forward program
hands on what ``jax.vjp`` keeps (the pullback is a pytree, its leaves are the residuals), less what the backward program
has anyway (see ``_residuals``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import NamedSharding

from ._mesh import StageMesh
from ._residuals import Residuals, sort_residuals

Arrays = list[Any]


class Boundary(NamedTuple):
    """A value that two neighbouring stages hand over."""

    shape: tuple[int, ...]
    dtype: Any
    gradient: bool
    """Its cotangent flows back."""
    wire: NamedSharding
    """Its layout on this stage's devices while it moves."""

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)


class StageFunction(Protocol):
    """A contiguous range of the model's layers as a pure function, and where its values live."""

    @property
    def stage(self) -> StageMesh:
        """The devices."""

    @property
    def arriving(self) -> Sequence[Boundary]:
        """Values from the stage before: made there or further up, read here or further down."""

    @property
    def leaving(self) -> Sequence[Boundary]:
        """Values for the next stage."""

    @property
    def parameters(self) -> Sequence[jax.ShapeDtypeStruct]:
        """The parameters that it reads."""

    @property
    def states(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Leaves of the model state that it reads or changes."""

    @property
    def batch(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Leaves of one microbatch that it reads."""

    @property
    def state_places(self) -> Sequence[NamedSharding]:
        """Where the state leaves live."""

    @property
    def accumulators(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Sums of gradients over microbatches, as ``spread`` parameters have them (with their shardings)."""

    def spread(self, parameters: Arrays) -> Arrays:
        """Give the parameters the form whose gradients need no reduction in every microbatch."""

    def run(self, parameters: Arrays, states: Arrays, batch: Arrays, arriving: Arrays) -> tuple[Arrays, Any, Arrays]:
        """Return (leaving values, loss on the last stage or None, new states) of one microbatch."""


class Kept(NamedTuple):
    """What one microbatch in flight holds on a stage."""

    residuals: Arrays
    """Made by the forward program."""
    held: Arrays
    """Arriving values and states that the backward program reads, by reference."""


class _Traced(NamedTuple):
    """The forward pass for training."""

    program: ClosedJaxpr
    pullback: Any
    """Structure of the pullback, a pytree whose leaves are the residuals."""
    residuals: Residuals


@dataclasses.dataclass(frozen=True)
class StagePair:
    """The compiled programs of one stage."""

    function: StageFunction
    microbatches: int

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """The compiled forward pass for training.

        (parameters, batch, microbatch, states, arriving, loss sum) to (leaving, states, residuals, loss sum). ``batch``
        has all microbatches along dimension 0, ``microbatch`` is an int32 scalar; the loss sum is donated.
        """
        return jax.jit(
            self._forward, donate_argnums=5, out_shardings=(self._leaving, self._states, None, self._replicated)
        )

    @functools.cached_property
    def backward(self) -> Callable[..., Any]:
        """The compiled backward pass.

        (parameters, batch, microbatch, kept, cotangents of leaving values, accumulators) to (accumulators, cotangents
        of arriving values); the accumulators are donated.
        """
        sums = [accumulator.sharding for accumulator in self.function.accumulators]
        return jax.jit(self._backward, donate_argnums=5, out_shardings=(sums, self._cotangents))

    @functools.cached_property
    def evaluate(self) -> Callable[..., Any]:
        """The compiled forward pass alone: as ``forward``, without residuals."""

        def run(
            parameters: Arrays, batch: Arrays, microbatch: Any, states: Arrays, arriving: Arrays, total: Any
        ) -> tuple[Arrays, Arrays, Any]:
            f = self.function
            leaving, loss, states = f.run(parameters, states, _at(batch, microbatch), arriving)
            return leaving, states, total if loss is None else total + loss

        return jax.jit(run, donate_argnums=5, out_shardings=(self._leaving, self._states, self._replicated))

    def kept(self, residuals: Arrays, states: Arrays, arriving: Arrays) -> Kept:
        """Return what the backward pass of a microbatch needs of its forward pass."""
        passing = [*states, *arriving]
        return Kept(residuals, [passing[i] for i in self._traced.residuals.held])

    # ------------------------------------------------------------------------------------------------ traced functions
    def _forward(
        self, parameters: Arrays, batch: Arrays, microbatch: Any, states: Arrays, arriving: Arrays, total: Any
    ) -> tuple[Arrays, Arrays, Arrays, Any]:
        traced = self._traced
        results = jaxpr_as_fun(traced.program)(*parameters, *batch, microbatch, *states, *arriving)
        counts = (len(self.function.leaving), len(self.function.states), 1)
        leaving, states, (loss,), residuals = _parts(results, counts)
        return leaving, states, [residuals[i] for i in traced.residuals.kept], total + loss

    def _backward(
        self, parameters: Arrays, batch: Arrays, microbatch: Any, kept: Kept, cotangents: Arrays, sums: Arrays
    ) -> tuple[Arrays, Arrays]:
        traced = self._traced
        leaves = traced.residuals.restore([*parameters, *batch, microbatch], kept.held, kept.residuals)
        pullback = jax.tree.unflatten(traced.pullback, leaves)
        gradients, arriving = pullback((cotangents, jnp.ones((), jnp.float32)))
        places = [accumulator.sharding for accumulator in self.function.accumulators]
        gradients = jax.lax.with_sharding_constraint(gradients, places)
        return [total + gradient for total, gradient in zip(sums, gradients, strict=True)], arriving

    @functools.cached_property
    def _traced(self) -> _Traced:
        f = self.function
        lasting = [*f.parameters, *self._stacked, jax.ShapeDtypeStruct((), jnp.int32)]
        passing = [*f.states, *(b.abstract for b in f.arriving)]
        trees: list[Any] = []

        def forward(*values: Any) -> Any:
            parameters, batch, (index,), states, arriving = _parts(
                values, (len(f.parameters), len(self._stacked), 1, len(f.states))
            )
            results, pullback = self._differentiate(parameters, _at(batch, index), states, arriving)
            residuals, tree = jax.tree.flatten(pullback)
            trees.append(tree)
            return *results, *residuals

        program = jax.make_jaxpr(forward)(*lasting, *passing)
        outputs = len(f.leaving) + len(f.states) + 1
        return _Traced(program, trees[-1], sort_residuals(program, outputs, len(lasting)))

    def _differentiate(self, parameters: Arrays, batch: Arrays, states: Arrays, arriving: Arrays) -> tuple[Any, Any]:
        """Return (leaving, states, loss) as one list, and the pullback of (leaving values with gradient, loss)."""
        f = self.function
        flows = [i for i, boundary in enumerate(f.arriving) if boundary.gradient]

        def run(spread: Arrays, differentiated: Arrays) -> tuple[tuple[Arrays, Any], Arrays]:
            values = list(arriving)
            for i, value in zip(flows, differentiated, strict=True):
                values[i] = value
            leaving, loss, new = f.run(spread, states, batch, values)
            loss = jnp.zeros((), jnp.float32) if loss is None else loss.astype(jnp.float32)
            moving = [v for v, boundary in zip(leaving, f.leaving, strict=True) if boundary.gradient]
            return (moving, loss), [*leaving, *new, loss]

        _, pullback, results = jax.vjp(run, f.spread(parameters), [arriving[i] for i in flows], has_aux=True)
        return results, pullback

    # --------------------------------------------------------------------------------------------------------- places
    @property
    def _stacked(self) -> list[jax.ShapeDtypeStruct]:
        """Batch leaves of all microbatches, along dimension 0."""
        return [jax.ShapeDtypeStruct((self.microbatches, *leaf.shape), leaf.dtype) for leaf in self.function.batch]

    @property
    def _leaving(self) -> list[NamedSharding]:
        return [boundary.wire for boundary in self.function.leaving]

    @property
    def _cotangents(self) -> list[NamedSharding]:
        return [boundary.wire for boundary in self.function.arriving if boundary.gradient]

    @property
    def _states(self) -> list[NamedSharding]:
        return list(self.function.state_places)

    @property
    def _replicated(self) -> NamedSharding:
        return self.function.stage.replicated


def _at(batch: Arrays, microbatch: Any) -> Arrays:
    """Take one microbatch of leaves that hold all of them."""
    return [jax.lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False) for leaf in batch]


def _parts(values: Sequence[Any], counts: Sequence[int]) -> list[Arrays]:
    """Cut ``values`` into lists of the given lengths, and what is left."""
    parts, position = [], 0
    for count in counts:
        parts.append(list(values[position : position + count]))
        position += count
    return [*parts, list(values[position:])]
