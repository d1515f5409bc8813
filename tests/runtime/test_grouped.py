"""Depthwise convolutions under plans that copy samples over tensor ranks: XLA alone gets their gradient wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from galvatron_jax.analysis import analyse_model
from galvatron_jax.plan import Strategy
from galvatron_jax.runtime._slots import to_user
from tests.runtime.zoo_plans import compiled_totals, difference, plan_for, predicted_totals, programs_for

pytestmark = pytest.mark.multidevice

TOLERANCE = 1e-5
"""Float32 sums over 128 positions in another order; the wrong gradients were off by 0.8 of their size."""


class Layer(nn.Module):
    """A depthwise convolution in time, and an mlp that tensor parallelism divides."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = x + nn.Conv(width, (4,), feature_group_count=self.groups, padding="CAUSAL")(x)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(x)))


class Network(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(16)(x)
        for i in range(2):
            x = Layer(self.groups, name=f"layer_{i}")(x)
        return nn.Dense(4)(x)


def loss(model: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.sin(model(batch)))


@pytest.mark.parametrize(
    ("groups", "strategy"),
    [
        (16, Strategy(tp=2, dp=4, zero=2)),
        (4, Strategy(tp=4, dp=2, remat="full")),
        (16, Strategy(dp=8, zero=3, replicas=2)),
    ],
)
def test_gradient_of_a_grouped_kernel_is_that_of_one_device(groups: int, strategy: Strategy) -> None:
    batch = np.random.default_rng(0).normal(size=(8, 16, 16)).astype(np.float32)
    analysis = analyse_model(Network(groups), loss, jax.ShapeDtypeStruct(batch.shape, batch.dtype))
    layers = {i for i, segment in enumerate(analysis.cut.segments) if segment.kind.startswith("layer")}
    plan = plan_for(analysis, lambda position, _: strategy if position in layers else Strategy(dp=8))
    programs = programs_for(analysis, plan)
    parameters, state = analysis.trace.model.build()
    expected = jax.grad(lambda p: analysis.trace.model.run(p, state, batch)[0])(parameters)
    gradients: Any = programs.gradients
    compiled = gradients.lower(programs.abstract_state, [jax.ShapeDtypeStruct(batch.shape, batch.dtype)]).compile()
    stored = compiled(programs.adopt(parameters, state), programs.place_batch([batch]))[1]
    found = to_user(programs.model.slots, stored)
    for i, wanted in enumerate(jax.tree.leaves(expected)):
        np.testing.assert_allclose(found[i], wanted, rtol=TOLERANCE, atol=TOLERANCE * np.max(np.abs(wanted)))
    assert difference(compiled_totals(compiled.as_text()), predicted_totals(plan, analysis)) == {}
