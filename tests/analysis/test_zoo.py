"""The zoo: layers are found, and the cut program has the loss, the gradients and the new state of the original.

Dropout is on where a model has it; the tolerance of each model stands in its case.
"""

from __future__ import annotations

import functools
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal, jaxpr_as_fun

from galvatron_jax.analysis import Analysis, analyse_model
from tests.zoo import ZOO, Case

FAST_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

SLOW = {"gpt2 linen remat", "moe alternating", "t5 linen", "vit linen", "swin", "pure scanned", "albert linen"}
"""Compiled in the full run only; the others have what these have."""

CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ZOO]


@functools.cache
def case(name: str) -> Case:
    return ZOO[name]()


@functools.cache
def analysed(name: str) -> Analysis:
    return analyse_model(case(name).build, case(name).loss, case(name).spec)


def run_segments(analysis: Analysis, leaves: list[Any]) -> list[Any]:
    source = analysis.cut.source
    environment = dict(zip(source.inputs, leaves, strict=True)) | source.constants
    for segment in analysis.cut.segments:
        results = jaxpr_as_fun(segment.program)(*[environment[v] for v in segment.inputs])
        environment.update(zip(segment.outputs, results, strict=True))
    return [v.val if isinstance(v, Literal) else environment[v] for v in source.outputs]


def numbers(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


# --------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("name", ZOO)
def test_layers_are_found(name: str) -> None:
    segments = analysed(name).cut.segments
    assert tuple((kind, len(list(run))) for kind, run in groupby(s.kind for s in segments)) == case(name).layers


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_counts_once(name: str) -> None:
    model = analysed(name).trace.model
    assert analysed(name).profile.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(model.parameters))


@pytest.mark.parametrize("name", ZOO)
def test_state_and_randomness_are_known(name: str) -> None:
    roles = set(analysed(name).trace.model.roles)
    assert ("key" in roles and "count" in roles) == case(name).dropout or not case(name).dropout
    assert "other" in roles or not case(name).state


# -------------------------------------------------------------------------------------------------------------- results
@pytest.mark.parametrize("name", CASES)
def test_cut_program_has_loss_gradients_and_state_of_the_original(name: str) -> None:
    analysis, batch = analysed(name), case(name).batch
    model, rows = analysis.trace.model, analysis.trace.rows
    parameters, state = jax.jit(model.build, compiler_options=FAST_COMPILE)()

    def original(parameters: Any, state: Any) -> tuple[jax.Array, Any]:
        value, state = model.run(parameters, state, batch)
        return value[0] if isinstance(value, tuple) else value, jax.tree.leaves(state)

    def cut(parameters: Any, state: Any) -> tuple[jax.Array, Any]:
        leaves = [leaf for tree in (*rows.apart(parameters, state), batch) for leaf in jax.tree.leaves(tree)]
        loss, *new = run_segments(analysis, leaves)
        taken, (whole, known) = leaves[: len(rows.paths)], map(_structure, (rows.parameters, rows.state))
        return loss, jax.tree.leaves(rows.together(whole.unflatten(taken), known.unflatten(new))[1])

    both = [jax.value_and_grad(function, has_aux=True) for function in (original, cut)]
    compiled = jax.jit(lambda *trees: [function(*trees) for function in both], compiler_options=FAST_COMPILE)
    expected, got = (jax.tree.leaves(result) for result in compiled(parameters, state))
    assert len(expected) == len(got) > len(jax.tree.leaves(parameters))
    tolerance = case(name).tolerance
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(numbers(b), numbers(a), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name]().dropout])
def test_dropout_is_on(name: str) -> None:
    """So that the test above says something about random numbers: another key is another loss."""
    model, batch = analysed(name).trace.model, case(name).batch
    parameters, state = jax.jit(model.build, compiler_options=FAST_COMPILE)()
    leaves, structure = jax.tree.flatten(state)
    folded = [
        jax.vmap(jax.random.fold_in, (0, None))(x.reshape(-1), 7).reshape(x.shape) if role == "key" else x
        for x, role in zip(leaves, model.roles, strict=True)
    ]
    loss = jax.jit(lambda state: model.run(parameters, state, batch)[0], compiler_options=FAST_COMPILE)
    assert abs(loss(state) - loss(jax.tree.unflatten(structure, folded))) > 1e-4


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)
