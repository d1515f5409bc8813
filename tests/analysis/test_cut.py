"""The cut: which layers are found, and that the segments in order are the user's program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Literal, jaxpr_as_fun

from galvatron_jax.analysis import Analysis, analyse_model, split_parameters
from tests.support.small_models import SMALL_MODELS, Perceptron, SmallModel, Stack, regression, small_llama, stack

TOLERANCE = 1e-5
"""The same float32 operations, which XLA may fuse in another way; values and gradients are of order 1 or less."""

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

SLOW = {"llama tied", "perceptrons", "transformers", "widening", "encoder-decoder", "scan"}
"""Compiled in the full run only; the others have what these have."""


def analyse(model: SmallModel) -> Analysis:
    return analyse_model(model.build, model.loss, model.abstract_batch)


def kinds(model: SmallModel) -> list[str]:
    return [segment.kind for segment in analyse(model).cut.segments]


# --------------------------------------------------------------------------------------------------------------- layers
def test_llama_is_cut_into_embed_layers_and_head() -> None:
    cut = analyse(small_llama(layers=3)).cut
    assert [s.kind for s in cut.segments] == ["embed", *["layers.*"] * 3, "head"]
    assert [s.name for s in cut.segments] == ["embed", "layers.0", "layers.1", "layers.2", "head"]


def test_equal_layers_share_one_program() -> None:
    first, second = analyse(small_llama()).cut.segments[1:3]
    assert first.program is second.program
    assert not set(first.inputs) & set(second.inputs), "each has its own weights and stream"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama tied", ["embed", "layers.*", "layers.*", "head"]),
        ("perceptrons", ["blocks.*"] * 3 + ["head"]),
        ("dropout", ["blocks.*"] * 2 + ["head"]),
        ("fused qkv", ["blocks.*"] * 2 + ["head"]),
        ("remat", ["blocks.*"] * 3 + ["head"]),
        ("convolutions", ["layers.*"] * 2 + ["head"]),
        ("encoder-decoder", ["encoder.*"] * 2 + ["decoder.*"] * 2 + ["head"]),
        ("plain", ["model"]),
    ],
)
def test_layers_are_found(name: str, expected: list[str]) -> None:
    assert kinds(SMALL_MODELS[name]()) == expected


def test_stages_of_different_width_are_cut_into_their_blocks() -> None:
    one = ["stages.*.blocks.*"] * 3 + ["stages.*.widen"]
    numbered = [*one, *(f"{kind}#2" for kind in one), *(f"{kind}#3" for kind in one)]
    assert kinds(SMALL_MODELS["widening"]()) == [*numbered, "head"]


def test_blocks_of_different_width_are_different_kinds() -> None:
    model = regression(lambda: Stack([Perceptron(32, mlp, rngs=nnx.Rngs(0)) for mlp in (64, 64, 96, 64)]))
    assert kinds(model) == ["blocks.*", "blocks.*", "blocks.*#2", "blocks.*", "head"]


def test_block_that_calls_its_base_class_is_one_layer() -> None:
    class Doubled(Perceptron):
        def __call__(self, x: jax.Array) -> jax.Array:
            return 2.0 * super().__call__(x)

    cut = analyse(regression(stack(3, lambda rngs: Doubled(32, 64, rngs=rngs)))).cut
    assert [s.name for s in cut.segments] == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert sum(len(s.program.jaxpr.eqns) for s in cut.segments) == len(cut.source.equations)


def test_stacked_blocks_are_taken_apart() -> None:
    analysis = analyse(SMALL_MODELS["scan"]())
    assert [s.kind for s in analysis.cut.segments] == ["blocks[*]"] * 3 + ["head"]
    kernels = [path for path in analysis.trace.paths if path.startswith("blocks.up.kernel")]
    assert kernels == [f"blocks.up.kernel[{row}]" for row in range(3)]
    (up,) = [p for p in analysis.profile.kind("blocks[*]").parameters if p.path == "up.kernel"]
    assert up.dims == (("embed",), ("mlp",))


def test_jitted_module_call_is_opened() -> None:
    class Jitted(Perceptron):
        @nnx.jit
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x)

    assert kinds(regression(stack(2, lambda rngs: Jitted(32, 64, rngs=rngs)))) == ["blocks.*", "blocks.*", "head"]


# ------------------------------------------------------------------------------------------------------------ structure
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_equation_lies_in_one_segment_and_segments_only_read_what_came_before(name: str) -> None:
    cut = analyse(SMALL_MODELS[name]()).cut
    assert sum(len(s.program.jaxpr.eqns) for s in cut.segments) == len(cut.source.equations)
    known = {*cut.source.inputs, *cut.source.constants}
    for segment in cut.segments:
        assert known.issuperset(segment.inputs)
        known.update(segment.outputs)
    assert known.issuperset(v for v in cut.source.outputs if not isinstance(v, Literal))


# -------------------------------------------------------------------------------------------------------------- results
def _run_segments(analysis: Analysis, leaves: list[Any]) -> list[Any]:
    source = analysis.cut.source
    environment = dict(zip(source.inputs, leaves, strict=True)) | source.constants
    for segment in analysis.cut.segments:
        results = jaxpr_as_fun(segment.program)(*[environment[v] for v in segment.inputs])
        environment.update(zip(segment.outputs, results, strict=True))
    return [v.val if isinstance(v, Literal) else environment[v] for v in source.outputs]


def _numbers(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL_MODELS]
)
def test_segments_in_order_have_loss_gradients_and_state_of_the_original(name: str) -> None:
    model = SMALL_MODELS[name]()
    analysis, batch = analyse(model), model.batch
    parameters, state = jax.jit(lambda: split_parameters(model.build())[1:], compiler_options=FAST_COMPILE)()

    def original(parameters: Any, state: Any) -> tuple[jax.Array, Any]:
        value, state = analysis.trace.model.run(parameters, state, batch)
        return value, jax.tree.leaves(state)

    def cut(parameters: Any, state: Any) -> tuple[jax.Array, Any]:
        rows = analysis.trace.rows
        apart = rows.apart(parameters, state)
        leaves = [leaf for tree in (*apart, batch) for leaf in jax.tree.leaves(tree)]
        loss, *new_state = _run_segments(analysis, leaves)
        state = jax.tree.unflatten(jax.tree.structure(rows.state), new_state)
        return loss, jax.tree.leaves(rows.together(apart[0], state)[1])

    both = [jax.value_and_grad(function, has_aux=True) for function in (original, cut)]
    compiled = jax.jit(lambda *trees: [function(*trees) for function in both], compiler_options=FAST_COMPILE)
    expected, got = (jax.tree.leaves(result) for result in compiled(parameters, state))
    assert len(expected) == len(got) > len(jax.tree.leaves(parameters))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(_numbers(b), _numbers(a), rtol=TOLERANCE, atol=TOLERANCE)


def test_dropout_is_on_in_the_cut_program() -> None:
    """So that the test above says something about random numbers and state."""
    analysis = analyse(SMALL_MODELS["dropout"]())
    assert "random_fold_in" in {equation.name for equation in analysis.cut.source.equations}
    assert len(analysis.cut.source.outputs) == 1 + len(jax.tree.leaves(analysis.trace.state)) > 1
