"""The compiled programs of a one-stage plan: initialise, train step, evaluate.

One train step is one ``jax.jit``: a loop over microbatches (``_microbatches``), gradients summed up unreduced under
zero 0 and 1 (``_copies``), sharded from zero 2; reduced to the zero-1 layout; the optimizer update in the zero-1
layout, parameters back in the zero-3 layout. A step that is not finite leaves the update out (``_guard``). The state is
donated.

A ``TrainState`` here is the *stored* state: parameters are the arrays of the stage's slots (runs of layers stacked).
``to_user`` and ``to_stored`` go between it and the *neutral* state, whose trees are the user's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from ..analysis import sample_count
from ._batches import BatchRows
from ._guard import StepMetrics, guarded, step_metrics
from ._layout import Role
from ._microbatches import fold_microbatches
from ._model import StageModel
from ._options import compiler_options
from ._placing import adopt_leaf
from ._regather import regather
from ._slots import Slot, abstract_stored, to_stored, to_user
from ._stored_optimizer import StoredOptimizer
from ._sums import GradientSums


class TrainState(NamedTuple):
    """Everything that a step changes, as pytrees of global arrays."""

    parameters: Any
    """Neutral: trained leaves, in the structure of the user's model. Stored: one array per slot."""
    optimizer: Any
    """Optax state over the parameters."""
    model_state: Any
    """All other leaves of the model (RNG counters, statistics), in the user's structure."""
    step: Any
    """int32 scalar: steps so far."""


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """Programs of one planned model under one optimizer."""

    model: StageModel
    optimizer: optax.GradientTransformation
    microbatches: int

    # --------------------------------------------------------------------------------------------------------- state
    @functools.cached_property
    def stored_optimizer(self) -> StoredOptimizer:
        """The optimizer over stored arrays."""
        return StoredOptimizer(self.optimizer, self.model.share.analysis.trace.parameters, self.model.slots)

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        """Where each leaf of the stored state lives."""
        places: TrainState = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return places

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shape, dtype and place of each leaf of the stored state."""
        whole, trace = self.model.mesh.replicated, self.model.share.analysis.trace
        return TrainState(
            parameters=abstract_stored(self.model.slots, jax.tree.leaves(trace.parameters), "parameter"),
            optimizer=self.stored_optimizer.abstract_state,
            model_state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), trace.state),
            step=jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        )

    @functools.cached_property
    def abstract_neutral_state(self) -> TrainState:
        """Shape, dtype and place of each leaf of the neutral state: where the plan keeps it, layer by layer."""
        stored, trace = self.abstract_state, self.model.share.analysis.trace
        places = {leaf: slot.user_sharding("parameter") for slot in self.model.slots for leaf in slot.leaves}
        leaves, structure = jax.tree.flatten(trace.parameters)
        placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[i]) for i, x in enumerate(leaves)]
        return stored._replace(
            parameters=jax.tree.unflatten(structure, placed), optimizer=self.stored_optimizer.abstract_user_state
        )

    def create(self, build: Callable[[], tuple[Any, Any]]) -> TrainState:
        """Build the stored state under jit, so that each device only ever holds its own shards.

        Args:
            build: Returns (parameters, model state) with fresh values; runs inside the jit.
        """

        def fresh() -> TrainState:
            parameters, state = build()
            return self._fresh_state(self._stored_parameters(parameters), state)

        state: TrainState = jax.jit(fresh, out_shardings=self.state_shardings)()
        return state

    def adopt(self, parameters: Any, model_state: Any) -> TrainState:
        """Place existing values; copies, so that the caller's arrays are never donated."""
        places = self.state_shardings
        leaves = jax.tree.leaves(parameters)
        stored = [_stored_copy(slot, [leaves[leaf] for leaf in slot.leaves]) for slot in self.model.slots]
        model_state = jax.tree.map(adopt_leaf, model_state, places.model_state)
        optimizer = jax.jit(self.stored_optimizer.init, out_shardings=places.optimizer)(stored)
        return TrainState(stored, optimizer, model_state, adopt_leaf(np.int32(0), places.step))

    @functools.cached_property
    def to_user(self) -> Callable[[TrainState], TrainState]:
        """The compiled function from the stored state to the neutral one."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_neutral_state)
        return jax.jit(self._neutral, in_shardings=(self.state_shardings,), out_shardings=places)

    @functools.cached_property
    def to_stored(self) -> Callable[[TrainState], TrainState]:
        """The compiled function from a neutral state, placed as ``abstract_neutral_state`` says, to the stored one."""
        return jax.jit(self._stored, out_shardings=self.state_shardings)

    @functools.cached_property
    def process_rows(self) -> tuple[int, ...]:
        """Rows of the global batch that this process's devices read, ascending."""
        return self._rows.read_by(enumerate(self._batch_shardings))

    def place_batch(self, leaves: list[Any]) -> list[Any]:
        """Put a global batch, or the rows ``process_rows`` of it, on the devices, microbatch by microbatch."""
        places = enumerate(zip(leaves, self._batch_shardings, strict=True))
        return [self._rows.place(i, leaf, place, self.process_rows) for i, (leaf, place) in places]

    # ------------------------------------------------------------------------------------------------------ programs
    @property
    def compiler_options(self) -> dict[str, bool | int]:
        """What XLA is told for every program below (see ``_options``)."""
        return compiler_options(self.model.mesh)

    @functools.cached_property
    def train(self) -> Callable[[TrainState, list[Any]], tuple[TrainState, StepMetrics]]:
        """The compiled train step: (state, batch leaves) to (new state, metrics)."""
        places = self.state_shardings
        return jax.jit(
            self._train,
            in_shardings=(places, self._batch_shardings),
            out_shardings=(places, self.model.mesh.replicated),  # the second one for all metrics
            donate_argnums=0,
            compiler_options=self.compiler_options,
        )

    @functools.cached_property
    def evaluate(self) -> Callable[[TrainState, list[Any]], jax.Array]:
        """The compiled loss of a batch, without update: (state, batch leaves) to mean loss."""
        return jax.jit(
            lambda state, batch: self._mean_loss(state, batch),
            in_shardings=(self.state_shardings, self._batch_shardings),
            out_shardings=self.model.mesh.replicated,
            compiler_options=self.compiler_options,
        )

    @functools.cached_property
    def gradients(self) -> Callable[[TrainState, list[Any]], tuple[jax.Array, list[Any]]]:
        """The compiled (mean loss, gradients by slot, in the zero-1 layout) of a batch: a step without its update."""
        return jax.jit(
            lambda state, batch: self._loss_and_gradients(state, batch)[:2],
            in_shardings=(self.state_shardings, self._batch_shardings),
            out_shardings=(self.model.mesh.replicated, self.model.parameter_shardings("optimizer")),
            compiler_options=self.compiler_options,
        )

    # ------------------------------------------------------------------------------------------------ traced functions
    def _train(self, state: TrainState, batch: list[Any]) -> tuple[TrainState, StepMetrics]:
        loss, gradients, model_state = self._loss_and_gradients(state, batch)
        parameters = self._constrain(state.parameters, "optimizer")
        metrics = step_metrics(loss, gradients)
        updated, optimizer = self.stored_optimizer.update(gradients, state.optimizer, parameters)
        before = (parameters, state.optimizer, state.model_state)
        parameters, optimizer, model_state = guarded(metrics.finite, (updated, optimizer, model_state), before)
        parameters = regather(self.model.slots, self._constrain(parameters, "optimizer"), state.parameters)
        return TrainState(parameters, optimizer, model_state, state.step + 1), metrics

    def _loss_and_gradients(self, state: TrainState, batch: list[Any]) -> tuple[jax.Array, list[Any], Any]:
        if self.microbatches == 1:
            grad = jax.value_and_grad(self._loss, has_aux=True)
            (loss, model_state), gradients = grad(state.parameters, state.model_state, batch)
            return loss, self._constrain(gradients, "optimizer"), model_state
        copied, parameters = self.model.copied, self.model.spread(state.parameters)
        sums = GradientSums.zero(parameters, self.model.sum_shardings, self.model.sums_in_place)

        def accumulate(carry: tuple[Any, Any, Any], index: Any, microbatch: list[Any]) -> tuple[Any, Any, Any]:
            losses, carried, model_state = carry
            # Else the compiler casts and gathers the weights of single layers before the loop, and keeps them over it.
            held, microbatch = jax.lax.optimization_barrier((parameters, microbatch))
            held = jax.lax.with_sharding_constraint(held, self.model.spread_shardings)  # gathered after, not before
            microbatch, losses = jax.lax.optimization_barrier((microbatch, losses))  # in its turn: docs/design/0079
            loss, pullback, model_state = jax.vjp(
                lambda p: self._loss(p, model_state, microbatch, model=copied), held, has_aux=True
            )
            carried, _ = sums.add(carried, pullback, jnp.ones_like(loss))
            return losses.at[index].set(loss), carried, model_state

        start = (jnp.zeros(self.microbatches, jnp.float32), sums.start, state.model_state)
        losses, carried, model_state = fold_microbatches(accumulate, start, batch, self.microbatches)
        reduced = self.model.united(self.model.reduce(sums.finish(carried)))
        mean = [array / self.microbatches for array in reduced]
        return jnp.mean(losses), mean, model_state

    def _mean_loss(self, state: TrainState, batch: list[Any]) -> jax.Array:
        if self.microbatches == 1:
            return self._loss(state.parameters, state.model_state, batch)[0]
        losses = jax.lax.map(lambda mb: self._loss(state.parameters, state.model_state, mb)[0], batch)
        return jnp.mean(losses)

    def _loss(
        self, parameters: list[Any], model_state: Any, batch: list[Any], *, model: StageModel | None = None
    ) -> tuple[jax.Array, Any]:
        leaves, structure = jax.tree.flatten(model_state)
        share = self.model.share
        results = (model or self.model).run(
            parameters, [leaves[i] for i in share.state], [batch[i] for i in share.batch]
        )
        return results.loss.astype(jnp.float32), jax.tree.unflatten(structure, results.state)

    def _fresh_state(self, parameters: list[Any], model_state: Any) -> TrainState:
        return TrainState(parameters, self.stored_optimizer.init(parameters), model_state, jnp.zeros((), jnp.int32))

    def _stored_parameters(self, parameters: Any) -> list[Any]:
        return to_stored(self.model.slots, dict(enumerate(jax.tree.leaves(parameters))))

    def _neutral(self, state: TrainState) -> TrainState:
        leaves = to_user(self.model.slots, state.parameters)
        structure = jax.tree.structure(self.model.share.analysis.trace.parameters)
        parameters = jax.tree.unflatten(structure, [leaves[i] for i in range(len(leaves))])
        return state._replace(parameters=parameters, optimizer=self.stored_optimizer.to_user(state.optimizer))

    def _stored(self, state: TrainState) -> TrainState:
        parameters = self._stored_parameters(state.parameters)
        return state._replace(parameters=parameters, optimizer=self.stored_optimizer.to_stored(state.optimizer))

    # --------------------------------------------------------------------------------------------------------- places
    @functools.cached_property
    def _batch_shardings(self) -> list[NamedSharding]:
        """Places of all batch leaves; those that nobody reads stand whole on every device."""
        places = dict(
            zip(self.model.share.batch, self.model.batch_shardings(microbatched=self.microbatches > 1), strict=True)
        )
        leaves = len(jax.tree.leaves(self.model.share.analysis.trace.batch))
        return [places.get(i, self.model.mesh.replicated) for i in range(leaves)]

    def _constrain(self, arrays: Sequence[Any], role: Role) -> list[Any]:
        placed: list[Any] = jax.lax.with_sharding_constraint(list(arrays), self.model.parameter_shardings(role))
        return placed

    @functools.cached_property
    def _rows(self) -> BatchRows:
        trace = self.model.share.analysis.trace
        samples = sample_count(trace.batch) or 1
        return BatchRows(samples * self.microbatches, self.microbatches, self.microbatches > 1, trace.has_samples)


def _stored_copy(slot: Slot, leaves: Sequence[Any]) -> jax.Array:
    """Return one stored array with the values of the user's ``leaves``; slot by slot: two copies never add up."""
    parts = [adopt_leaf(leaf, slot.user_sharding("parameter")) for leaf in leaves]
    if not slot.is_stacked and slot.view is None:
        return parts[0]
    places = slot.sharding("parameter")
    stored: jax.Array = jax.jit(
        lambda parts: to_stored([slot], dict(zip(slot.leaves, parts, strict=True)))[0], out_shardings=places
    )(parts)
    return stored
