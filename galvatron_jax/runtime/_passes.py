"""Forward and backward programs of one pipeline stage, each a ``jax.jit`` on the stage's own devices.

The backward program runs no part of the forward pass again but what the plan's remat policies say: the forward program
hands on what ``jax.vjp`` keeps (the pullback is a pytree, its leaves are the residuals), less what the backward program
has anyway (see ``_residuals``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import NamedSharding

from ._model import StageModel
from ._options import compiler_options
from ._residuals import Residuals, sort_residuals
from ._slots import abstract_stored
from ._sums import GradientSums

Arrays = list[Any]


class Kept(NamedTuple):
    """What one microbatch in flight holds on a stage."""

    residuals: Arrays
    """Made by the forward program."""
    held: Arrays
    """Arriving values and model state that the backward program reads, by reference."""


class _Traced(NamedTuple):
    """The forward pass for training."""

    program: ClosedJaxpr
    pullback: Any
    """Structure of the pullback, a pytree whose leaves are the residuals."""
    residuals: Residuals


@dataclasses.dataclass(frozen=True)
class StagePasses:
    """The compiled passes of one stage."""

    model: StageModel
    microbatches: int

    @functools.cached_property
    def forward(self) -> Callable[..., Any]:
        """The compiled forward pass for training.

        (parameters, batch, microbatch, state, arriving, loss sum) to (leaving, state, residuals, loss sum). ``batch``
        has all microbatches along dimension 0, ``microbatch`` is an int32 scalar; the loss sum is donated.
        """
        m = self.model
        places = (m.leaving_shardings, m.state_shardings, None, m.mesh.replicated)
        return self._jit(self._forward, places)

    @functools.cached_property
    def backward(self) -> Callable[..., Any]:
        """The compiled backward pass.

        (parameters, batch, microbatch, kept, cotangents of leaving values, gradient sums) to (gradient sums, cotangents
        of arriving values); the sums are donated.
        """
        places = (self._sum_places, [self.model.arriving_shardings[i] for i in self._flows])
        return self._jit(self._backward, places, keep_unused=True)  # of one microbatch, nothing reads the sums

    @functools.cached_property
    def evaluate(self) -> Callable[..., Any]:
        """The compiled forward pass alone.

        (parameters, batch, microbatch, state, arriving, loss sum) to (leaving, loss sum).
        """

        def run(
            parameters: Arrays, batch: Arrays, microbatch: Any, state: Arrays, arriving: Arrays, total: Any
        ) -> tuple[Arrays, Any]:
            results = self.model.run(parameters, state, _at(batch, microbatch), arriving)
            return results.leaving, total + _float32(results.loss)

        return self._jit(run, (self.model.leaving_shardings, self.model.mesh.replicated))

    @functools.cached_property
    def begin(self) -> Callable[[], tuple[Arrays, Any]]:
        """The compiled start of a step: gradient sums and loss sum of zero."""

        def zeros() -> tuple[Arrays, Any]:
            return [jnp.zeros(a.shape, a.dtype) for a in self.sums], jnp.zeros((), jnp.float32)

        return jax.jit(zeros, out_shardings=(self._sum_places, self.model.mesh.replicated))

    def _jit(self, function: Callable[..., Any], places: Any, *, keep_unused: bool = False) -> Callable[..., Any]:
        """Compile a pass: its sixth argument, the running sums, is donated."""
        options = compiler_options(self.model.mesh)
        return jax.jit(
            function, donate_argnums=5, out_shardings=places, keep_unused=keep_unused, compiler_options=options
        )

    def kept(self, residuals: Arrays, state: Arrays, arriving: Arrays) -> Kept:
        """Return what the backward pass of a microbatch needs of its forward pass."""
        passing = [*state, *arriving]
        return Kept(residuals, [passing[i] for i in self._traced.residuals.held])

    @functools.cached_property
    def sums(self) -> list[jax.ShapeDtypeStruct]:
        """Shape, dtype and place of each gradient sum: as the model's ``spread`` makes parameters."""
        spread = jax.eval_shape(self._spread, self._parameters)
        pairs = zip(spread, self._sum_places, strict=True)
        return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf, place in pairs]

    def reduce(self, sums: Arrays) -> Arrays:
        """Return the reduced gradients, placed as ``reduced_places`` says, from sums over microbatches."""
        if self._is_spread:
            return self.model.reduce(sums)
        placed: Arrays = jax.lax.with_sharding_constraint(sums, self.reduced_places)
        return placed

    @property
    def reduced_places(self) -> list[NamedSharding]:
        """Where reduced gradients live."""
        return self.model.reduced_shardings if self._is_spread else self.model.parameter_shardings("optimizer")

    def united(self, reduced: Arrays) -> Arrays:
        """Return one array, where the optimizer is, for each that ``reduce`` left as equal copies."""
        return self.model.united(reduced) if self._is_spread else reduced

    # ------------------------------------------------------------------------------------------------ traced functions
    def _forward(
        self, parameters: Arrays, batch: Arrays, microbatch: Any, state: Arrays, arriving: Arrays, total: Any
    ) -> tuple[Arrays, Arrays, Arrays, Any]:
        share = self.model.share
        results = jaxpr_as_fun(self._traced.program)(*parameters, *batch, microbatch, *state, *arriving)
        leaving, state, (loss,), residuals = _parts(results, (len(share.leaving), len(share.state), 1))
        return leaving, state, [residuals[i] for i in self._traced.residuals.kept], total + loss

    def _backward(
        self, parameters: Arrays, batch: Arrays, microbatch: Any, kept: Kept, cotangents: Arrays, sums: Arrays
    ) -> tuple[Arrays, Arrays]:
        leaves = self._traced.residuals.restore([*parameters, *batch, microbatch], kept.held, kept.residuals)
        pullback = jax.tree.unflatten(self._traced.pullback, leaves)
        if self.microbatches == 1:  # the sums are zero: their memory is the gradients'
            gradients, arriving = pullback((cotangents, jnp.ones((), jnp.float32)))
            return jax.lax.with_sharding_constraint(gradients, self._sum_places), arriving
        added = GradientSums(sums, self._sum_places, self.model.sums_in_place)
        cotangent = cotangents, jnp.ones((), jnp.float32)
        carried, arriving = added.add(added.start, pullback, cotangent, arriving=len(self._flows))
        return added.finish(carried), arriving

    @functools.cached_property
    def _traced(self) -> _Traced:
        share, parameters = self.model.share, self._parameters
        batch, state, arriving = self._batch, self._state, [_abstract(c.variable) for c in share.arriving]
        trees: list[Any] = []

        def forward(*values: Any) -> Any:
            counts = (len(parameters), len(batch), 1, len(state))
            weights, batch_values, (index,), state_values, arriving_values = _parts(values, counts)
            results, pullback = self._differentiate(weights, _at(batch_values, index), state_values, arriving_values)
            residuals, tree = jax.tree.flatten(pullback)
            trees.append(tree)
            return *results, *residuals

        lasting = [*parameters, *batch, jax.ShapeDtypeStruct((), jnp.int32)]
        program = jax.make_jaxpr(forward)(*lasting, *state, *arriving)
        results = len(share.leaving) + len(share.state) + 1
        return _Traced(program, trees[-1], sort_residuals(program, results, len(lasting)))

    def _differentiate(self, parameters: Arrays, batch: Arrays, state: Arrays, arriving: Arrays) -> tuple[Arrays, Any]:
        """Return leaving values, state and loss, and the pullback of (leaving values with a gradient, loss)."""
        model = self.model.copied if self._is_spread else self.model

        def run(parameters: Arrays, differentiated: Arrays) -> tuple[tuple[Arrays, Any], Arrays]:
            values = list(arriving)
            for i, value in zip(self._flows, differentiated, strict=True):
                values[i] = value
            results = model.run(parameters, state, batch, values)
            loss = _float32(results.loss)
            moving = [v for v, c in zip(results.leaving, self.model.share.leaving, strict=True) if c.gradient]
            return (moving, loss), [*results.leaving, *results.state, loss]

        spread = self._spread(parameters)
        _, pullback, results = jax.vjp(run, spread, [arriving[i] for i in self._flows], has_aux=True)
        return results, pullback

    # --------------------------------------------------------------------------------------------------------- shapes
    @property
    def _flows(self) -> list[int]:
        """Positions of the arriving values whose cotangent flows back."""
        return [i for i, crossing in enumerate(self.model.share.arriving) if crossing.gradient]

    @property
    def _is_spread(self) -> bool:
        """Every data-parallel rank sums up gradients of its own, unless there is nothing to sum up."""
        return self.microbatches > 1

    def _spread(self, parameters: Arrays) -> Arrays:
        return self.model.spread(parameters) if self._is_spread else parameters

    @property
    def _sum_places(self) -> list[NamedSharding]:
        return self.model.sum_shardings if self._is_spread else self.reduced_places

    @property
    def _parameters(self) -> list[jax.ShapeDtypeStruct]:
        leaves = jax.tree.leaves(self.model.share.analysis.trace.parameters)
        return abstract_stored(self.model.slots, leaves, "parameter")

    @property
    def _batch(self) -> list[jax.ShapeDtypeStruct]:
        """Batch leaves of all microbatches, along dimension 0."""
        leaves = jax.tree.leaves(self.model.share.analysis.trace.batch)
        return [
            jax.ShapeDtypeStruct((self.microbatches, *leaves[i].shape), leaves[i].dtype) for i in self.model.share.batch
        ]

    @property
    def _state(self) -> list[jax.ShapeDtypeStruct]:
        leaves = jax.tree.leaves(self.model.share.analysis.trace.state)
        return [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in self.model.share.state]


def _at(batch: Arrays, microbatch: Any) -> Arrays:
    """Take one microbatch of leaves that hold all of them."""
    return [jax.lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False) for leaf in batch]


def _float32(loss: Any) -> Any:
    """Return the loss as it is summed; zero on a stage that makes none."""
    return jnp.zeros((), jnp.float32) if loss is None else loss.astype(jnp.float32)


def _abstract(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _parts(values: Sequence[Any], counts: Sequence[int]) -> list[Arrays]:
    """Cut ``values`` into lists of the given lengths, and what is left."""
    parts, position = [], 0
    for count in counts:
        parts.append(list(values[position : position + count]))
        position += count
    return [*parts, list(values[position:])]
