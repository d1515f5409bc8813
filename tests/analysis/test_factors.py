"""Factors: splitting, unifying, blocking; sizes are never lost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.analysis._factors import Dim, Factors


def sizes(factors: Factors, dim: Dim) -> list[int]:
    return [factors.size(f) for f in factors.resolve(dim)]


def blocked(factors: Factors, dim: Dim) -> list[bool]:
    return [factors.is_blocked(f) for f in factors.resolve(dim)]


def test_new_of_size_one_has_no_factor() -> None:
    assert Factors().new(1) == []


def test_new_dimensions_of_equal_size_are_different_index_spaces() -> None:
    factors = Factors()
    assert factors.resolve(factors.new(8)) != factors.resolve(factors.new(8))


def test_unify_equal_sizes_gives_one_factor() -> None:
    factors = Factors()
    a, b = factors.new(8), factors.new(8)
    factors.unify(a, b)
    assert factors.resolve(a) == factors.resolve(b)


def test_split_is_seen_by_every_holder() -> None:
    factors = Factors()
    a, b = factors.new(12), factors.new(12)
    factors.unify(a, b)
    parts = factors.split(b[0], 3)
    assert factors.resolve(a) == parts
    assert sizes(factors, a) == [3, 4]


def test_split_of_a_split_factor_stays_in_order() -> None:
    factors = Factors()
    dim = factors.new(24)
    _, minor = factors.split(dim[0], 2)
    factors.split(minor, 3)
    assert sizes(factors, dim) == [2, 3, 4]


def test_unify_coarse_with_fine_splits_the_coarse_side() -> None:
    factors = Factors()
    coarse, fine = factors.new(24), factors.new(2) + factors.new(3) + factors.new(4)
    factors.unify(coarse, fine)
    assert factors.resolve(coarse) == factors.resolve(fine)
    assert sizes(factors, coarse) == [2, 3, 4]


def test_unify_interleaved_boundaries_splits_both_sides() -> None:
    factors = Factors()
    left, right = factors.new(4) + factors.new(6), factors.new(2) + factors.new(12)
    factors.unify(left, right)
    assert sizes(factors, left) == sizes(factors, right) == [2, 2, 6]
    assert factors.resolve(left) == factors.resolve(right)


def test_unify_incompatible_factorings_blocks_both_sides() -> None:
    factors = Factors()
    left, right = factors.new(6) + factors.new(50), factors.new(4) + factors.new(75)
    factors.unify(left, right)
    assert blocked(factors, left) == [True, True]
    assert blocked(factors, right) == [True, True]
    assert (sizes(factors, left), sizes(factors, right)) == ([6, 50], [4, 75])


def test_unify_after_a_common_head_blocks_only_the_rest() -> None:
    factors = Factors()
    head = factors.new(8)
    left, right = head + factors.new(6) + factors.new(50), head + factors.new(4) + factors.new(75)
    factors.unify(left, right)
    assert blocked(factors, left) == [False, True, True]


@pytest.mark.parametrize("first", ["left", "right"])
def test_unify_spreads_a_block_to_the_other_side(first: str) -> None:
    factors = Factors()
    left, right = factors.new(8), factors.new(8)
    factors.block(left if first == "left" else right)
    factors.unify(left, right)
    assert blocked(factors, left) == blocked(factors, right) == [True]


def test_split_of_a_blocked_factor_gives_blocked_parts() -> None:
    factors = Factors()
    dim = factors.new(12, blocked=True)
    factors.split(dim[0], 3)
    assert blocked(factors, dim) == [True, True]


def test_block_of_a_coarse_factor_reaches_parts_known_later() -> None:
    factors = Factors()
    coarse, fine = factors.new(12), factors.new(3) + factors.new(4)
    factors.block(coarse)
    factors.unify(coarse, fine)
    assert blocked(factors, fine) == [True, True]


# ------------------------------------------------------------------------------------------------ any sequence of steps
_SIZES = (1, 2, 3, 4, 6, 8, 12, 24)

Step = tuple[str, int, int, int]

steps = st.lists(
    st.tuples(st.sampled_from(["unify", "split", "block", "merge"]), *[st.integers(0, 2**16)] * 3), max_size=30
)


def _do(factors: Factors, dims: list[tuple[Dim, int]], step: Step) -> None:
    """Do one step on dims that ``step`` chooses: unify equal sizes, split a factor, block, or lay two side by side."""
    name, i, j, k = step
    left, size = dims[i % len(dims)]
    if name == "unify":
        partners = [dim for dim, other in dims if other == size]
        factors.unify(left, partners[j % len(partners)])
    elif name == "split":
        for factor in factors.resolve(left)[:1]:
            divisors = [d for d in range(2, factors.size(factor)) if factors.size(factor) % d == 0]
            if divisors:
                factors.split(factor, divisors[k % len(divisors)])
    elif name == "block":
        factors.block(left)
    else:
        right, other = dims[j % len(dims)]
        if size * other <= 2**10:
            dims.append(([*left, *right], size * other))


@given(steps)
def test_any_steps_keep_the_size_of_every_dimension(program: list[Step]) -> None:
    factors = Factors()
    dims = [(factors.new(n), n) for n in _SIZES for _ in range(2)]
    for step in program:
        _do(factors, dims, step)
        for dim, size in dims:
            assert math.prod(sizes(factors, dim)) == size
            assert all(n > 1 for n in sizes(factors, dim))


@given(steps)
def test_unify_leaves_dimensions_equal_or_blocked(program: list[Step]) -> None:
    """After ``unify`` the two sides are the same factors, but for a blocked rest where the factorings do not nest."""
    factors = Factors()
    dims = [(factors.new(n), n) for n in _SIZES for _ in range(2)]
    for step in program:
        _do(factors, dims, step)
    for left, size in dims:
        for right, other in dims:
            if size == other:
                factors.unify(left, right)
                a, b = factors.resolve(left), factors.resolve(right)
                assert a == b or all(blocked(factors, _tail(a, b) + _tail(b, a)))


def _tail(a: Dim, b: Dim) -> Dim:
    """What is left of ``a`` behind the head it shares with ``b``."""
    common = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[common:]


@given(steps)
def test_blocked_dimensions_stay_blocked(program: list[Step]) -> None:
    factors = Factors()
    dims = [(factors.new(n), n) for n in _SIZES for _ in range(2)]
    marked: list[Dim] = []
    for step in program:
        _do(factors, dims, step)
        if step[0] == "block":
            marked.append(dims[step[1] % len(dims)][0])
        assert all(flag for dim in marked for flag in blocked(factors, dim))
