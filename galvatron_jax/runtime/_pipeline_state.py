"""The state of a pipelined plan: built, adopted, and in the user's own structure.

Stored, it is one ``StageState`` for each stage, on the stage's devices; a process holds those that have devices of its
own. In the neutral form each leaf is a global array of the user's shape of which every process holds a part: on the
devices of the first stage that has it, when these are in all processes; else spread over the devices of all stages.
What every stage keeps is replicated on all devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ..analysis import Analysis
from ._cut_optimizer import CutOptimizer
from ._links import LinkName, connect
from ._pipeline_stage import PipelineStage, StageState, UserLeaves
from ._placing import adopt_leaf, everywhere, is_here, key_data, process_indexes, remote_array, restrict
from ._step import TrainState
from ._turns import in_turn
from ._wiring import Wiring, weight_place

States = list[StageState | None]
"""By stage; None for stages that have no device in this process."""

Leaves = dict[int, Any]
"""By position in the user's tree."""


class PipelineStates:
    """What goes between the states of all stages and the user's trees."""

    def __init__(
        self, analysis: Analysis, cut: CutOptimizer, stages: Sequence[PipelineStage], wiring: Wiring, link: LinkName
    ) -> None:
        """Keep the parts of the pipeline."""
        self._trace, self._cut, self._stages, self._wiring, self._link = analysis.trace, cut, stages, wiring, link
        self._whole = wiring.exchange.everywhere
        self._ties = [tie for stage in stages for tie in stage.owned_ties]

    def create(self, build: Callable[[], tuple[Any, Any]]) -> States:
        """Build the state under jit, so that each device only ever holds its own shards."""

        def fresh(stage: PipelineStage) -> StageState:
            parameters, state = build()
            optimizer = jax.tree.leaves(self._cut.optimizer.init(parameters))
            leaves = dict(enumerate(jax.tree.leaves(parameters)))
            return stage.stored_state(leaves, optimizer, jax.tree.leaves(state), jnp.zeros((), jnp.int32))

        return self._on_each(lambda stage: jax.jit(lambda: fresh(stage), out_shardings=stage.state_shardings)())

    def adopt(self, parameters: Any, model_state: Any) -> States:
        """Place existing values; copies, so that the caller's arrays are never donated."""
        leaves, states = jax.tree.leaves(parameters), jax.tree.leaves(model_state)

        def stored(stage: PipelineStage, mine: Leaves, state: Leaves) -> StageState:
            # What the stage does not hold is dead code: the state of a parameter is made of that parameter.
            whole = [mine.get(i, jnp.zeros(leaf.shape, leaf.dtype)) for i, leaf in enumerate(leaves)]
            tree = jax.tree.unflatten(jax.tree.structure(self._cut.parameters), whole)
            optimizer = jax.tree.leaves(self._cut.optimizer.init(tree))
            return stage.stored_state(mine, optimizer, state, jnp.zeros((), jnp.int32))

        def placed(stage: PipelineStage) -> StageState:
            mine = {i: adopt_leaf(leaves[i], place) for i, place in stage.user_shardings[0].items()}
            state = {i: adopt_leaf(states[i], stage.model.mesh.replicated) for i in stage.model.share.state}
            program = jax.jit(functools.partial(stored, stage), out_shardings=stage.state_shardings)
            made: StageState = program(mine, state)
            return made

        return self._on_each(placed)

    @functools.cached_property
    def abstract_neutral(self) -> TrainState:
        """Shape, dtype and place of each leaf of the neutral state."""
        exchange = self._wiring.exchange
        everyone = process_indexes(self._whole)

        def shared(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            place = leaf.sharding if process_indexes(leaf.sharding) == everyone else exchange.spread_place(leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        neutral: TrainState = jax.tree.map(shared, self._homes)
        return neutral

    @functools.cached_property
    def _homes(self) -> TrainState:
        """The same with each leaf on the devices of the first stage that holds it."""
        parameters: dict[int, NamedSharding] = {}
        optimizer: dict[int, NamedSharding] = {}
        state: dict[int, NamedSharding] = {}
        for stage in reversed(self._stages):  # what several stages hold is taken from the first one
            parameters |= stage.user_shardings[0]
            optimizer |= stage.user_shardings[1]
            state |= dict.fromkeys(stage.model.share.state, stage.model.mesh.replicated)
        optimizer |= dict.fromkeys(self._cut.shared_state, self._whole)
        return TrainState(
            parameters=_with_places(self._trace.parameters, parameters),
            optimizer=_with_places(self._cut.state, optimizer),
            model_state=_with_places(self._trace.state, state),
            step=jax.ShapeDtypeStruct((), jnp.int32, sharding=self._whole),
        )

    def to_user(self, states: States) -> TrainState:
        """Return the neutral state; copies."""
        held, homes, neutral = self._held(states), self._homes, self.abstract_neutral
        return TrainState(
            parameters=self._shared(homes.parameters, neutral.parameters, held.parameters),
            optimizer=self._shared(homes.optimizer, neutral.optimizer, held.optimizer),
            model_state=self._shared(homes.model_state, neutral.model_state, held.model_state),
            step=held.step,
        )

    def _held(self, states: States) -> UserLeaves:
        """Return copies of what the stages of this process hold; what several hold is the first one's."""
        found = [
            in_turn(stage.to_user(state))
            for stage, state in zip(self._stages, states, strict=True)
            if state is not None
        ]
        parameters: Leaves = {}
        optimizer: Leaves = {}
        model_state: Leaves = {}
        for leaves in reversed(found):
            parameters |= leaves.parameters
            optimizer |= leaves.optimizer
            model_state |= leaves.model_state
        shared = {i: everywhere([leaves.optimizer[i] for leaves in found], self._whole) for i in self._cut.shared_state}
        step = everywhere([leaves.step for leaves in found], self._whole)
        return UserLeaves(parameters, optimizer | shared, model_state, step)

    def _shared(self, homes: Any, neutral: Any, held: Leaves) -> Any:
        """Return the neutral tree of the ``held`` leaves; each copy goes as soon as it is spread.

        A process that has only a later holder of a leaf has no more than a handle of it: all see the first one's array.
        """
        leaves = []
        for i, (home, place) in enumerate(zip(jax.tree.leaves(homes), jax.tree.leaves(neutral), strict=True)):
            leaf = held.pop(i) if is_here(home.sharding) else remote_array(home)
            leaves.append(leaf if place.sharding == home.sharding else self.to_cluster(leaf))
        return jax.tree.unflatten(jax.tree.structure(homes), leaves)

    def to_stored(self, state: TrainState) -> States:
        """Return the stored state from a neutral one, placed as ``abstract_neutral`` says; copies."""
        collect = self._wiring.exchange.collect
        state = jax.tree.map(lambda leaf, home: collect(leaf, home.sharding), state, self._homes)
        parameters, optimizer = jax.tree.leaves(state.parameters), jax.tree.leaves(state.optimizer)
        mirrored, copied = self._mirror(parameters), self._copy_state(jax.tree.leaves(state.model_state))

        def stored(stage: PipelineStage) -> StageState:
            whole = stage.model.mesh.replicated
            mine = {i: mirrored.get((stage.number, i), parameters[i]) for i in stage.user_shardings[0]}
            kept = {i: optimizer[i] for i in stage.user_shardings[1]}
            kept |= {i: restrict(optimizer[i], whole) for i in self._cut.shared_state}
            states = {i: copied[stage.number, i] for i in stage.model.share.state}
            program = jax.jit(stage.stored_state, out_shardings=stage.state_shardings)
            made: StageState = program(mine, kept, states, restrict(state.step, whole))
            return made

        return self._on_each(stored)

    def to_cluster(self, leaf: jax.Array) -> jax.Array:
        """Return a neutral leaf spread over the devices of all stages; a copy, unless it is so already."""
        return self._wiring.exchange.spread(leaf, self._link)

    # ---------------------------------------------------------------------------------------------------------- pieces
    def _on_each(self, build: Callable[[PipelineStage], StageState]) -> States:
        return [in_turn(build(stage)) if is_here(stage.model.mesh.replicated) else None for stage in self._stages]

    def _mirror(self, parameters: Sequence[Any]) -> dict[tuple[int, int], Any]:
        """Send tied parameters from their owners to the stages that mirror them, by (stage, leaf)."""
        models = [stage.model for stage in self._stages]
        found = {}
        for tie in self._ties:
            place, leaf = weight_place(models, tie), parameters[tie.leaf]
            owner = models[tie.owner].slots[tie.owner_slot]
            stored = jax.jit(functools.partial(owner.to_stored, role="parameter"), out_shardings=place)
            sent = in_turn([stored(leaf)]) if is_here(place) else None
            arrived = self._wiring.tied_weights[tie].send(sent)
            if arrived is not None:
                found[tie.mirror, tie.leaf] = arrived[0]
        return found

    def _copy_state(self, leaves: Sequence[Any]) -> dict[tuple[int, int], Any]:
        """Send model state to all stages that hold it, by (stage, leaf)."""
        found, first = {}, dict[int, NamedSharding]()
        for stage in self._stages:
            whole = stage.model.mesh.replicated
            for i in stage.model.share.state:
                source = first.setdefault(i, whole)
                arrived = _send_replicated(leaves[i], source, whole, self._link)
                if arrived is not None:
                    found[stage.number, i] = arrived
        return found


def _send_replicated(leaf: Any, source: NamedSharding, target: NamedSharding, link: LinkName) -> Any:
    """Send a leaf from one stage to another, whole on every device; None in a process without the target."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if source == target:
        return leaf if is_here(target) else None
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
    ends = [jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place) for place in (source, target)]
    sent = [key_data(leaf) if is_key else leaf] if is_here(source) else None
    arrived = connect([ends[0]], [ends[1]], link).send(sent)
    if arrived is None:
        return None
    return jax.random.wrap_key_data(arrived[0], impl=jax.random.key_impl(leaf)) if is_key else arrived[0]


def _with_places(tree: Any, places: Mapping[int, NamedSharding]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[i]) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, placed)
