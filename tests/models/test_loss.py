"""The loss against optax, for values, gradients, memory and sharding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.errors import AnalysisError
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.models._loss import cross_entropy

F32 = 1e-5
"""Relative error of float32 sums over 16 to 64 terms in another order, with room."""


def logits_and_targets(dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    logits_BSV = 4 * jax.random.normal(jax.random.key(0), (2, 8, 64))
    return logits_BSV.astype(dtype), jax.random.randint(jax.random.key(1), (2, 8), 0, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_equals_optax(dtype: str) -> None:
    logits_BSV, targets_BS = logits_and_targets(dtype)
    expected_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV.astype(jnp.float32), targets_BS)
    loss_BS = cross_entropy(logits_BSV, targets_BS)
    assert loss_BS.dtype == jnp.float32
    np.testing.assert_allclose(loss_BS, expected_BS, rtol=F32)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", F32), ("bfloat16", 2**-8)])
def test_cross_entropy_gradient_equals_optax(dtype: str, tolerance: float) -> None:
    logits_BSV, targets_BS = logits_and_targets(dtype)
    weight_BS = jnp.arange(16.0).reshape(2, 8)

    def reference(logits32_BSV: jax.Array) -> jax.Array:
        return jnp.vdot(weight_BS, optax.softmax_cross_entropy_with_integer_labels(logits32_BSV, targets_BS))

    expected_BSV = jax.grad(reference)(logits_BSV.astype(jnp.float32))
    slope_BSV = jax.grad(lambda z: jnp.vdot(weight_BS, cross_entropy(z, targets_BS)))(logits_BSV)
    assert slope_BSV.dtype == dtype
    np.testing.assert_allclose(slope_BSV.astype(jnp.float32), expected_BSV, rtol=tolerance, atol=16 * F32)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_cross_entropy_huge_logits_stay_finite(scale: float) -> None:
    logits_BSV, targets_BS = logits_and_targets()
    value, slope = jax.value_and_grad(lambda z: cross_entropy(z, targets_BS).sum())(scale * logits_BSV)
    assert jnp.isfinite(value)
    assert jnp.isfinite(slope).all()


def test_cross_entropy_keeps_logits_and_one_number_per_position() -> None:
    logits_BSV, targets_BS = logits_and_targets("bfloat16")
    _, pullback = jax.vjp(lambda z: cross_entropy(z, targets_BS), logits_BSV)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert kept <= logits_BSV.nbytes + 4 * 16 + targets_BS.nbytes


@pytest.mark.multidevice
def test_cross_entropy_sharded_vocabulary_is_never_gathered() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("tp",))
    logits_BSV, targets_BS = logits_and_targets()
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, None, "tp"), ()))
    sharded_BSV = jax.device_put(logits_BSV, split)

    step = jax.jit(
        jax.value_and_grad(lambda z, t: cross_entropy(z, t).mean()),
        out_shardings=(whole, split),
    )
    compiled = step.lower(sharded_BSV, jax.device_put(targets_BS, whole)).compile()
    text = compiled.as_text()
    assert text is not None
    assert "all-reduce" in text
    assert not [kind for kind in ("all-gather", "all-to-all", "collective-permute") if kind in text]
    loss, _ = compiled(sharded_BSV, jax.device_put(targets_BS, whole))
    np.testing.assert_allclose(loss, cross_entropy(logits_BSV, targets_BS).mean(), rtol=F32)


def tiny_llama() -> Llama:
    config = LlamaConfig(vocab=31, embed=16, mlp=24, layers=1, heads=4, kv_heads=2, seq=8)
    return Llama(config, rngs=nnx.Rngs(0))


def test_next_token_loss_of_both_batch_forms_is_the_same_scalar() -> None:
    model, tokens = tiny_llama(), jax.random.randint(jax.random.key(0), (2, 9), 0, 31)
    logits_BSV = model(tokens[:, :-1]).astype(jnp.float32)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, tokens[:, 1:]).mean()
    for batch in (tokens, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}):
        loss = next_token_loss(model, batch)
        assert loss.shape == ()
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=F32)


def test_next_token_loss_gradient_reaches_every_parameter_and_is_finite() -> None:
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 31)
    slopes = nnx.jit(nnx.grad(next_token_loss))(tiny_llama(), tokens)
    for path, slope in nnx.to_flat_state(slopes):
        assert jnp.isfinite(slope[...]).all(), path
        assert jnp.abs(slope[...]).max() > 0, path


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": jnp.zeros((2, 3), jnp.int32)}, r"keys \['tokens'\]"),
        (jnp.zeros((2, 1), jnp.int32), r"shape \(2, 1\)"),
        (jnp.zeros((6,), jnp.int32), r"shape \(6,\)"),
    ],
)
def test_next_token_loss_of_another_batch_says_what_is_expected(batch: object, message: str) -> None:
    with pytest.raises(AnalysisError, match=message + r".*inputs"):
        next_token_loss(tiny_llama(), batch)  # type: ignore[arg-type]  # wrong on purpose
