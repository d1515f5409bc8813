"""The connections of a pipeline: between neighbouring stages, and between the stages that hold one parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from ._events import Phase
from ._exchange import Exchange
from ._links import Link, LinkName, connect
from ._mesh import StageMesh
from ._model import StageModel
from ._slots import Slot


class Tie(NamedTuple):
    """A parameter that two stages hold: the first one updates it, the second one mirrors it."""

    leaf: int
    """Position among the user's parameters."""
    owner: int
    owner_slot: int
    mirror: int
    mirror_slot: int


@dataclasses.dataclass(frozen=True)
class Wiring:
    """All connections."""

    boundaries: Mapping[tuple[int, Phase], Link]
    """(Sending stage, phase)."""
    tied_gradients: Mapping[Tie, Link]
    """From the mirror to the owner of a tied parameter."""
    tied_weights: Mapping[Tie, Link]
    """From the owner to the mirror."""
    exchange: Exchange


def find_ties(models: Sequence[StageModel]) -> list[Tie]:
    """Return the parameters that several stages hold; the first of them owns it."""
    owners: dict[int, tuple[int, int]] = {}
    ties = []
    for stage, model in enumerate(models):
        for position, slot in enumerate(model.slots):
            for leaf in slot.leaves:
                owner, owner_slot = owners.setdefault(leaf, (stage, position))
                if owner != stage:
                    assert not slot.is_stacked, "a parameter that two segments read is a slot of its own"
                    ties.append(Tie(leaf, owner, owner_slot, stage, position))
    return ties


def gradient_place(models: Sequence[StageModel], tie: Tie) -> NamedSharding:
    """Return where the mirror puts its gradient for the owner: the owner's layout, on the mirror's devices."""
    return models[tie.mirror].mesh.sharding(_slot(models, tie.owner, tie.owner_slot).sharding("optimizer").spec)


def weight_place(models: Sequence[StageModel], tie: Tie) -> NamedSharding:
    """Return where the owner puts new weights for the mirror: the mirror's layout, on the owner's devices."""
    return models[tie.owner].mesh.sharding(_slot(models, tie.mirror, tie.mirror_slot).sharding("parameter").spec)


def wire(models: Sequence[StageModel], slices: Sequence[StageMesh], ties: Sequence[Tie], link: LinkName) -> Wiring:
    """Connect the stages of a pipeline."""
    boundaries: dict[tuple[int, Phase], Link] = {}
    for k, (before, after) in enumerate(zip(models, models[1:], strict=False)):
        leaving = _crossings(before, before.leaving_shardings)
        arriving = _crossings(after, after.arriving_shardings)
        flows = [i for i, crossing in enumerate(after.share.arriving) if crossing.gradient]
        boundaries[k, "forward"] = connect(leaving, arriving, link)
        boundaries[k + 1, "backward"] = connect([arriving[i] for i in flows], [leaving[i] for i in flows], link)
    gradients, weights = {}, {}
    for tie in ties:
        wanted = _slot(models, tie.owner, tie.owner_slot).sharding("optimizer")
        gradients[tie] = connect([_leaf(models, tie, gradient_place(models, tie))], [_leaf(models, tie, wanted)], link)
        stored = _slot(models, tie.mirror, tie.mirror_slot).sharding("parameter")
        weights[tie] = connect([_leaf(models, tie, weight_place(models, tie))], [_leaf(models, tie, stored)], link)
    return Wiring(boundaries, gradients, weights, Exchange(slices))


def _crossings(model: StageModel, places: Sequence[NamedSharding]) -> list[jax.ShapeDtypeStruct]:
    crossings = model.share.leaving if places is model.leaving_shardings else model.share.arriving
    return [
        jax.ShapeDtypeStruct(crossing.variable.aval.shape, crossing.variable.aval.dtype, sharding=place)
        for crossing, place in zip(crossings, places, strict=True)
    ]


def _slot(models: Sequence[StageModel], stage: int, position: int) -> Slot:
    return models[stage].slots[position]


def _leaf(models: Sequence[StageModel], tie: Tie, place: NamedSharding) -> Any:
    leaf = jax.tree.leaves(models[0].share.analysis.trace.parameters)[tie.leaf]
    shape = _slot(models, tie.owner, tie.owner_slot).stored_shape(leaf)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
