"""Soundness of the dimension analysis on random programs, by two oracles that know nothing of its rules.

*Permutation.* If dimensions really hold one index space that no operation needs whole, then renumbering its indices in
all inputs renumbers them in all results and changes nothing else. A unification too few or too many breaks this.

*Compilation.* With a class sharded over two devices wherever it occurs, XLA computes the same values; where no
operation sums over the class the program needs no collective at all, and where some do, no others than all-reduces.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from galvatron_jax.analysis import Value
from galvatron_jax.analysis._dimensions import Dimensions, analyse_dimensions
from tests.analysis.random_programs import OPERATIONS, UNPARTITIONED, Step, example_inputs, programs, run

TOLERANCE = 2e-4
"""Sums of up to 4096 float32 terms of order 1 in another order."""

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def _analyse(program: Sequence[Step]) -> Dimensions:
    return analyse_dimensions(jax.make_jaxpr(lambda *inputs: run(program, inputs))(*example_inputs()))


def _shardable(found: Dimensions) -> list[int]:
    """Unblocked classes of the inputs that operations read and none needs whole."""
    whole = {f for op in found.ops for _, dim in op.gathered for f in found.factors.resolve(dim)}
    read = {f for op in found.ops for value in op.inputs for f in found.flat_classes(value)}
    classes = {f for value in found.inputs for f in found.flat_classes(value)}
    return sorted(f for f in (classes & read) - whole if not found.factors.is_blocked(f))


def _sums(found: Dimensions, factor: int, *, lookups: bool) -> bool:
    """Tell whether an operation (only lookups if ``lookups``) sums over ``factor``."""
    ops = [op for op in found.ops if op.name == "gather" or not lookups]
    return any(factor in found.factors.resolve(op.contracted) for op in ops)


# -------------------------------------------------------------------------------------------------------- permutation
def _renumber(found: Dimensions, value: Value, array: jax.Array, factor: int, order: np.ndarray) -> np.ndarray:
    """Take the indices of ``factor`` in ``array`` in another order, wherever it occurs."""
    factors = found.flat_classes(value)
    fine = np.asarray(array).reshape([found.factors.size(f) for f in factors])
    for axis, f in enumerate(factors):
        if f == factor:
            fine = np.take(fine, order, axis=axis)
    return fine.reshape(array.shape)


def _check_renumbering(program: Sequence[Step]) -> None:
    found, inputs = _analyse(program), example_inputs()
    compiled = jax.jit(lambda *inputs: run(program, inputs))
    results = compiled(*inputs)
    for factor in _shardable(found):
        if _sums(found, factor, lookups=True):
            continue  # indices are numbers of it: renumbering the table alone must change the result
        order = np.random.default_rng(factor).permutation(found.factors.size(factor))
        moved = [_renumber(found, v, x, factor, order) for v, x in zip(found.inputs, inputs, strict=True)]
        for value, result, new in zip(found.outputs, results, compiled(*moved), strict=True):
            expected = _renumber(found, value, result, factor, order)
            np.testing.assert_allclose(new, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_renumbering_a_class_renumbers_the_result_of_each_operation(operation: str) -> None:
    for operand, number in itertools.product((1, 2), range(3)):
        _check_renumbering([(operation, operand, 4, number)])


@settings(max_examples=20)
@given(programs)
def test_renumbering_a_class_renumbers_the_results(program: list[Step]) -> None:
    _check_renumbering(program)


# -------------------------------------------------------------------------------------------------------- compilation
def _specs(found: Dimensions, values: Sequence[Value], factor: int) -> list[PartitionSpec]:
    """Shard ``factor`` over the axis ``x``; it stands first in each of its dimensions."""
    return [PartitionSpec(*["x" if dim[:1] == [factor] else None for dim in found.classes(v)]) for v in values]


def _is_expressible(found: Dimensions, factor: int) -> bool:
    """Tell whether every value can be sharded over ``factor``: once, and over the major part of a dimension.

    An operation that sums over a class that its result has again (a lookup by an index of its own) would need it twice.
    """
    values = [*found.inputs, *(v for op in found.ops for v in [*op.inputs, *op.outputs])]
    for op in found.ops:
        if factor in found.factors.resolve(op.contracted) and any(factor in found.flat_classes(v) for v in op.outputs):
            return False
    return found.factors.size(factor) % 2 == 0 and all(
        found.flat_classes(v).count(factor) == sum(dim[:1] == [factor] for dim in found.classes(v)) <= 1 for v in values
    )


def _check_compilation(program: Sequence[Step], found: Dimensions, factor: int) -> None:
    inputs, mesh = example_inputs(), Mesh(np.array(jax.devices()[:2]), ("x",))
    into, out = (
        [NamedSharding(mesh, spec) for spec in _specs(found, values, factor)]
        for values in (found.inputs, found.outputs)
    )
    sharded = jax.jit(lambda inputs: run(program, inputs), in_shardings=(into,), out_shardings=out)
    compiled = sharded.lower(inputs).compile()
    allowed = {"all-reduce"} if _sums(found, factor, lookups=False) else set()
    if not UNPARTITIONED & {name for name, *_ in program}:
        assert set(COLLECTIVE.findall(compiled.as_text() or "")) <= allowed
    results = compiled(jax.device_put(inputs, into))
    for result, value in zip(results, run(program, inputs), strict=True):
        np.testing.assert_allclose(result, value, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.multidevice
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sharding_a_class_of_each_operation_needs_no_other_collective_than_predicted(operation: str) -> None:
    program = [(operation, 2, 4, 2)]
    found = _analyse(program)
    for factor in _shardable(found):
        if _is_expressible(found, factor):
            _check_compilation(program, found, factor)


@pytest.mark.multidevice
@settings(max_examples=15)
@given(programs, st.integers(0, 11))
def test_sharding_a_class_needs_no_other_collective_than_predicted(program: list[Step], choice: int) -> None:
    found = _analyse(program)
    classes = [f for f in _shardable(found) if _is_expressible(found, f)]
    if classes:
        _check_compilation(program, found, classes[choice % len(classes)])
