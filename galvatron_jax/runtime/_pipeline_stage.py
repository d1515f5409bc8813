"""All programs of one pipeline stage: its passes, and what it does once per step with the gradients.

begin        zeros
passes       forward and backward of every microbatch                                  (``_passes``)
gradients    mean gradients; those of mirrored parameters go to the stage that updates them
exports      small values that the update needs of all stages, exchanged               (``_cut_optimizer``)
update       optimizer, guard, metrics; new weights go to the stages that mirror them
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ._cut_optimizer import Values
from ._guard import StepMetrics, guarded
from ._model import StageModel
from ._options import compiler_options
from ._passes import StagePasses
from ._regather import regather
from ._slots import Leaves, Slot, to_stored, to_user
from ._stage_optimizer import Inputs, OptimizerState, StageOptimizer
from ._wiring import Tie

Arrays = list[Any]

Known = Callable[[list[list[Any]]], Values]
"""From the exchanged vectors of all rounds so far ([slices, n] by chunk) to values by variable."""


class StageState(NamedTuple):
    """What a stage keeps from step to step."""

    parameters: Arrays
    """One array per slot."""
    optimizer: OptimizerState
    model_state: Arrays
    """Leaves ``share.state``."""
    step: Any
    """int32 scalar."""


class UserLeaves(NamedTuple):
    """What a stage holds, in the user's shapes, by position in the user's trees."""

    parameters: Any
    optimizer: Any
    model_state: Any
    step: Any


class Gradients(NamedTuple):
    """What is left of the passes of a step."""

    slots: Arrays
    """Mean gradient of each slot; of a mirrored one where its owner wants it."""
    loss: Any
    """Mean loss."""


@dataclasses.dataclass(frozen=True)
class PipelineStage:
    """The programs of one stage under one optimizer."""

    number: int
    passes: StagePasses
    optimizer: StageOptimizer
    owned_ties: tuple[Tie, ...]
    """Parameters that this stage updates and others mirror."""
    mirrored_places: Mapping[int, NamedSharding]
    """Where the gradient of each mirrored slot is wanted, on this stage's devices."""
    tied_places: Sequence[NamedSharding]
    """Where the new weights of each owned tie are wanted, on this stage's devices."""

    @property
    def model(self) -> StageModel:
        """The stage's layers."""
        return self.passes.model

    # ------------------------------------------------------------------------------------------------------ the state
    @functools.cached_property
    def state_shardings(self) -> StageState:
        """Where each leaf of the state lives."""
        whole = self.model.mesh.replicated
        slots, cut = self.model.slots, self.optimizer.cut
        leaves = jax.tree.leaves(cut.state)
        parameters = jax.tree.leaves(cut.parameters)

        def place(slot: Slot, stacked: bool, leaf: Any) -> NamedSharding:
            if leaf.shape != parameters[slot.leaves[0]].shape:
                return whole
            return slot.sharding("optimizer") if stacked else slot.leaf_sharding("optimizer")

        owned = [
            [place(slots[group.slot], group.stacked, leaves[i]) for i in cut.owned_state(group.leaves[0])]
            for group in self.optimizer.groups
        ]
        optimizer = OptimizerState(owned, [whole] * len(cut.shared_state))
        return StageState(self.model.parameter_shardings("parameter"), optimizer, self.model.state_shardings, whole)

    def stored_state(self, parameters: Leaves, optimizer: Leaves, state: Leaves, step: Any) -> StageState:
        """Return the stage's state from the user's leaves by position; runs under ``jax.jit``."""
        return StageState(
            to_stored(self.model.slots, parameters),
            self.optimizer.to_stored(optimizer),
            [state[i] for i in self.model.share.state],
            step,
        )

    @functools.cached_property
    def to_user(self) -> Callable[[StageState], UserLeaves]:
        """The compiled function from the state to copies of the user's leaves."""

        def user(state: StageState) -> UserLeaves:
            return UserLeaves(
                to_user(self.model.slots, state.parameters),
                self.optimizer.to_user(state.optimizer),
                dict(zip(self.model.share.state, state.model_state, strict=True)),
                state.step,
            )

        whole = self.model.mesh.replicated
        return jax.jit(user, out_shardings=UserLeaves(*self.user_shardings, whole, whole))

    @functools.cached_property
    def user_shardings(self) -> tuple[dict[int, NamedSharding], dict[int, NamedSharding]]:
        """Where the parameters and optimizer leaves that ``to_user`` returns live."""
        cut, whole = self.optimizer.cut, self.model.mesh.replicated
        leaves, shapes = jax.tree.leaves(cut.state), [p.shape for p in jax.tree.leaves(cut.parameters)]
        parameters = {leaf: slot.user_sharding("parameter") for slot in self.model.slots for leaf in slot.leaves}
        optimizer = dict.fromkeys(cut.shared_state, whole)
        for group in self.optimizer.groups:
            place = self.model.slots[group.slot].user_sharding("optimizer")
            for leaf in group.leaves:
                optimizer |= {i: place if leaves[i].shape == shapes[leaf] else whole for i in cut.owned_state(leaf)}
        return parameters, optimizer

    # ------------------------------------------------------------------------------------------------ once per step
    @functools.cached_property
    def gradients(self) -> Callable[..., Gradients]:
        """The compiled end of the passes: (loss sum, gradient sums...) to means.

        Sums that stay where they are are donated.
        """
        count, sums, places = self.passes.microbatches, self.passes.sums, self.gradient_places
        reduced = jax.eval_shape(self.passes.reduce, sums)
        in_place = [s.sharding == p and s.shape == r.shape for s, p, r in zip(sums, places, reduced, strict=True)]

        def means(loss: Any, *sums: Any) -> Gradients:
            return Gradients([total / count for total in self.passes.reduce(list(sums))], loss / count)

        donated = [1 + i for i, stays in enumerate(in_place) if stays]
        return self._jit(means, donated, Gradients(places, self.model.mesh.replicated))

    @functools.cached_property
    def gradient_places(self) -> list[NamedSharding]:
        """Where the mean gradient of each slot is: as it was reduced, or where the stage that updates it wants it."""
        places = list(self.passes.reduced_places)
        for slot, place in self.mirrored_places.items():
            places[slot] = place
        return places

    def exports(self, known: Known) -> Callable[..., Any]:
        """Return the compiled function of an exchange: (gradients, tied gradients, state, vectors before) to vector."""

        def run(gradients: Gradients, tied: Arrays, state: StageState, before: list[list[Any]], length: int) -> Any:
            inputs = self._inputs(gradients, tied, state.parameters, state.optimizer)
            vector = self.optimizer.exports(len(before), inputs, known(before))
            return jnp.pad(vector, (0, length - vector.size))[None]

        options = compiler_options(self.model.mesh)
        return jax.jit(run, static_argnums=4, out_shardings=self.model.mesh.replicated, compiler_options=options)

    def update(self, known: Known) -> Callable[..., Any]:
        """Return the compiled update.

        (gradients, tied gradients, state, new model state, vectors) to (state, metrics, tied weights); the state is
        donated.
        """
        places = (self.state_shardings, self.model.mesh.replicated, list(self.tied_places))
        return self._jit(functools.partial(self._update, known), (2,), places)

    def _jit(self, function: Callable[..., Any], donated: Sequence[int], places: Any) -> Callable[..., Any]:
        options = compiler_options(self.model.mesh)
        return jax.jit(function, donate_argnums=tuple(donated), out_shardings=places, compiler_options=options)

    def _update(
        self, known: Known, gradients: Gradients, tied: Arrays, state: StageState, new: Arrays, vectors: list[list[Any]]
    ) -> tuple[StageState, StepMetrics, Arrays]:
        places = self.model.parameter_shardings("optimizer")
        weights = jax.lax.with_sharding_constraint(state.parameters, places)
        inputs = self._inputs(gradients, tied, weights, state.optimizer)
        weights, optimizer, metrics = self.optimizer.update(inputs, known(vectors))
        weights = jax.lax.with_sharding_constraint(weights, places)
        sent = [weights[tie.owner_slot] for tie in self.owned_ties]
        weights = regather(self.model.slots, weights, state.parameters)
        model_state = guarded(metrics.finite, new, state.model_state)
        return StageState(weights, optimizer, model_state, state.step + 1), metrics, sent

    def _inputs(self, gradients: Gradients, tied: Arrays, parameters: Arrays, optimizer: OptimizerState) -> Inputs:
        """Add what the stages that mirror a parameter found, in the order of stages."""
        sums = self.passes.united(list(gradients.slots))
        for tie, gradient in zip(self.owned_ties, tied, strict=True):
            sums[tie.owner_slot] = sums[tie.owner_slot] + gradient
        return Inputs(sums, parameters, optimizer, gradients.loss if self.optimizer.makes_loss else None)
