"""Read an NNX model: parameters are its ``nnx.Param`` leaves, state is everything else.

Instances are known by a static attribute on a *private* copy: NNX transforms re-merge submodules, so object ids change,
but static attributes survive. The user's object is never touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ._pure_model import Loss, PureModel, Role, dotted

PATH_ATTRIBUTE = "_pytree__galvatron_path"
"""Static attribute that names a module of the private copy. Flax hides this prefix from modules that read their own
attributes: ``nnx.Dict`` takes all others for its keys, ``nnx.bridge.ToNNX`` for Linen variables."""


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """What stays of a module when its arrays are taken out."""

    name: str
    graph: Any
    marked: Any
    """The same graph, whose modules know their paths."""
    classes: frozenset[type]
    kept: tuple[Any, ...]
    """Paths of the variables that are state."""
    roles: tuple[Role, ...]


def read_nnx(model: nnx.Module, loss: Loss) -> PureModel:
    """Return a module that has its values as a ``PureModel``."""
    graph, parameters, state = split_parameters(model)
    found: list[Structure] = []

    def open_copy(parameters: Any, state: Any) -> Any:
        structure, *arrays = open_module(nnx.merge(graph, parameters, state))
        found.append(structure)
        return arrays

    arrays = jax.eval_shape(open_copy, parameters, state)
    return assemble(found[0], arrays, loss, build=lambda: (parameters, state), is_built=True)


def open_module(module: nnx.Module) -> tuple[Structure, Any, Any]:
    """Return (structure, parameters, state) of a module of our own, which learns its paths.

    Runs under a trace: abstract arrays that are no variables would be mistaken for parts of the graph.
    """
    graph, parameters, state = split_parameters(module)
    classes: set[type] = set()
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module) and path:
            classes.update(c for c in type(node).__mro__ if issubclass(c, nnx.Module) and c is not nnx.Module)
            setattr(node, PATH_ATTRIBUTE, ".".join(map(str, path)))
    variables = nnx.to_flat_state(state)
    structure = Structure(
        name=type(module).__name__,
        graph=graph,
        marked=split_parameters(module)[0],
        classes=frozenset(classes),
        kept=tuple(path for path, _ in variables),
        roles=tuple(_role(variable) for _, variable in variables for _ in jax.tree.leaves(variable)),
    )
    return structure, parameters, state


def assemble(structure: Structure, arrays: Any, loss: Loss, *, build: Callable[[], Any], is_built: bool) -> PureModel:
    """Return the ``PureModel`` of a module that was opened.

    Args:
        structure: What is left of it.
        arrays: Abstract (parameters, state).
        loss: The user's loss.
        build: Returns concrete (parameters, state).
        is_built: Whether these are the user's own.
    """
    parameters, state = arrays

    def run(parameters: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        # Variables may only be changed at the trace level that made them: make fresh ones.
        parameters, state = jax.tree.map(lambda x: x, (parameters, state))
        module = nnx.merge(structure.marked, parameters, state)
        value = loss(module, batch)
        after = dict(nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.Param))))
        # What the call sowed is left out.
        return value, nnx.from_flat_state([(path, after[path]) for path in structure.kept])

    return PureModel(
        name=structure.name,
        parameters=parameters,
        state=state,
        paths=tuple(dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(parameters)[0]),
        roles=structure.roles,
        run=run,
        build=build,
        is_built=is_built,
        restore=lambda parameters, state: nnx.merge(structure.graph, parameters, state, copy=True),
        classes=structure.classes,
    )


def split_parameters(model: nnx.Module) -> tuple[Any, Any, Any]:
    """Return (graph definition, trained leaves, all other leaves) of a module."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types its variadic result
    return graph, parameters, rest


def _role(variable: Any) -> Role:
    if isinstance(variable, nnx.RngKey):
        return "key"
    return "count" if isinstance(variable, nnx.RngCount) else "other"
