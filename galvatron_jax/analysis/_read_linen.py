"""Read a Linen model: parameters are the collection ``params``, state is every other collection, and random streams.

The loss sees the module bound to its variables, so ``loss(model, batch)`` is written as for NNX:

    def loss(model, batch):
        return cross_entropy(model(batch["tokens"], train=True), batch["targets"])

Variables are initialised by the loss itself on a batch of zeros. A module that the user bound
(``module.bind(variables)``) brings its own; ``module.bind({}, rngs={"params": key, "noise": key})`` its own seeds.
A collection that the loss appends to in every step (``sow``) starts empty in every step, and is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import InvalidRngError

from ._jaxpr import abstract
from ._pure_model import Loss, PureModel, Role, dotted

PARAMS, STREAMS = "params", "rngs"
"""The collection that is trained; the entry of the state that holds random streams."""

_DEFAULT_STREAMS = ("params", "dropout")
"""Streams of a module that came without; Linen serves any other name from ``params``."""

Variables = Mapping[str, Any]


def read_linen(
    module: nn.Module,
    loss: Loss,
    batch: Any,
    built: Variables | None = None,
    recipe: Callable[[], nn.Module] | None = None,
) -> PureModel:
    """Return ``module`` as a ``PureModel``.

    Args:
        module: Bound to variables, to seeds, or to nothing.
        loss: The user's loss.
        batch: Shapes of a batch, for the initialisation.
        built: Abstract variables of the bound module that ``recipe`` builds.
        recipe: What builds it; None when ``module`` itself has the values, if any.
    """
    module, given, keys = _unbind(module)
    is_built = bool(given) and recipe is None

    def variables() -> Variables:
        if is_built:
            return given
        if given and recipe is not None:
            return _unbind(recipe())[1]
        initialised: Variables = nn.init(loss, module)(keys, _zeros(batch))
        return initialised

    known = jax.tree.map(abstract, dict(given)) if is_built else dict(built or jax.eval_shape(variables))
    parameters = known.get(PARAMS, {})
    kept, sown = _sort_collections(module, loss, known, batch, keys)
    streams = _streams(keys) if _is_random(module, loss, known, kept + sown, batch) else {}

    def run(parameters: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        collections = {name: state[name] for name in kept}
        drawn = state.get(STREAMS, {})
        rngs = {name: jax.random.fold_in(stream["key"], stream["count"]) for name, stream in drawn.items()}
        value, after = nn.apply(loss, module, mutable=kept + sown)(
            {PARAMS: parameters, **collections}, batch, rngs=rngs
        )
        advanced = {name: {"count": s["count"] + 1, "key": s["key"]} for name, s in drawn.items()}
        return value, _with_streams({name: after.get(name, collections[name]) for name in kept}, advanced)

    def build() -> tuple[Any, Any]:
        made = variables()
        return made.get(PARAMS, {}), _with_streams({name: made[name] for name in kept}, streams)

    state = _with_streams({name: known[name] for name in kept}, jax.tree.map(abstract, streams))
    return PureModel(
        name=type(module).__name__,
        parameters=parameters,
        state=state,
        paths=tuple(dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(parameters)[0]),
        roles=tuple(_role(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]),
        run=run,
        build=build,
        is_built=is_built,
        restore=lambda parameters, state: {PARAMS: parameters, **{name: state[name] for name in kept}},
    )


def _unbind(module: nn.Module) -> tuple[nn.Module, Variables, dict[str, Any]]:
    """Return (unbound module, its variables, its keys by stream)."""
    keys = {name: jax.random.fold_in(jax.random.key(0), i) for i, name in enumerate(_DEFAULT_STREAMS)}
    if module.scope is None:
        return module, {}, keys
    own = {name: stream.as_jax_rng() for name, stream in module.scope.rngs.items()}
    unbound, variables = module.unbind()
    return unbound, variables, own or keys


def _sort_collections(
    module: nn.Module, loss: Loss, known: Variables, batch: Any, keys: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Return the collections that keep their structure in a step, and those that grow."""
    names = sorted(name for name in known if name != PARAMS)
    if not names:
        return [], []
    after = jax.eval_shape(
        lambda variables, batch: nn.apply(loss, module, mutable=names)(variables, batch, rngs=keys)[1], known, batch
    )
    structures: dict[str, Any] = {name: jax.tree.structure(known[name]) for name in names}
    kept = [name for name in names if jax.tree.structure(after.get(name, known[name])) == structures[name]]
    return kept, [name for name in names if name not in kept]


def _is_random(module: nn.Module, loss: Loss, known: Variables, mutable: list[str], batch: Any) -> bool:
    """Tell whether the loss draws random numbers: without streams, Linen says so."""
    apply = nn.apply(loss, module, mutable=mutable)
    try:
        jax.eval_shape(lambda variables, batch: apply(variables, batch, rngs={}), known, batch)
    except InvalidRngError:
        return True
    return False


def _streams(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"count": jnp.zeros((), jnp.uint32), "key": key} for name, key in keys.items()}


def _with_streams(collections: dict[str, Any], streams: dict[str, Any]) -> dict[str, Any]:
    return {**collections, STREAMS: streams} if streams else collections


def _role(path: tuple[Any, ...]) -> Role:
    words = [getattr(key, "key", None) for key in path]
    if words[0] != STREAMS:
        return "other"
    return "key" if words[-1] == "key" else "count"


def _zeros(batch: Any) -> Any:
    """A batch of zeros; keys of one seed."""

    def zero(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zero, batch)
