"""Attention put back where the analysis saw its XLA form: rank by rank, with nothing communicated.

cuDNN runs on GPUs alone, so its place is taken by JAX's own XLA form, called in the same way on each rank's shards.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from galvatron_jax.analysis._attention import _KERNELS
from galvatron_jax.plan import Strategy
from galvatron_jax.runtime import _attention
from tests.runtime.planned import INVOLUNTARY, dp, hsdp, planned, tp, ulysses
from tests.runtime.zoo_plans import compiled_totals, predicted_totals
from tests.support.attention_models import HEADS, LAYERS, attention_model

pytestmark = pytest.mark.multidevice

TOLERANCE = 1e-5
"""Absolute, and relative for losses: float32 sums in another order."""


class Case(NamedTuple):
    form: str
    kv_heads: int
    strategy: Strategy
    kernel: bool = True
    """False: ranks sum the gradients of their own copies of an operand, which the XLA form does."""


CASES = {
    "dp": Case("causal", HEADS, dp()),
    "zero 3, remat": Case("causal", 2, dp(3, remat="full")),
    "dots": Case("window", HEADS, dp(2, remat="dots")),
    "tp 4, sp": Case("causal", 4, tp(4, sp=True)),
    "more ranks than kv heads": Case("causal", 2, tp(4, zero=3)),
    "one kv head": Case("causal", 1, tp(8)),
    "mask": Case("mask", HEADS, tp(2, zero=1)),
    "lengths": Case("lengths", 4, tp(2, zero=1, sp=True)),
    "ulysses": Case("causal", HEADS, ulysses(4, zero=3)),
    "ulysses, grouped, remat": Case("causal", 4, ulysses(2, remat="full")),
    "hsdp": Case("causal", HEADS, hsdp(3, 2)),
    "learned bias": Case("learned bias", HEADS, tp(2, zero=3)),
    "copies of a learned bias": Case("learned bias", HEADS, hsdp(3, 2), kernel=False),
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the XLA form, in any dtype, stand in for the kernel on CPU devices."""
    monkeypatch.setitem(_KERNELS, "cpu", "xla")
    monkeypatch.setattr(_attention, "KERNEL_DTYPES", ("float32",))


@functools.cache
def reference(form: str, kv_heads: int) -> tuple[float, list[Any]]:
    """Loss and gradients of the user's own model on one device."""
    model = attention_model(form, kv_heads=kv_heads, kernel="xla")
    user = planned((dp(),) * (LAYERS + 2), model=model).analysis.trace.model
    parameters, rest = user.build()
    value, gradients = jax.jit(jax.value_and_grad(lambda p: user.run(p, rest, model.batch)[0]))(parameters)
    return float(value), jax.tree.leaves(gradients)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", CASES)
def test_layers_with_the_kernel_equal_one_device_with_the_predicted_collectives(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    model = attention_model(case.form, kv_heads=case.kv_heads)
    sharded = planned((case.strategy,) * (LAYERS + 2), model=model)
    state, batch = sharded.adopted(), sharded.placed(model.batch)
    program: Any = sharded.programs.gradients
    lowered = program.lower(state, batch)
    assert ("manual_computation" in lowered.as_text() or "shard_map" in lowered.as_text()) is case.kernel
    compiled = lowered.compile()
    predicted = predicted_totals(sharded.plan, sharded.analysis)
    assert compiled_totals(compiled.as_text()) == predicted
    loss, gradients = compiled(state, batch)
    expected, others = reference(case.form, case.kv_heads)
    assert float(loss) == pytest.approx(expected, rel=TOLERANCE)
    for mine, theirs in zip(jax.tree.leaves(sharded.user_tree(gradients)), others, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE)
    assert INVOLUNTARY not in capfd.readouterr().err
