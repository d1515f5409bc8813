"""Where the state lives: bytes per device by zero level, donation, adoption, creation under jit; random state."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.errors import PlanError
from galvatron_jax.plan import Strategy
from tests.runtime.planned import BATCH, DEVICES, Planned, dp, hsdp, planned, tp, tp_hsdp, ulysses
from tests.support.small_models import SmallModel, small_llama

pytestmark = pytest.mark.multidevice

PARAMETERS = 2 * 128 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
"""Of ``llama()``: embedding and head, four layers, the last norm."""
NORMS = (2 * 4 + 1) * 64
"""Of these, weights that tensor parallelism leaves whole."""
MATRICES = PARAMETERS - NORMS


def device_bytes(tree: Any) -> list[int]:
    """Bytes of all leaves on each device."""
    return [
        sum(s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == device)
        for device in jax.devices()[:DEVICES]
    ]


@pytest.mark.parametrize(
    ("strategy", "parameters", "gradients", "optimizer"),
    [
        (dp(0), PARAMETERS, PARAMETERS, PARAMETERS),
        (dp(1), PARAMETERS, PARAMETERS, PARAMETERS // 8),
        (dp(2), PARAMETERS, PARAMETERS // 8, PARAMETERS // 8),
        (dp(3), PARAMETERS // 8, PARAMETERS // 8, PARAMETERS // 8),
        (tp(8), MATRICES // 8 + NORMS, MATRICES // 8 + NORMS, MATRICES // 8 + NORMS),
        (tp(2, zero=1), MATRICES // 2 + NORMS, MATRICES // 2 + NORMS, MATRICES // 8 + NORMS // 4),
        (tp(2, zero=3), *[MATRICES // 8 + NORMS // 4] * 3),
        (tp(4, zero=2), MATRICES // 4 + NORMS, *[MATRICES // 8 + NORMS // 2] * 2),
        (hsdp(1, 2), PARAMETERS, PARAMETERS, PARAMETERS // 4),
        (hsdp(2, 2), PARAMETERS, PARAMETERS // 4, PARAMETERS // 4),
        (hsdp(3, 2), *[PARAMETERS // 4] * 3),
        (hsdp(3, 4), *[PARAMETERS // 2] * 3),
        (tp_hsdp(2, 3, 2), *[MATRICES // 4 + NORMS // 2] * 3),
        (ulysses(4), *[PARAMETERS] * 3),
        (ulysses(4, zero=1), PARAMETERS, PARAMETERS, PARAMETERS // 8),
        (ulysses(2, zero=2), PARAMETERS, PARAMETERS // 8, PARAMETERS // 8),
        (ulysses(8, zero=3), *[PARAMETERS // 8] * 3),
        (ulysses(4, zero=3, replicas=2), *[PARAMETERS // 4] * 3),
    ],
    ids=str,
)
def test_every_device_holds_what_the_zero_level_says(
    strategy: Strategy, parameters: int, gradients: int, optimizer: int
) -> None:
    sharded = planned((strategy,) * 6)
    state = sharded.adopted()
    moments = [moment for moment in state.optimizer if moment.ndim]  # not Adam's count of steps
    assert device_bytes(state.parameters) == [4 * parameters] * DEVICES
    assert device_bytes(moments) == [2 * 4 * optimizer] * DEVICES
    places = sharded.programs.model.parameter_shardings("gradient")
    stored = state.parameters
    found = sum(math.prod(place.shard_shape(leaf.shape)) for place, leaf in zip(places, stored, strict=True))
    assert found == gradients


def test_parameters_that_dp_does_not_divide_stay_whole() -> None:
    model = small_llama(batch=BATCH, layers=2, embed=12, heads=2, kv_heads=1, mlp=24, vocab=16)
    sharded = planned((dp(3),) * 4, model=model)
    leaves = jax.tree.leaves(sharded.parts()[0])
    divided = sum(leaf.size for leaf in leaves if any(n % 8 == 0 for n in leaf.shape))
    whole = sum(leaf.size for leaf in leaves) - divided
    assert whole > 0
    assert device_bytes(sharded.adopted().parameters) == [4 * (divided // 8 + whole)] * DEVICES


def test_train_donates_its_state_and_leaves_the_user_s_model_alone() -> None:
    sharded = planned((dp(), dp(3, "full"), tp(2), tp(8)), model=small_llama(batch=BATCH))
    parameters, rest = sharded.parts()
    kept = [np.array(leaf) for leaf in jax.tree.leaves(parameters)]
    state = sharded.programs.adopt(parameters, rest)
    batch = sharded.placed(sharded.model.batch)
    after, _ = sharded.programs.train(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.parameters, state.optimizer)))
    assert not any(leaf.is_deleted() for leaf in [*jax.tree.leaves(parameters), *batch])
    for leaf, before, trained in zip(
        jax.tree.leaves(parameters), kept, jax.tree.leaves(sharded.programs.to_user(after).parameters), strict=True
    ):
        np.testing.assert_array_equal(leaf, before)
        assert not np.array_equal(trained, before)


def test_state_after_a_step_lives_where_it_lived_before() -> None:
    sharded = planned((dp(3), tp(2, zero=1), tp(4, sp=True), dp(2)), model=small_llama(batch=BATCH, kv_heads=4))
    state, _ = sharded.programs.train(sharded.adopted(), sharded.placed(sharded.model.batch))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == sharded.programs.state_shardings


def test_created_state_equals_the_adopted_one_and_no_device_ever_holds_it_whole() -> None:
    sharded = planned((dp(3), dp(3), tp(2, zero=3), tp(8)), model=small_llama(batch=BATCH, embed=64, vocab=128))
    created = sharded.programs.create(sharded.parts)
    adopted = sharded.adopted()
    assert jax.tree.map(lambda leaf: leaf.sharding, created) == sharded.programs.state_shardings
    assert device_bytes(created) == device_bytes(adopted)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(adopted.parameters))
    assert max(device_bytes(created.parameters)) < total / 7
    for one, other in zip(jax.tree.leaves(created.parameters), jax.tree.leaves(adopted.parameters), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)  # 0.02 * normal, computed by parts: last place only


# -------------------------------------------------------------------------------------------------------- random state
class Masked(nnx.Module):
    """Two layers of weights behind dropout, so that gradients show the masks."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Gate(rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Gate(nnx.Module):
    """``x @ w``, half of it dropped."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Linear(16, 16, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(self.weight(x))


def masked() -> SmallModel:
    return SmallModel(
        lambda: Masked(rngs=nnx.Rngs(params=0, dropout=1)),
        lambda model, batch: jnp.mean(jnp.square(model(batch))),
        np.random.default_rng(0).normal(size=(BATCH, 16)).astype(np.float32),
    )


def test_dropout_draws_a_new_mask_for_each_microbatch_as_calls_in_turn_do() -> None:
    model = masked()
    sharded = planned((dp(1),) * 3, model=model, microbatches=2, optimizer=optax.sgd(1.0))
    assert_equal_to_calls_in_turn(sharded, microbatches=2)


def assert_equal_to_calls_in_turn(sharded: Planned, *, microbatches: int) -> None:
    """Hold loss, gradients and random state against the user's own model, called once per microbatch."""
    own = sharded.model.build()
    losses, gradients = [], []
    for part in np.split(sharded.model.batch, microbatches):
        loss, gradient = nnx.value_and_grad(sharded.model.loss)(own, part)
        losses.append(float(loss))
        gradients.append(jax.tree.leaves(gradient))
    initial = jax.tree.leaves(sharded.parts()[0])
    state, metrics = sharded.programs.train(sharded.adopted(), sharded.placed(sharded.model.batch))
    assert float(metrics.loss) == pytest.approx(np.mean(losses), rel=1e-6)
    trained = jax.tree.leaves(sharded.programs.to_user(state).parameters)
    for before, after, *parts in zip(initial, trained, *gradients, strict=True):
        np.testing.assert_allclose(before - after, np.mean(parts, axis=0), rtol=1e-5, atol=1e-7)
    rest = nnx.state(own, nnx.Not(nnx.Param))
    for mine, theirs in zip(jax.tree.leaves(state.model_state), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(_plain(mine), _plain(theirs))


def _plain(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value)


# ------------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("strategy", "batch", "microbatches", "problem"),
    [
        (dp(), 12, 1, "microbatch of 12 samples does not divide by dp=8"),
        (dp(), 16, 4, "microbatch of 4 samples does not divide by dp=8"),
        (tp(2), 12, 2, "microbatch of 6 samples does not divide by dp=4"),
    ],
)
def test_batch_that_does_not_divide_is_refused_before_anything_is_compiled(
    strategy: Strategy, batch: int, microbatches: int, problem: str
) -> None:
    with pytest.raises(PlanError, match=problem):
        planned((strategy,) * 4, model=small_llama(batch=batch), microbatches=microbatches)


def test_tensor_degree_that_divides_no_heads_is_refused() -> None:
    with pytest.raises(PlanError, match="tp=8 does not divide"):
        planned((tp(8),) * 4, model=small_llama(batch=BATCH, heads=4, kv_heads=4))
