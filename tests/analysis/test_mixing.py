# mypy: disable-error-code=no-any-return
"""Losses that several microbatches change: what is reported, against the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.analysis import Analysis, analyse_model, analysis_lines
from tests.zoo import SAMPLES, ZOO, Case

WIDTH, SEQ = 16, 8
SAME = 1e-5


class Perceptron(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(x)))


def errors(model: Any, batch: Any) -> jax.Array:
    return (model(batch["x"]) - batch["y"]) ** 2


def mean_of_samples(model: Any, batch: Any) -> jax.Array:
    return errors(model, batch).mean()


def weighted_by_parameters(model: Any, batch: Any) -> jax.Array:
    found = errors(model, batch)
    return found.sum() / found.shape[0] * jnp.exp(-model.up.bias[0]) + model.up.bias[0]


def mean_of_what_counts(model: Any, batch: Any) -> jax.Array:
    counts = (batch["x"][..., 0] > 0).astype(jnp.float32)
    return (errors(model, batch).mean(-1) * counts).sum() / counts.sum()


def masked_mean_by_where(model: Any, batch: Any) -> jax.Array:
    return jnp.mean(errors(model, batch).mean(-1), where=batch["x"][..., 0] > 0)


def root_of_the_mean(model: Any, batch: Any) -> jax.Array:
    return jnp.sqrt(errors(model, batch).mean())


def product_of_means(model: Any, batch: Any) -> jax.Array:
    return errors(model, batch).mean() * batch["y"].mean()


def centred_on_the_batch(model: Any, batch: Any) -> jax.Array:
    found = model(batch["x"])
    return ((found - found.mean(axis=0)) ** 2).mean()


def contrastive(model: Any, batch: Any) -> jax.Array:
    found, wanted = model(batch["x"]).mean(1), batch["y"].mean(1)
    return optax.softmax_cross_entropy_with_integer_labels(found @ wanted.T, jnp.arange(found.shape[0])).mean()


def worst_sample(model: Any, batch: Any) -> jax.Array:
    return errors(model, batch).mean((1, 2)).max()


PLAIN = (mean_of_samples, weighted_by_parameters)
MIXED = (
    mean_of_what_counts,
    masked_mean_by_where,
    root_of_the_mean,
    product_of_means,
    centred_on_the_batch,
    contrastive,
    worst_sample,
)


def case_of(loss: Callable[[Any, Any], jax.Array]) -> Case:
    x, y = np.random.default_rng(0).normal(size=(2, SAMPLES, SEQ, WIDTH)).astype(np.float32)
    return Case(lambda: Perceptron(rngs=nnx.Rngs(0)), loss, {"x": x, "y": y}, ())


def survives_microbatches(analysis: Analysis, batch: Any) -> bool:
    """Tell by numbers whether the mean over two halves is the loss of the batch."""
    parameters, state = analysis.trace.model.build()

    @jax.jit
    def loss(part: Any) -> Any:
        value = analysis.trace.model.run(parameters, state, part)[0]
        return value[0] if isinstance(value, tuple) else value

    half = SAMPLES // 2
    halves = [float(loss(jax.tree.map(lambda x, at=at: x[at : at + half], batch))) for at in (0, half)]
    return bool(np.mean(halves) == pytest.approx(float(loss(batch)), rel=SAME))


@pytest.mark.parametrize("loss", [*PLAIN, *MIXED])
def test_losses_that_microbatches_change_are_those_reported(loss: Callable[[Any, Any], jax.Array]) -> None:
    case = case_of(loss)
    analysis = analyse_model(case.build, case.loss, case.spec)
    assert survives_microbatches(analysis, case.batch) == (loss in PLAIN) == (not analysis.mixed_samples)


@pytest.mark.parametrize("name", ["moe ragged", "moe alternating", "perceiver", "convnet linen"])
def test_models_of_the_zoo_mix_samples_where_the_numbers_say_so(name: str) -> None:
    case = ZOO[name]()
    analysis = analyse_model(case.build, case.loss, case.spec)
    assert survives_microbatches(analysis, case.batch) == (not analysis.mixed_samples)


def test_report_says_what_mixes() -> None:
    case = case_of(mean_of_what_counts)
    analysis = analyse_model(case.build, case.loss, case.spec)
    assert [where.split(" in ")[0] for where in analysis.mixed_samples] == ["div"]
    text = "\n".join("".join(str(piece) for piece in line) for line in analysis_lines(analysis))
    assert "no mean over samples (div in" in text
