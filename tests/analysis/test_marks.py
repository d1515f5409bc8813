"""Tracing leaves no trace: classes, functions and the user's own object are as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from galvatron_jax.analysis import Loss
from galvatron_jax.analysis._attention import CUDNN_NAME
from galvatron_jax.analysis._jaxpr import inner_programs, open_program, scope_of
from galvatron_jax.analysis._marks import ATTENTION, MARK, marked_calls
from galvatron_jax.analysis._read import read_model
from galvatron_jax.analysis._read_nnx import PATH_ATTRIBUTE
from galvatron_jax.analysis._trace import Trace, trace_loss
from galvatron_jax.errors import AnalysisError
from galvatron_jax.models import Llama, LlamaConfig
from tests.support.small_models import Perceptron, SmallModel, perceptrons, small_llama, transformers

CLASSES = (Llama, nnx.Linear, nnx.Embed, nnx.LayerNorm, nnx.MultiHeadAttention, Perceptron)


def trace(model: SmallModel) -> Trace:
    return trace_of(model.build, model.loss, model.abstract_batch)


def trace_of(model: Any, loss: Loss, batch: Any) -> Trace:
    return trace_loss(read_model(model, loss, batch), batch, where=loss.__name__)


def scopes(program: Any) -> Iterator[str]:
    for eqn in open_program(program)[0].eqns:
        yield scope_of(eqn)
        for inner in inner_programs(eqn):
            yield from scopes(inner)


def marked_paths(traced: Trace) -> set[str]:
    return {mark[1] for scope in scopes(traced.program) for mark in MARK.finditer(scope)}


# ---------------------------------------------------------------------------------------------------------------- marks
def test_every_module_call_carries_its_path() -> None:
    parts = ("", ".norm", ".up", ".down")  # dropout at rate 0 computes nothing
    assert marked_paths(trace(perceptrons(2))) == {f"blocks.{i}{part}" for i in range(2) for part in parts}


def test_paths_of_parameters_are_dotted_in_leaf_order() -> None:
    traced = trace(perceptrons(1))
    names = ("down.bias", "down.kernel", "norm.bias", "norm.scale", "up.bias", "up.kernel")
    assert traced.paths == tuple(f"blocks.0.{name}" for name in names)
    assert [leaf.shape for leaf in jax.tree.leaves(traced.parameters)][:2] == [(32,), (64, 32)]


@pytest.mark.parametrize(("causal", "scope"), [(True, ATTENTION + "causal"), (False, ATTENTION)])
def test_attention_calls_are_marked(causal: bool, scope: str) -> None:
    def loss(model: Any, x: jax.Array) -> Any:
        return jnp.mean(jax.nn.dot_product_attention(x, x, x, is_causal=causal)) + model(jnp.zeros(8)).mean()

    traced = trace_of(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), loss, jax.ShapeDtypeStruct((2, 4, 2, 8), jnp.float32))
    found = {text for text in scopes(traced.program) if ATTENTION in text}
    assert found
    assert all(f"{scope}/" in f"{text}/" for text in found)


def test_cudnn_attention_is_traced_without_a_gpu() -> None:
    config = LlamaConfig(vocab=64, embed=32, mlp=48, layers=1, heads=4, kv_heads=4, seq=8, attention="cudnn")
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    traced = trace_of(lambda: Llama(config, rngs=nnx.Rngs(0)), small_llama().loss, tokens)
    assert any(ATTENTION + "causal" in scope for scope in scopes(traced.program))


# ------------------------------------------------------------------------------------------------------------ untouched
def _originals() -> list[Any]:
    attention: Any = jax.nn.dot_product_attention
    functions = [attention, attention.__globals__[CUDNN_NAME], nnx.RngCount.set_value]
    return [*(cls.__dict__["__call__"] for cls in CLASSES), *functions]


def test_classes_and_functions_are_put_back() -> None:
    before = _originals()
    trace(small_llama())
    trace(transformers())
    assert all(a is b for a, b in zip(before, _originals(), strict=True))


def test_classes_and_functions_are_put_back_when_the_loss_raises() -> None:
    def broken(model: Any, batch: Any) -> jax.Array:
        model(batch["inputs"])
        raise ValueError("no loss\nand more")

    model, before = small_llama(), _originals()
    with pytest.raises(AnalysisError, match="the loss cannot be traced: ValueError: no loss") as caught:
        trace_of(model.build, broken, model.abstract_batch)
    assert "broken" in str(caught.value)
    assert all(a is b for a, b in zip(before, _originals(), strict=True))


def test_user_object_is_untouched() -> None:
    model = perceptrons(2)
    module = model.build()
    leaves = jax.tree.leaves(nnx.state(module))
    attributes = {path: set(vars(node)) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)}
    trace_of(module, model.loss, model.batch)
    after = {path: set(vars(node)) for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)}
    assert after == attributes
    assert not any(PATH_ATTRIBUTE in names for names in after.values())
    assert all(a is b for a, b in zip(leaves, jax.tree.leaves(nnx.state(module)), strict=True))
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def test_graph_of_the_trace_has_no_marks() -> None:
    traced = trace(perceptrons(1))
    module = traced.model.restore(traced.parameters, traced.state)
    assert not any(hasattr(node, PATH_ATTRIBUTE) for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module))


def test_concrete_and_abstract_model_give_the_same_program() -> None:
    model = transformers(dropout=0.1)
    concrete = trace_of(model.build(), model.loss, model.batch)
    assert str(concrete.program) == str(trace(model).program)


def test_counting_draws_cheaply_changes_no_program() -> None:
    def build() -> Any:
        return jax.tree.leaves(nnx.state(transformers(dropout=0.1).build()))

    expected = str(jax.make_jaxpr(build)())
    with marked_calls(()):
        assert str(jax.make_jaxpr(build)()) == expected


class Mapped(nnx.Module):
    """Its blocks are whatever a dictionary holds, Linen modules wrapped for NNX."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        one = jnp.zeros((1, 8))
        self.blocks = nnx.Dict(
            {name: nnx.bridge.ToNNX(linen.Dense(8), rngs=rngs).lazy_init(one) for name in ("first", "second")}
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for name in self.blocks:
            x = jnp.tanh(self.blocks[name](x))
        return x


def test_modules_that_read_their_own_attributes_see_no_mark() -> None:
    traced = trace_of(
        lambda: Mapped(rngs=nnx.Rngs(0)), lambda model, x: jnp.sum(model(x)), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    )
    assert marked_paths(traced) == {"blocks.first", "blocks.second"}


def test_two_threads_trace_at_once() -> None:
    model, traces = small_llama(), {}
    expected, before = marked_paths(trace(model)), _originals()
    start = threading.Barrier(4)

    def run(number: int) -> None:
        start.wait()
        traces[number] = trace(model)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [marked_paths(traces[n]) for n in range(4)] == [expected] * 4
    assert all(a is b for a, b in zip(before, _originals(), strict=True))


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "model", [pytest.param(3, id="number"), pytest.param(lambda: {"w": "x"}, id="function without arrays")]
)
def test_model_of_another_kind_says_what_is_wanted(model: Any) -> None:
    with pytest.raises(AnalysisError, match=r"got a .*expected a flax\.nnx\.Module"):
        read_model(model, small_llama().loss, small_llama().batch)


def test_loss_that_is_no_scalar_is_refused() -> None:
    model = perceptrons(1)
    with pytest.raises(AnalysisError, match=r"shape \(4, 16, 32\)"):
        trace_of(model.build, lambda module, batch: module(batch), model.abstract_batch)


def test_loss_with_auxiliary_results_is_its_first_entry() -> None:
    model = perceptrons(1)
    traced = trace_of(
        model.build,
        lambda module, batch: (model.loss(module, batch), {"extra": 1}),
        model.abstract_batch,
    )
    assert str(traced.program) == str(trace(model).program)
