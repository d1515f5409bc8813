"""Flax models of ``transformers`` 4.51.3, which nobody here wrote: cut with the loss and all gradients of the original.

An optional test dependency: ``pip install transformers==4.51.3`` (the last versions with Flax models).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galvatron_jax.analysis import analyse_model
from tests.analysis.test_zoo import FAST_COMPILE, numbers, run_segments

transformers = pytest.importorskip("transformers", reason="the Flax models of transformers 4.51.3 are not installed")
if not hasattr(transformers, "FlaxLlamaForCausalLM"):
    pytest.skip("this transformers has no Flax models any more", allow_module_level=True)

TOLERANCE = 1e-5
"""The same float32 operations in another program; losses are of order 1, gradients smaller."""

IDS = np.random.default_rng(0).integers(1, 64, (4, 16), dtype=np.int32)
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def next_token(logits: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]))


def causal(module: Any, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return next_token(module(ids, jnp.ones_like(ids), positions, deterministic=False).logits)


def bidirectional(module: Any, ids: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    ones = jnp.ones_like(ids)
    return next_token(module(ids, ones, ones * 0, positions, None, deterministic=False).logits)


def llama() -> Any:
    config = transformers.LlamaConfig(**TINY, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=32)
    return transformers.FlaxLlamaForCausalLM(config, _do_init=False)


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.FlaxGPT2LMHeadModel(config, _do_init=False)


def bert() -> Any:
    config = transformers.BertConfig(**TINY, intermediate_size=64, max_position_embeddings=32)
    return transformers.FlaxBertForMaskedLM(config, _do_init=False)


MODELS: dict[str, tuple[Callable[[], Any], Callable[..., Any], str]] = {
    "llama": (llama, causal, "model.layers.*"),
    "gpt2": (gpt2, causal, "transformer.h.*"),
    "bert": (bert, bidirectional, "bert.encoder.layer.*"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*", "ignore::DeprecationWarning")
def test_cut_model_has_loss_and_gradients_of_the_original(name: str) -> None:
    build, loss, pattern = MODELS[name]
    module = build().module
    analysis = analyse_model(module, loss, IDS)
    assert [s.kind for s in analysis.cut.segments] == ["embed", pattern, pattern, "head"]
    assert "key" in analysis.trace.model.roles or name == "llama", "dropout is on where the model has it"

    model, rows = analysis.trace.model, analysis.trace.rows
    parameters, state = jax.jit(model.build, compiler_options=FAST_COMPILE)()

    def cut(parameters: Any, state: Any) -> tuple[jax.Array, Any]:
        leaves = [leaf for tree in (*rows.apart(parameters, state), IDS) for leaf in jax.tree.leaves(tree)]
        value, *new = run_segments(analysis, leaves)
        return value, new

    def original(parameters: Any, state: Any) -> tuple[jax.Array, Any]:
        value, state = model.run(parameters, state, IDS)
        return value, jax.tree.leaves(state)

    both = [jax.value_and_grad(function, has_aux=True) for function in (original, cut)]
    compiled = jax.jit(lambda *trees: [function(*trees) for function in both], compiler_options=FAST_COMPILE)
    expected, got = (jax.tree.leaves(result) for result in compiled(parameters, state))
    assert len(expected) == len(got) > len(jax.tree.leaves(parameters))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(numbers(b), numbers(a), rtol=TOLERANCE, atol=TOLERANCE)
