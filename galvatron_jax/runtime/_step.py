"""The compiled programs of a one-stage plan: initialise, train step, evaluate.

One train step is one ``jax.jit``: a scan over microbatches of ``value_and_grad``, gradients accumulated in their zero-2
layout, then the optimizer update in the zero-1 layout, parameters back in the zero-3 layout. A step that is not finite
leaves the update out (``_guard``). The state is donated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from ._guard import StepMetrics, guarded, step_metrics
from ._layout import Role
from ._model import PlannedModel


class TrainState(NamedTuple):
    """Everything that a step changes, as pytrees of global arrays."""

    parameters: Any
    """Trained leaves, in the structure of the user's model."""
    optimizer: Any
    """Optax state."""
    model_state: Any
    """All other leaves of the model (RNG counters, statistics)."""
    step: Any
    """int32 scalar: steps so far."""


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """Programs of one planned model under one optimizer."""

    model: PlannedModel
    optimizer: optax.GradientTransformation
    microbatches: int

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        """Where each leaf of the state lives."""
        trace, whole = self.model.analysis.trace, self.model.stage.replicated
        abstract = jax.eval_shape(self.optimizer.init, trace.parameters)
        optimizer = optax.tree_map_params(
            self.optimizer,
            lambda _, place: place,
            abstract,
            self._tree("optimizer"),
            transform_non_params=lambda _: whole,
        )
        return TrainState(
            parameters=self._tree("parameter"),
            optimizer=optimizer,
            model_state=jax.tree.map(lambda _: whole, trace.state),
            step=whole,
        )

    def create(self, build: Callable[[], tuple[Any, Any]]) -> TrainState:
        """Build the state under jit, so that each device only ever holds its own shards.

        Args:
            build: Returns (parameters, model state) with fresh values; runs inside the jit.
        """

        def fresh() -> TrainState:
            parameters, state = build()
            return TrainState(parameters, self.optimizer.init(parameters), state, jnp.zeros((), jnp.int32))

        state: TrainState = jax.jit(fresh, out_shardings=self.state_shardings)()
        return state

    def adopt(self, parameters: Any, model_state: Any) -> TrainState:
        """Place existing values; copies, so that the caller's arrays are never donated."""
        places = self.state_shardings
        parameters = jax.tree.map(_copied, parameters, places.parameters)
        model_state = jax.tree.map(_copied, model_state, places.model_state)
        optimizer = jax.jit(self.optimizer.init, out_shardings=places.optimizer)(parameters)
        return TrainState(parameters, optimizer, model_state, jax.device_put(jnp.zeros((), jnp.int32), places.step))

    def place_batch(self, leaves: list[Any]) -> list[Any]:
        """Put the leaves of a global batch on the devices; several microbatches become a leading dimension."""
        split = [self._split(leaf) for leaf in leaves]
        places = self.model.batch_shardings(microbatched=self.microbatches > 1)
        placed: list[Any] = jax.device_put(split, places)
        return placed

    @functools.cached_property
    def train(self) -> Callable[[TrainState, list[Any]], tuple[TrainState, StepMetrics]]:
        """The compiled train step: (state, batch leaves) to (new state, metrics)."""
        places = self.state_shardings
        return jax.jit(
            self._train,
            in_shardings=(places, self.model.batch_shardings(microbatched=self.microbatches > 1)),
            out_shardings=(places, self.model.stage.replicated),  # the second one for all metrics
            donate_argnums=0,
        )

    @functools.cached_property
    def evaluate(self) -> Callable[[TrainState, list[Any]], jax.Array]:
        """The compiled loss of a batch, without update: (state, batch leaves) to mean loss."""
        return jax.jit(
            lambda state, batch: self._mean_loss(state, batch),
            in_shardings=(self.state_shardings, self.model.batch_shardings(microbatched=self.microbatches > 1)),
            out_shardings=self.model.stage.replicated,
        )

    @functools.cached_property
    def gradients(self) -> Callable[[TrainState, list[Any]], tuple[jax.Array, Any]]:
        """The compiled (mean loss, gradients) of a batch: the train step without the update."""
        return jax.jit(
            lambda state, batch: self._loss_and_gradients(state, batch)[:2],
            in_shardings=(self.state_shardings, self.model.batch_shardings(microbatched=self.microbatches > 1)),
            out_shardings=(self.model.stage.replicated, self._tree("gradient")),
        )

    # ------------------------------------------------------------------------------------------------ traced functions
    def _train(self, state: TrainState, batch: list[Any]) -> tuple[TrainState, StepMetrics]:
        loss, gradients, model_state = self._loss_and_gradients(state, batch)
        gradients = self._constrain(gradients, "optimizer")
        parameters = self._constrain(state.parameters, "optimizer")
        metrics = step_metrics(loss, gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, parameters)
        updated = optax.apply_updates(parameters, updates)
        before = (parameters, state.optimizer, state.model_state)
        parameters, optimizer, model_state = guarded(metrics.finite, (updated, optimizer, model_state), before)
        parameters = self._constrain(parameters, "optimizer")
        return TrainState(parameters, optimizer, model_state, state.step + 1), metrics

    def _loss_and_gradients(self, state: TrainState, batch: list[Any]) -> tuple[jax.Array, Any, Any]:
        grad = jax.value_and_grad(self._loss, has_aux=True)
        if self.microbatches == 1:
            (loss, model_state), gradients = grad(state.parameters, state.model_state, batch)
            return loss, self._constrain(gradients, "gradient"), model_state

        def accumulate(carry: tuple[Any, Any, Any], microbatch: list[Any]) -> tuple[tuple[Any, Any, Any], None]:
            total, sums, model_state = carry
            (loss, model_state), gradients = grad(state.parameters, model_state, microbatch)
            sums = jax.tree.map(jnp.add, sums, self._constrain(gradients, "gradient"))
            return (total + loss, self._constrain(sums, "gradient"), model_state), None

        zeros = self._constrain(jax.tree.map(jnp.zeros_like, state.parameters), "gradient")
        start = (jnp.zeros((), jnp.float32), zeros, state.model_state)
        (total, sums, model_state), _ = jax.lax.scan(accumulate, start, batch)
        mean = jax.tree.map(lambda g: g / self.microbatches, sums)
        return total / self.microbatches, mean, model_state

    def _mean_loss(self, state: TrainState, batch: list[Any]) -> jax.Array:
        if self.microbatches == 1:
            return self._loss(state.parameters, state.model_state, batch)[0]
        losses = jax.lax.map(lambda mb: self._loss(state.parameters, state.model_state, mb)[0], batch)
        return jnp.mean(losses)

    def _loss(self, parameters: Any, model_state: Any, batch: list[Any]) -> tuple[jax.Array, Any]:
        leaves = [*jax.tree.leaves(parameters), *jax.tree.leaves(model_state), *batch]
        loss, *new_state = self.model.run(leaves)
        return loss.astype(jnp.float32), jax.tree.unflatten(jax.tree.structure(model_state), new_state)

    # --------------------------------------------------------------------------------------------------------- places
    def _tree(self, role: Role) -> Any:
        """Places of the parameters (or gradients, or optimizer moments) in the parameters' structure."""
        structure = jax.tree.structure(self.model.analysis.trace.parameters)
        return jax.tree.unflatten(structure, self.model.shardings(role))

    def _constrain(self, tree: Any, role: Role) -> Any:
        return jax.lax.with_sharding_constraint(tree, self._tree(role))

    def _split(self, leaf: Any) -> Any:
        if self.microbatches == 1 or not getattr(leaf, "ndim", 0):
            return leaf
        return leaf.reshape(self.microbatches, leaf.shape[0] // self.microbatches, *leaf.shape[1:])


def _copied(value: Any, place: NamedSharding) -> jax.Array:
    # The copy comes first: device_put makes the caller's buffer a shard of the result where the caller's device holds
    # the whole array, whatever ``may_alias`` says (jax 0.10.2), and donating the result would delete it.
    copy: jax.Array = jax.device_put(jnp.copy(value), place)
    return copy
