"""A step that is not finite changes nothing but the step number, wherever the state lives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.runtime.planned import BATCH, Planned, dp, planned, tp
from tests.support.small_models import Perceptron, regression, small_llama, stack

pytestmark = pytest.mark.multidevice


def perceptrons() -> Planned:
    """Layers whose input is an array of floats, so that a batch can hold a NaN."""
    model = regression(stack(4, lambda rngs: Perceptron(32, 64, rngs=rngs)), BATCH, 16, 32)
    return planned((dp(3), tp(2), dp(1), dp(3, "full"), dp()), model=model, optimizer=optax.adam(1e-2))


def host(tree: Any) -> list[np.ndarray[Any, Any]]:
    keys = jax.dtypes.prng_key
    leaves = jax.tree.leaves(tree)
    return [np.array(jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x) for x in leaves]


def test_step_with_a_nan_in_one_sample_leaves_the_state_as_it_was() -> None:
    sharded = perceptrons()
    state, metrics = sharded.programs.train(sharded.adopted(), sharded.placed(sharded.model.batch))
    assert bool(metrics.finite)
    before = host((state.parameters, state.optimizer, state.model_state))
    poisoned = np.array(sharded.model.batch)
    poisoned[-1, 0, 0] = np.nan
    state, metrics = sharded.programs.train(state, sharded.placed(poisoned))
    assert not bool(metrics.finite)
    assert int(state.step) == 2
    after = host((state.parameters, state.optimizer, state.model_state))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_gradient_norm_is_that_of_all_gradients() -> None:
    sharded = planned((dp(3), tp(2), tp(4, sp=True), dp(1)), model=small_llama(batch=BATCH, kv_heads=4))
    batch = sharded.placed(sharded.model.batch)
    _, gradients = sharded.programs.gradients(sharded.adopted(), batch)
    expected = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64))) for g in jax.tree.leaves(gradients)))
    _, metrics = sharded.programs.train(sharded.adopted(), batch)
    assert float(metrics.gradient_norm) == pytest.approx(expected, rel=1e-5)
