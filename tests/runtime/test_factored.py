"""Fused projections under tensor parallelism: stored with a dimension for the parts, seen by nobody."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

from galvatron_jax import plan_shardings
from galvatron_jax.cost import plan_collectives
from galvatron_jax.verify import collectives
from tests.runtime.planned import INVOLUNTARY, Strategies, dp, planned, tp
from tests.runtime.test_collectives import compiled_totals, predicted_totals
from tests.support.fused_models import fused

pytestmark = pytest.mark.multidevice

TOLERANCE = 1e-5
"""Absolute, and relative for losses: gradients of order 1 are float32 sums of hundreds of terms in another order."""

RATE = 1e-2


class Case(NamedTuple):
    strategies: Strategies
    microbatches: int = 1


CASES: dict[str, Strategies] = {
    "tp 8": (tp(8),) * 6,
    "tp 4, zero 1": (tp(4, zero=1),) * 6,
    "tp 2, zero 2, remat": (tp(2, zero=2, remat="full"),) * 6,
    "tp 2, zero 3": (tp(2, zero=3),) * 6,
    "tp 4, zero 3, sp": (tp(4, zero=3, sp=True),) * 6,
    "degrees change": (tp(8), tp(8), tp(2, zero=3), dp(3), tp(4, zero=1), tp(4)),
}
STEPS = {
    "tp 4, zero 1": Case((tp(4, zero=1),) * 6, 2),
    "tp 2 and 4, zero 3": Case((tp(2, zero=3), *(tp(2, zero=3),) * 3, tp(4, zero=3), tp(2, zero=2)), 2),
}


# ----------------------------------------------------------------------------------------------------------- one device
def optimizer() -> optax.GradientTransformation:
    """Clipping by the norm of all gradients, and decay of what the user sees as matrices: not of a bias."""
    decayed = optax.add_decayed_weights(0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    return optax.chain(optax.clip_by_global_norm(0.5), decayed, optax.sgd(RATE, momentum=0.9))


def batches() -> list[Any]:
    return [np.roll(fused().batch, k, axis=1) for k in range(3)]


class Reference(NamedTuple):
    """What one device makes of the user's own model."""

    losses: list[float]
    gradients: list[Any]
    """Of the first step."""
    parameters: list[Any]
    """After the third one."""


@functools.cache
def reference() -> Reference:
    user, rule = planned((dp(),) * 6, model=fused()).analysis.trace.model, optimizer()
    parameters, rest = user.build()

    @jax.jit
    def step(parameters: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: user.run(p, rest, batch)[0])(parameters)
        updates, state = rule.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, gradients

    state, losses, first = rule.init(parameters), [], None
    for batch in batches():
        parameters, state, loss, gradients = step(parameters, state, batch)
        losses.append(float(loss))
        first = first or jax.tree.leaves(gradients)
    return Reference(losses, first or [], jax.tree.leaves(parameters))


def assert_equal(found: Any, expected: list[Any]) -> None:
    for mine, theirs in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE)


# -------------------------------------------------------------------------------------------------------- eight devices
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_one_device_with_the_predicted_collectives(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sharded = planned(CASES[name], model=fused())
    state, batch = sharded.adopted(), sharded.placed(batches()[0])
    program: Any = sharded.programs.gradients
    compiled = program.lower(state, batch).compile()
    predicted = plan_collectives(sharded.plan, sharded.analysis.profile)
    assert compiled_totals(collectives(compiled.as_text())) == predicted_totals(predicted)
    loss, gradients = compiled(state, batch)
    assert float(loss) == pytest.approx(reference().losses[0], rel=TOLERANCE)
    assert_equal(sharded.user_tree(gradients), reference().gradients)
    assert INVOLUNTARY not in capfd.readouterr().err


@pytest.mark.parametrize("name", STEPS)
def test_steps_equal_one_device(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    sharded = planned(STEPS[name].strategies, model=fused(), microbatches=2, optimizer=optimizer())
    state, losses = sharded.adopted(), []
    for batch in batches():
        state, metrics = sharded.programs.train(state, sharded.placed(batch))
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, reference().losses, rtol=TOLERANCE)
    assert_equal(sharded.programs.to_user(state).parameters, reference().parameters)
    assert INVOLUNTARY not in capfd.readouterr().err


def test_state_is_the_users_and_goes_on_under_another_plan(capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint has the user's shapes, no device holds more of them, and other plans store them their own way."""
    before, after = (planned(CASES[name], model=fused()) for name in ("tp 4, zero 3, sp", "degrees change"))
    neutral = before.programs.to_user(before.adopted())
    abstract = before.programs.abstract_neutral_state
    for mine, user, form in zip(
        jax.tree.leaves(neutral.parameters),
        jax.tree.leaves(before.parts()[0]),
        jax.tree.leaves(abstract.parameters),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, user)
        assert (form.shape, form.sharding) == (user.shape, mine.sharding)
    kernels = {p: x for p, x in _by_path(neutral.parameters).items() if "qkv" in p or "gate_up" in p}
    assert all(x.sharding.shard_shape(x.shape)[0] == x.shape[0] // 8 for p, x in kernels.items() if "kernel" in p)
    again = jax.device_put(neutral, jax.tree.map(lambda x: x.sharding, after.programs.abstract_neutral_state))
    stored = after.programs.to_stored(again)
    assert any(x.shape == (4, 32, 3, 32) for x in jax.tree.leaves(before.adopted()))
    assert any(x.shape == (32, 3, 32) for x in jax.tree.leaves(stored))
    for mine, theirs in zip(jax.tree.leaves(after.programs.to_user(stored)), jax.tree.leaves(neutral), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert INVOLUNTARY not in capfd.readouterr().err


def test_exported_shardings_say_what_they_cannot() -> None:
    model = fused()
    sharded = planned(CASES["tp 4, zero 1"], model=model)
    with pytest.warns(UserWarning, match=r"blocks\.0\.gate_up\.kernel.* 12 fused parameters .* gathers them"):
        places = plan_shardings(sharded.plan, model.build, model.batch, loss=model.loss)
    kept = sharded.programs.abstract_neutral_state.parameters
    assert jax.tree.leaves(places) == [leaf.sharding for leaf in jax.tree.leaves(kept)]


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
