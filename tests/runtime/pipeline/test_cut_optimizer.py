"""An optimizer cut by parameter gives, stage by stage, what it gives on the whole tree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galvatron_jax.errors import UnsupportedError
from galvatron_jax.runtime import StageMesh
from galvatron_jax.runtime._cut_optimizer import CutOptimizer
from galvatron_jax.runtime._guard import guarded, step_metrics
from galvatron_jax.runtime._slots import Slot, to_stored, to_user
from galvatron_jax.runtime._stage_optimizer import Inputs, StageOptimizer, receive

STEPS = 3
TOLERANCE = 1e-6
"""Relative, of weights near 1: the same equations on stacked arrays, fused otherwise."""

SHAPES = {"embed": {"table": (6, 4)}, "layers": {str(i): {"bias": (4,), "kernel": (4, 4)} for i in range(4)}, "t": ()}


def decayed(path: Any, _: Any) -> bool:
    return "kernel" in jax.tree_util.keystr(path)


def mask(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(decayed, parameters)


def labels(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "fast" if "'2'" in jax.tree_util.keystr(path) else "slow", parameters
    )


OPTIMIZERS = {
    "sgd": (optax.sgd(0.1, momentum=0.9), 1),
    "adamw, masked decay": (optax.adamw(1e-2, weight_decay=0.1, mask=mask), 1),
    "clipped": (optax.chain(optax.clip_by_global_norm(0.3), optax.adam(1e-2)), 1),
    "clipped twice": (optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(1.0), optax.clip_by_global_norm(0.1)), 2),
    "scheduled": (optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)), 1),
    "injected": (optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 0.0, 5)), 1),
    "lamb": (optax.lamb(1e-2), 1),
    "adafactor": (optax.adafactor(1e-2, min_dim_size_to_factor=4), 1),
    "lion": (optax.lion(1e-3), 1),
    "rates of their own": (optax.multi_transform({"fast": optax.adam(1e-1), "slow": optax.sgd(1e-2)}, labels), 1),
    "ema of updates": (optax.chain(optax.adam(1e-2), optax.ema(0.9)), 1),
}


def tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), SHAPES, is_leaf=is_shape)


def slots(*leaves: tuple[int, ...]) -> tuple[Slot, ...]:
    mesh = StageMesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("g0",)))
    return tuple(Slot(group, len(group) > 1, mesh, None, 0) for group in leaves)


STAGES = (slots((0,), (1,), (2,)), slots((3, 5, 7), (4, 6, 8)), slots((0,), (9,)))
"""Leaves: table, then bias and kernel of four layers, then t. Layers 1 to 3 are stacked; the table is tied."""
MIRRORED = (frozenset[int](), frozenset[int](), frozenset({0}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stages_together_update_as_one(name: str) -> None:
    optimizer, rounds = OPTIMIZERS[name]
    cut = CutOptimizer(optimizer, jax.eval_shape(lambda: tree(0)))
    assert len(cut.cut.exports) == rounds
    expected = whole_steps(optimizer)
    found = stage_steps(cut)
    for leaf, value in enumerate(jax.tree.leaves(expected)):
        for parameters in found:
            if leaf in parameters:
                np.testing.assert_allclose(parameters[leaf], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_rows_with_equal_equations_are_updated_as_one_array() -> None:
    cut = CutOptimizer(OPTIMIZERS["clipped"][0], jax.eval_shape(lambda: tree(0)))
    stage = StageOptimizer(cut, STAGES[1], frozenset(), makes_loss=False)
    assert [group.leaves for group in stage.groups] == [(3, 5, 7), (4, 6, 8)]
    different = CutOptimizer(OPTIMIZERS["rates of their own"][0], jax.eval_shape(lambda: tree(0)))
    assert len(StageOptimizer(different, STAGES[1], frozenset(), makes_loss=False).groups) == 6


def test_state_goes_to_the_users_structure_and_back() -> None:
    cut = CutOptimizer(OPTIMIZERS["clipped"][0], jax.eval_shape(lambda: tree(0)))
    leaves = [np.full(leaf.shape, i) for i, leaf in enumerate(jax.tree.leaves(cut.state))]
    found: dict[int, Any] = {}
    for number, stage in enumerate(STAGES):
        optimizer = StageOptimizer(cut, stage, MIRRORED[number], makes_loss=number == 2)
        found |= optimizer.to_user(optimizer.to_stored(leaves))
    assert sorted(found) == list(range(len(leaves)))
    for position, leaf in enumerate(leaves):
        np.testing.assert_array_equal(found[position], leaf)


def test_loss_that_is_not_finite_leaves_the_update_out_everywhere() -> None:
    cut = CutOptimizer(OPTIMIZERS["clipped"][0], jax.eval_shape(lambda: tree(0)))
    found = stage_steps(cut, loss=float("nan"))
    before = jax.tree.leaves(tree(0))
    for parameters in found:
        for leaf, value in parameters.items():
            np.testing.assert_array_equal(value, before[leaf])


def test_optimizer_that_mixes_whole_arrays_is_refused() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        flat, unravel = jax.flatten_util.ravel_pytree(updates)
        return unravel(flat[::-1]), state

    big = jax.eval_shape(lambda: {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))})
    with pytest.raises(UnsupportedError, match=r"concatenate.*--no-pp"):
        _ = CutOptimizer(optax.GradientTransformation(lambda _: optax.EmptyState(), update), big).cut


# ------------------------------------------------------------------------------------------------------------- steps
def gradients(step: int) -> Any:
    return tree(100 + step)


def whole_steps(optimizer: optax.GradientTransformation) -> Any:
    parameters = tree(0)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters: Any, state: Any, gradients: Any) -> Any:
        metrics = step_metrics(jnp.float32(1.0), gradients)
        updates, new = optimizer.update(gradients, state, parameters)
        return guarded(metrics.finite, (optax.apply_updates(parameters, updates), new), (parameters, state))

    for number in range(STEPS):
        parameters, state = step(parameters, state, gradients(number))
    return parameters


def stage_steps(cut: CutOptimizer, loss: float = 1.0) -> list[dict[int, Any]]:
    """Return the weights of every stage by leaf, after three steps of all stages."""
    stages = [StageOptimizer(cut, part, MIRRORED[k], makes_loss=k == 2) for k, part in enumerate(STAGES)]
    weights = [to_stored(s.slots, dict(enumerate(jax.tree.leaves(tree(0))))) for s in stages]
    fresh = jax.tree.leaves(cut.optimizer.init(tree(0)))
    states = [s.to_stored(fresh) for s in stages]

    @functools.partial(jax.jit, static_argnums=0)
    def exports(k: int, inputs: Inputs, before: Sequence[Any]) -> Any:
        return stages[k].exports(len(before), inputs, known(before))

    @functools.partial(jax.jit, static_argnums=0)
    def update(k: int, inputs: Inputs, before: Sequence[Any]) -> Any:
        return stages[k].update(inputs, known(before))

    def known(before: Sequence[Any]) -> Any:
        return {v: x for number, vectors in enumerate(before) for v, x in receive(stages, number, vectors).items()}

    for number in range(STEPS):
        leaves = dict(enumerate(jax.tree.leaves(gradients(number))))
        inputs = [
            Inputs(to_stored(s.slots, leaves), weights[k], states[k], jnp.float32(loss) if s.makes_loss else None)
            for k, s in enumerate(stages)
        ]
        before: list[Any] = []
        for _ in cut.cut.exports:
            before.append([exports(k, inputs[k], before) for k in range(len(stages))])
        results = [update(k, inputs[k], before) for k in range(len(stages))]
        weights, states = [r[0] for r in results], [r[1] for r in results]
        weights[2][0] = weights[0][0]
        assert bool(results[0][2].finite) == np.isfinite(loss)
    return [to_user(s.slots, w) for s, w in zip(stages, weights, strict=True)]
