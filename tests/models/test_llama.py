"""The Llama against formulas written down independently, in float32 at tiny sizes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from galvatron_jax.errors import ModelError
from galvatron_jax.models import Llama, LlamaConfig
from galvatron_jax.models._config import ComputeDtype
from galvatron_jax.models._llama import RMSNorm, SwiGLU, rotate

TINY = LlamaConfig(vocab=31, embed=16, mlp=24, layers=2, heads=4, kv_heads=2, seq=8, dtype="float32")

F32 = 1e-5
"""Relative error of float32 sums in another order: some 10 units of 1.2e-7 times the depth of the model."""


def tokens(batch: int = 2, seq: int = 8, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, seq), 0, TINY.vocab)


def model(config: LlamaConfig = TINY) -> Llama:
    return Llama(config, rngs=nnx.Rngs(0))


@nnx.jit
def logits_of(llama: Llama, tokens_BS: jax.Array) -> jax.Array:
    return llama(tokens_BS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq", [1, 5, 12])
def test_llama_any_length_gives_logits_in_compute_dtype(dtype: ComputeDtype, seq: int) -> None:
    logits_BSV = logits_of(model(replace(TINY, dtype=dtype)), tokens(3, seq))
    assert logits_BSV.shape == (3, seq, TINY.vocab)
    assert logits_BSV.dtype == dtype


def test_llama_parameters_are_float32_and_trees_are_named() -> None:
    state = nnx.state(model(replace(TINY, dtype="bfloat16")), nnx.Param)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}
    block = ["attention.key", "attention.out", "attention.query", "attention.value", "mlp.down", "mlp.gate", "mlp.up"]
    assert set(leaves) == {
        "embed.embedding",
        "norm.scale",
        "head.kernel",
        *(f"layers.{i}.{name}.kernel" for i in range(2) for name in block),
        *(f"layers.{i}.{name}_norm.scale" for i in range(2) for name in ("attention", "mlp")),
    }


def test_llama_future_tokens_do_not_change_past_logits() -> None:
    llama, first = model(), tokens()
    second = first.at[:, 5:].set((first[:, 5:] + 1) % TINY.vocab)
    before, after = logits_of(llama, first), logits_of(llama, second)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert jnp.abs(before[:, 5:] - after[:, 5:]).max() > 1e-4


def test_llama_gqa_equals_mha_with_repeated_heads() -> None:
    grouped, full = model(), model(replace(TINY, kv_heads=TINY.heads))
    nnx.update(full, nnx.state(grouped, lambda path, _: not {"key", "value"} & set(path)))
    for source, target in zip(grouped.layers, full.layers, strict=True):
        for name in ("key", "value"):
            kernel_EKD = getattr(source.attention, name).kernel[...].reshape(TINY.embed, TINY.kv_heads, TINY.head_dim)
            kernel_EHD = jnp.repeat(kernel_EKD, TINY.heads // TINY.kv_heads, axis=1)
            getattr(target.attention, name).kernel[...] = kernel_EHD.reshape(TINY.embed, -1)
    np.testing.assert_allclose(logits_of(grouped, tokens()), logits_of(full, tokens()), rtol=F32, atol=F32)


def test_llama_tied_uses_embedding_as_head() -> None:
    tied, untied = model(replace(TINY, tied=True)), model()
    assert not hasattr(tied, "head")
    nnx.update(untied, nnx.state(tied))
    untied.head.kernel[...] = tied.embed.embedding[...].T
    np.testing.assert_allclose(logits_of(tied, tokens()), logits_of(untied, tokens()), rtol=F32, atol=F32)


def test_llama_bfloat16_is_near_float32() -> None:
    exact = logits_of(model(), tokens())
    rounded = logits_of(model(replace(TINY, dtype="bfloat16")), tokens())
    error = jnp.abs(exact - rounded.astype(jnp.float32)).max()
    # bfloat16 keeps 8 bits: 0.4 % per rounding, some ten of them in a row.
    assert 0 < error < 0.04 * jnp.abs(exact).max()


def test_rmsnorm_matches_formula() -> None:
    norm = RMSNorm(replace(TINY, norm_eps=0.5))
    norm.scale[...] = jnp.arange(1.0, 17.0)
    x_BSE = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    expected = np.arange(1, 17) * x_BSE / np.sqrt((x_BSE**2).sum(-1, keepdims=True) / 16 + 0.5)
    np.testing.assert_allclose(norm(jnp.asarray(x_BSE)), expected, rtol=F32)


def test_rmsnorm_takes_statistics_in_float32() -> None:
    # 200² is finite in float16, its sum over 16 is not.
    x_BSE = jnp.full((1, 1, 16), 200.0, jnp.float16)
    np.testing.assert_allclose(RMSNorm(TINY)(x_BSE), jnp.ones((1, 1, 16)), rtol=1e-3)


def test_swiglu_matches_formula() -> None:
    mlp = SwiGLU(TINY, rngs=nnx.Rngs(0))
    x_BSE = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    gate, up, down = (np.asarray(part.kernel[...], np.float64) for part in (mlp.gate, mlp.up, mlp.down))
    gated = x_BSE @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x_BSE @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x_BSE)), expected, rtol=1e-4, atol=1e-7)


def test_rotate_matches_complex_product_of_halves() -> None:
    x_BSND = np.random.default_rng(0).normal(size=(2, 7, 3, 8))
    plane_BSNR = x_BSND[..., :4] + 1j * x_BSND[..., 4:]
    angle_SR = np.arange(7)[:, None] * 100.0 ** (-np.arange(4) / 4)
    turned_BSNR = plane_BSNR * np.exp(1j * angle_SR)[None, :, None, :]
    expected = np.concatenate([turned_BSNR.real, turned_BSNR.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x_BSND, jnp.float32), 100.0), expected, rtol=F32, atol=F32)


def test_rotate_products_depend_on_distance_only() -> None:
    q_D, k_D = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    q_SD, k_SD = (
        np.asarray(rotate(jnp.asarray(np.tile(head_D, (1, 20, 1, 1))), 10_000.0))[0, :, 0] for head_D in (q_D, k_D)
    )
    scores_ST = q_SD @ k_SD.T
    for distance in range(-19, 20):
        diagonal = np.diagonal(scores_ST, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=20 * F32)
    assert np.ptp(scores_ST[0]) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "embed=16 must be heads=3"),
        ({"heads": 16}, "even head size"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"layers": 0}, "layers=0 must be positive"),
        ({"attention": "cudnn"}, "needs dtype='bfloat16'"),
    ],
)
def test_config_contradiction_is_refused_with_values(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        replace(TINY, **change)  # type: ignore[arg-type]  # the values are wrong on purpose


def test_config_several_contradictions_are_reported_together() -> None:
    with pytest.raises(ModelError, match=r"even head size.*kv_heads=5"):
        replace(TINY, heads=16, kv_heads=5)
