"""Any optax transformation over stacked layers gives the numbers that it gives on the user's own tree."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from optax.contrib import _muon

from galvatron_jax.analysis import flatten, is_call
from galvatron_jax.runtime import Slot, StageMesh
from galvatron_jax.runtime._slots import to_stored, to_user
from galvatron_jax.runtime._stored_optimizer import StoredOptimizer
from galvatron_jax.runtime._view import View

pytestmark = pytest.mark.multidevice

LAYERS = 5
Tree = dict[str, Any]


def tree(seed: int, count: int = LAYERS) -> Tree:
    """An embedding, layers of a matrix and a scale, a head; each layer of its own size of numbers."""
    draw = np.random.default_rng(seed).normal
    layers = [
        {"w": jnp.asarray(draw(size=(6, 8)) * (i + 1), jnp.float32), "scale": jnp.asarray(draw(size=8), jnp.float32)}
        for i in range(count)
    ]
    return {"embed": jnp.asarray(draw(size=(12, 6)), jnp.float32), "layers": layers, "z": jnp.ones((3, 4))}


def slots(count: int = LAYERS, *, viewed: bool = False) -> tuple[Slot, ...]:
    """Leaves are embed, then (scale, w) of each layer, then z; if ``viewed``, embed and w have other shapes."""
    mesh = StageMesh(Mesh(np.array(jax.devices()[:1]), ("g0",)))
    scales, matrices = tuple(range(1, 2 * count, 2)), tuple(range(2, 2 * count + 1, 2))
    views = (View((12, 6), (3, 4, 6)), None, View((6, 8), (6, 2, 4)), None) if viewed else (None,) * 4
    leaves = ((0,), scales, matrices, (2 * count + 1,))
    return tuple(Slot(own, len(own) > 1, mesh, None, 0, view) for own, view in zip(leaves, views, strict=True))


def decays(parameters: Tree) -> Tree:
    """Weight decay on matrices of all layers but the second."""
    mask: Tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and "[1]" not in jax.tree_util.keystr(path), parameters
    )
    return mask


def by_place(parameters: Tree) -> Tree:
    labels: Tree = jax.tree_util.tree_map_with_path(
        lambda path, _: "slow" if "embed" in str(path) else "fast", parameters
    )
    return labels


def flat_sgd() -> optax.GradientTransformation:
    return optax.flatten(optax.sgd(0.1, momentum=0.9))


def _matrices(parameters: Tree) -> Tree:
    mask: Tree = jax.tree.map(lambda leaf: leaf.ndim == 2, parameters)
    return mask


TRANSFORMATIONS = {
    "adamw": optax.adamw(1e-2),
    "adamw, masked by path": optax.adamw(1e-2, weight_decay=0.1, mask=decays),
    "lamb": optax.lamb(1e-2, weight_decay=0.01),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "clipped by the global norm": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9)),
    "two rates": optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)}, by_place),
    "clipped by block": optax.chain(optax.adaptive_grad_clip(0.1), optax.rmsprop(1e-2)),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "every second step": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "flattened": flat_sgd(),
    "schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)),
}
VIEWED = {
    "adamw, masked by path": TRANSFORMATIONS["adamw, masked by path"],
    "decay by number of dimensions": optax.adamw(1e-2, weight_decay=0.1, mask=_matrices),
    "muon": _muon.muon(1e-2),
    **{name: TRANSFORMATIONS[name] for name in ("lamb", "adafactor", "noise", "every second step", "flattened")},
}
"""Over arrays that are stored in other shapes than the user's."""
MERGED = ["adamw", "lamb", "adafactor", "clipped by the global norm", "two rates", "clipped by block", "schedule"]
"""Those that treat all layers alike: their programs must not grow with the number of layers."""


@pytest.mark.parametrize(
    ("name", "viewed"), [*((name, False) for name in TRANSFORMATIONS), *((name, True) for name in VIEWED)]
)
def test_stored_arrays_see_what_the_user_s_tree_sees(name: str, viewed: bool) -> None:
    transformation, parameters = (VIEWED if viewed else TRANSFORMATIONS)[name], tree(0)
    stored = StoredOptimizer(transformation, jax.eval_shape(lambda: parameters), slots(viewed=viewed))
    arrays = to_stored(stored.slots, dict(enumerate(jax.tree.leaves(parameters))))
    state, expected = stored.init(arrays), transformation.init(parameters)
    assert [(x.shape, x.dtype) for x in state] == [(x.shape, x.dtype) for x in stored.abstract_state]
    for step in range(1, 4):
        gradients = tree(step)
        updates, expected = transformation.update(gradients, expected, parameters)
        applied: Any = optax.apply_updates(parameters, updates)
        parameters = applied
        arrays, state = stored.update(
            to_stored(stored.slots, dict(enumerate(jax.tree.leaves(gradients)))), state, arrays
        )
    found = to_user(stored.slots, arrays)
    for index, leaf in enumerate(jax.tree.leaves(parameters)):
        np.testing.assert_allclose(found[index], leaf, rtol=2e-6, atol=1e-7)
    assert str(jax.tree.structure(stored.to_user(state))) == str(jax.tree.structure(expected))
    for mine, theirs in zip(jax.tree.leaves(stored.to_user(state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(_plain(mine), _plain(theirs), rtol=2e-6, atol=1e-7)


def test_state_goes_to_the_user_s_structure_and_back() -> None:
    stored = StoredOptimizer(optax.adamw(1e-2), jax.eval_shape(lambda: tree(0)), slots())
    state = stored.init(to_stored(stored.slots, dict(enumerate(jax.tree.leaves(tree(0))))))
    again = stored.to_stored(stored.to_user(state))
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("name", MERGED)
def test_alike_layers_cost_one_equation_however_many_they_are(name: str) -> None:
    assert equations(name, 4) == equations(name, 9)


@pytest.mark.parametrize("name", ["adamw", "lamb", "clipped by the global norm"])
def test_elementwise_rules_and_norms_see_stored_arrays_only(name: str) -> None:
    """No equation of the update reshapes an array that is stored in another shape."""
    stored = StoredOptimizer(TRANSFORMATIONS[name], jax.eval_shape(lambda: tree(0)), slots(viewed=True))
    weights = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 4, 6), (LAYERS, 8), (LAYERS, 6, 2, 4), (3, 4))]
    program = jax.make_jaxpr(stored.update)(weights, stored.abstract_state, weights)
    avals: list[Any] = [e.inputs[0].aval for e in flatten(program, is_call).equations if e.name == "reshape"]
    reshaped = [aval.size for aval in avals]
    assert max(reshaped, default=0) <= LAYERS, "scalars of each layer at most"


def equations(name: str, layers: int) -> int:
    """Equations of an update of so many layers."""
    parameters = jax.eval_shape(lambda: tree(0, layers))
    stored = StoredOptimizer(TRANSFORMATIONS[name], parameters, slots(layers))
    arrays = [
        jax.ShapeDtypeStruct((layers, *shape) if stacked else shape, jnp.float32)
        for shape, stacked in (((12, 6), False), ((8,), True), ((6, 8), True), ((3, 4), False))
    ]
    program = jax.make_jaxpr(stored.update)(arrays, stored.abstract_state, arrays)
    return len(flatten(program, is_call).equations)


@functools.cache
def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _plain(value: Any) -> Any:
    return np.asarray(jax.random.key_data(value) if _is_key(value.dtype) else value)
