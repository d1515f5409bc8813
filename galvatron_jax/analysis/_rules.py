"""Dimension rules of JAX's primitives, one small function for each family.

A rule answers three questions: which dimensions of operands and results hold the same index space, which factors are
summed over, and which factors must be whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ._dimensions import Rule, Value, register_rule
from ._factors import Dim

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos
    cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma imag integer_pow is_finite le lgamma log
    log1p logistic lt max min mul ne neg nextafter not or polygamma population_count pow pvary real reduce_precision rem
    round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    bitcast_convert_type stop_gradient sub tan tanh xor name sharding_constraint""".split()
)
"""Primitives that work element by element (size-1 dimensions broadcast)."""

REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split())
"""Primitives that combine all elements along their ``axes``."""

RANDOM = frozenset(
    """random_bits random_wrap random_unwrap random_seed random_fold_in random_split random_clone threefry2x32
    rng_bit_generator rng_uniform iota create_token""".split()
)
"""Primitives whose results depend on no operand's layout (partitionable threefry)."""


def _copy(value: Value) -> list[Dim]:
    return [list(dim) for dim in value.dims]


@register_rule(*ELEMENTWISE)
def _elementwise(rule: Rule) -> list[list[Dim]]:
    return [_broadcast(rule, rule.inputs, tuple(aval.shape)) for aval in rule.results]


@register_rule("optimization_barrier")
def _barrier(rule: Rule) -> list[list[Dim]]:
    return [_copy(value) for value in rule.inputs]


def _broadcast(rule: Rule, values: Sequence[Value], shape: tuple[int, ...]) -> list[Dim]:
    """Unify dimension by dimension: operands of size 1 broadcast implicitly."""
    dims: list[Dim] = []
    for axis, size in enumerate(shape):
        held = [v.dims[axis] for v in values if len(v.shape) == len(shape) and v.shape[axis] == size]
        for other in held[1:]:
            rule.factors.unify(held[0], other)
        dims.append(list(held[0]) if held else rule.factors.new(size))
    return dims


@register_rule(*RANDOM)
def _fresh(rule: Rule) -> list[list[Dim]]:
    return [[rule.factors.new(n) for n in aval.shape] for aval in rule.results]


# ----------------------------------------------------------------------------------------------------- contractions
@register_rule("dot_general")
def _dot_general(rule: Rule) -> list[list[Dim]]:
    (left_sum, right_sum), (left_batch, right_batch) = rule.params["dimension_numbers"]
    left, right = rule.inputs
    for i, j in [*zip(left_sum, right_sum, strict=True), *zip(left_batch, right_batch, strict=True)]:
        rule.factors.unify(left.dims[i], right.dims[j])
    left_free = [i for i in range(len(left.shape)) if i not in left_sum and i not in left_batch]
    right_free = [j for j in range(len(right.shape)) if j not in right_sum and j not in right_batch]
    rule.op.contracted = [f for i in left_sum for f in left.dims[i]]
    rule.op.flops = 2 * math.prod(left.shape) * math.prod(right.shape[j] for j in right_free)
    return [
        [list(left.dims[i]) for i in left_batch]
        + [list(left.dims[i]) for i in left_free]
        + [list(right.dims[j]) for j in right_free]
    ]


@register_rule("conv_general_dilated")
def _convolution(rule: Rule) -> list[list[Dim]]:
    numbers, (image, kernel), aval = rule.params["dimension_numbers"], rule.inputs, rule.results[0]
    dims: list[Dim] = [[] for _ in aval.shape]
    dims[numbers.out_spec[0]] = list(image.dims[numbers.lhs_spec[0]])
    dims[numbers.out_spec[1]] = list(kernel.dims[numbers.rhs_spec[0]])
    if rule.params["feature_group_count"] == 1 and rule.params["batch_group_count"] == 1:
        rule.factors.unify(image.dims[numbers.lhs_spec[1]], kernel.dims[numbers.rhs_spec[1]])
        rule.op.contracted = list(image.dims[numbers.lhs_spec[1]])
    else:
        rule.op.needs_whole(image, image.dims[numbers.lhs_spec[1]])
        rule.factors.block(dims[numbers.out_spec[1]])
    for out, into in zip(numbers.out_spec[2:], numbers.lhs_spec[2:], strict=True):
        rule.op.needs_whole(image, image.dims[into])
        dims[out] = rule.factors.new(aval.shape[out], blocked=True)
    rule.op.flops = 2 * math.prod(aval.shape) * math.prod(kernel.shape) // max(1, kernel.shape[numbers.rhs_spec[0]])
    return [dims]


@register_rule(*REDUCTIONS)
def _reduce(rule: Rule) -> list[list[Dim]]:
    axes, value = set(rule.params["axes"]), rule.inputs[0]
    rule.op.contracted = [f for i in axes for f in value.dims[i]]
    kept = [i for i in range(len(value.shape)) if i not in axes]
    return [[list(value.dims[i]) for i in kept] for _ in rule.results]


# ------------------------------------------------------------------------------------------------------ new shapes
@register_rule("reshape")
def _reshape(rule: Rule) -> list[list[Dim]]:
    value, shape = rule.inputs[0], tuple(rule.results[0].shape)
    return [_copy(value)] if value.shape == shape else [_regroup(rule, value, shape)]


def _regroup(rule: Rule, value: Value, shape: tuple[int, ...]) -> list[Dim]:
    """Deal the factors of ``value`` out to ``shape``, splitting where a new boundary falls inside one."""
    factors = rule.factors
    queue = factors.resolve(f for dim in value.dims for f in dim)
    dims: list[Dim] = []
    for position, size in enumerate(shape):
        dim: Dim = []
        while size > 1:
            head = queue[0]
            if size % factors.size(head) == 0:
                dim.append(head)
                size //= factors.size(head)
                queue = queue[1:]
            elif factors.size(head) % size == 0:
                factors.split(head, size)
                queue = factors.resolve(queue)
            else:
                factors.block(queue + dim)
                rule.op.needs_whole(value, queue + dim)
                return dims + [factors.new(n, blocked=True) for n in shape[position:]]
        dims.append(dim)
    return dims


@register_rule("transpose")
def _transpose(rule: Rule) -> list[list[Dim]]:
    return [[list(rule.inputs[0].dims[i]) for i in rule.params["permutation"]]]


@register_rule("broadcast_in_dim")
def _broadcast_in_dim(rule: Rule) -> list[list[Dim]]:
    value, shape = rule.inputs[0], rule.results[0].shape
    dims = [rule.factors.new(n) for n in shape]
    for source, target in enumerate(rule.params["broadcast_dimensions"]):
        if value.shape[source] == shape[target]:
            dims[target] = list(value.dims[source])
    return [dims]


@register_rule("squeeze")
def _squeeze(rule: Rule) -> list[list[Dim]]:
    return [[dim for i, dim in enumerate(_copy(rule.inputs[0])) if i not in rule.params["dimensions"]]]


@register_rule("expand_dims")
def _expand_dims(rule: Rule) -> list[list[Dim]]:
    rest = iter(_copy(rule.inputs[0]))
    return [[[] if i in rule.params["dimensions"] else next(rest) for i in range(len(rule.results[0].shape))]]


# ------------------------------------------------------------------------------------------------ parts of a dimension
def _equal_part(rule: Rule, value: Value, axis: int, size: int) -> Dim:
    """Return the factors of one of the equal parts of length ``size`` that ``axis`` is cut into: the minor ones.

    The major factor (the 3 of a fused qkv, the 2 of rotary halves) is blocked: its indices mean different things.
    """
    factors, parts, seen = rule.factors, value.shape[axis] // size, 1
    dim = factors.resolve(value.dims[axis])
    for position, factor in enumerate(dim):
        if seen == parts:
            return dim[position:]
        if parts % (seen * factors.size(factor)) == 0:
            seen *= factors.size(factor)
            factors.block([factor])
        elif (seen * factors.size(factor)) % parts == 0:
            major, minor = factors.split(factor, parts // seen)
            factors.block([major])
            return factors.resolve([minor, *dim[position + 1 :]])
        else:
            factors.block(dim)
            return factors.new(size, blocked=True)
    return []


def _unaligned_part(rule: Rule, value: Value, axis: int, size: int) -> Dim:
    """Return the dimension of a part that does not line up with equal parts: a new index space, gathered from the old."""
    rule.op.needs_whole(value, value.dims[axis])
    return rule.factors.new(size)


@register_rule("slice")
def _slice(rule: Rule) -> list[list[Dim]]:
    value, starts, strides = rule.inputs[0], rule.params["start_indices"], rule.params["strides"]
    dims: list[Dim] = []
    for axis, size in enumerate(rule.results[0].shape):
        whole, aligned = value.shape[axis], size and starts[axis] % size == 0 and (not strides or strides[axis] == 1)
        if size == whole:
            dims.append(list(value.dims[axis]))
        elif size > 1 and aligned and whole % size == 0:
            dims.append(_equal_part(rule, value, axis, size))
        else:
            dims.append(_unaligned_part(rule, value, axis, size))
    return [dims]


@register_rule("split")
def _split(rule: Rule) -> list[list[Dim]]:
    value, axis = rule.inputs[0], rule.params["axis"]
    sizes = [aval.shape[axis] for aval in rule.results]
    equal, results = len(set(sizes)) == 1, []
    for size in sizes:
        dims = _copy(value)
        part = _equal_part if equal else _unaligned_part
        dims[axis] = part(rule, value, axis, size)
        results.append(dims)
    return results


@register_rule("concatenate")
def _concatenate(rule: Rule) -> list[list[Dim]]:
    axis, values = rule.params["dimension"], rule.inputs
    equal = len({v.shape[axis] for v in values}) == 1
    for other in values[1:]:
        for i in range(len(other.shape)):
            if i != axis or equal:
                rule.factors.unify(values[0].dims[i], other.dims[i])
    dims = _copy(values[0])
    if equal:
        dims[axis] = rule.factors.new(len(values), blocked=True) + dims[axis]
    else:
        dims[axis] = rule.factors.new(rule.results[0].shape[axis])
        for value in values:
            rule.op.needs_whole(value, value.dims[axis])
    return [dims]


@register_rule("pad")
def _pad(rule: Rule) -> list[list[Dim]]:
    """A padded part of equal parts (the transpose of a slice or split) keeps its factors under a blocked major one."""
    value, dims = rule.inputs[0], []
    for axis, (size, (low, _, interior)) in enumerate(
        zip(rule.results[0].shape, rule.params["padding_config"], strict=True)
    ):
        part = value.shape[axis]
        if size == part and low == 0:
            dims.append(list(value.dims[axis]))
        elif part > 1 and size % part == 0 and low % part == 0 and not interior:
            dims.append(rule.factors.new(size // part, blocked=True) + list(value.dims[axis]))
        else:
            dims.append(_unaligned_part(rule, value, axis, size))
    return [dims]


@register_rule("dynamic_slice")
def _dynamic_slice(rule: Rule) -> list[list[Dim]]:
    value = rule.inputs[0]
    return [
        [
            list(value.dims[i]) if size == value.shape[i] else _unaligned_part(rule, value, i, size)
            for i, size in enumerate(rule.results[0].shape)
        ]
    ]


@register_rule("dynamic_update_slice")
def _dynamic_update_slice(rule: Rule) -> list[list[Dim]]:
    value, update = rule.inputs[:2]
    for i in range(len(value.shape)):
        if value.shape[i] == update.shape[i]:
            rule.factors.unify(value.dims[i], update.dims[i])
        else:
            rule.op.needs_whole(value, value.dims[i])
    return [_copy(value)]


# ------------------------------------------------------------------------------------------------------ along an axis
def _along(rule: Rule, axes: Sequence[int]) -> list[list[Dim]]:
    """Operations that mix the elements of ``axes`` in order: the axes must be whole, the others pass."""
    value = rule.inputs[0]
    whole = {axis % len(value.shape) for axis in axes}
    for other in rule.inputs[1:]:
        if other.shape == value.shape:
            for a, b in zip(value.dims, other.dims, strict=True):
                rule.factors.unify(a, b)
    rule.op.needs_whole(value, [f for axis in whole for f in value.dims[axis]])
    return [
        [
            list(dim) if i not in whole or aval.shape[i] == value.shape[i] else rule.factors.new(aval.shape[i], blocked=True)
            for i, dim in enumerate(value.dims)
        ]
        for aval in rule.results
    ]


@register_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(rule: Rule) -> list[list[Dim]]:
    return _along(rule, [rule.params["axis"]])


@register_rule("sort")
def _sort(rule: Rule) -> list[list[Dim]]:
    return _along(rule, [rule.params["dimension"]])


@register_rule("top_k")
def _top_k(rule: Rule) -> list[list[Dim]]:
    return _along(rule, [rule.params.get("axis", -1)])


@register_rule("rev")
def _reverse(rule: Rule) -> list[list[Dim]]:
    return _along(rule, rule.params["dimensions"])


# ---------------------------------------------------------------------------------------------------- gather, scatter
@register_rule("gather")
def _gather(rule: Rule) -> list[list[Dim]]:
    """A lookup; over a sharded looked-up dimension it becomes a masked lookup and a sum."""
    table, indices = rule.inputs
    numbers, sizes, aval = rule.params["dimension_numbers"], rule.params["slice_sizes"], rule.results[0]
    batching = tuple(numbers.operand_batching_dims)
    for i, j in zip(batching, numbers.start_indices_batching_dims, strict=True):
        rule.factors.unify(table.dims[i], indices.dims[j])
    windows = [i for i in range(len(table.shape)) if i not in numbers.collapsed_slice_dims and i not in batching]
    dims: list[Dim] = [[] for _ in aval.shape]
    for out, i in zip(numbers.offset_dims, windows, strict=True):
        same = sizes[i] == table.shape[i]
        dims[out] = list(table.dims[i]) if same else _unaligned_part(rule, table, i, sizes[i])
    looked_up = [out for out in range(len(dims)) if out not in numbers.offset_dims]
    for out, j in zip(looked_up, range(len(indices.shape) - 1), strict=True):
        dims[out] = list(indices.dims[j])
    rule.op.contracted = [f for i in numbers.collapsed_slice_dims for f in table.dims[i]]
    return [dims]


@register_rule("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max")
def _scatter(rule: Rule) -> list[list[Dim]]:
    """Updates into a table; a sum over sharded updates is a partial result, a sharded table takes its own share."""
    table, indices, updates = rule.inputs
    numbers, factors = rule.params["dimension_numbers"], rule.factors
    batching = tuple(numbers.operand_batching_dims)
    for i, j in zip(batching, numbers.scatter_indices_batching_dims, strict=True):
        factors.unify(table.dims[i], indices.dims[j])
    windows = [i for i in range(len(table.shape)) if i not in numbers.inserted_window_dims and i not in batching]
    for out, i in zip(numbers.update_window_dims, windows, strict=True):
        if updates.shape[out] == table.shape[i]:
            factors.unify(updates.dims[out], table.dims[i])
        else:
            rule.op.needs_whole(table, table.dims[i])
    scattered = [out for out in range(len(updates.shape)) if out not in numbers.update_window_dims]
    for out, j in zip(scattered, range(len(indices.shape) - 1), strict=True):
        factors.unify(updates.dims[out], indices.dims[j])
    kept = {f for i in batching for f in factors.resolve(table.dims[i])}
    summed = [f for j in range(len(indices.shape) - 1) for f in factors.resolve(indices.dims[j]) if f not in kept]
    if rule.op.name == "scatter-add":
        rule.op.contracted = summed
    else:
        rule.op.needs_whole(updates, summed)
    return [_copy(table)]


@register_rule("ragged_dot_general")
def _ragged_dot(rule: Rule) -> list[list[Dim]]:
    """Rows [m, k] times group matrices [g, k, n]: rows are sorted by group, so rows and groups must be whole."""
    rows, weights, group_sizes = rule.inputs[:3]
    rule.factors.unify(rows.dims[1], weights.dims[1])
    rule.factors.unify(weights.dims[0], group_sizes.dims[0])
    rule.op.contracted = list(rows.dims[1])
    rule.op.needs_whole(rows, rows.dims[0])
    rule.op.needs_whole(weights, weights.dims[0])
    rule.op.flops = 2 * math.prod(rows.shape) * weights.shape[2]
    return [[list(rows.dims[0]), list(weights.dims[2])]]


# ------------------------------------------------------------------------------------------------------- control flow
def _unify_values(rule: Rule, left: Value, right: Value) -> None:
    for a, b in zip(left.dims, right.dims, strict=True):
        rule.factors.unify(a, b)


@register_rule("scan")
def _scan(rule: Rule) -> list[list[Dim]]:
    """The body once for all iterations: carries keep their dimensions, the scanned dimension is whole."""
    params, length = rule.params, rule.params["length"]
    fixed, carried = params["num_consts"], params["num_consts"] + params["num_carry"]
    stacked = rule.inputs[carried:]
    slices = [Value(v.shape[1:], v.dtype, v.dims[1:]) for v in stacked]
    results = rule.walk.run_inner(params["jaxpr"], [*rule.inputs[:carried], *slices], rule.op.times * length)
    for before, after in zip(rule.inputs[fixed:carried], results, strict=False):
        _unify_values(rule, before, after)
    for value in stacked:
        rule.op.needs_whole(value, value.dims[0])
        rule.factors.block(value.dims[0])
    outer = [rule.factors.new(length, blocked=True) for _ in results[carried - fixed :]]
    rows = [[dim, *value.dims] for dim, value in zip(outer, results[carried - fixed :], strict=True)]
    return [_copy(value) for value in results[: carried - fixed]] + rows


@register_rule("while")
def _while(rule: Rule) -> list[list[Dim]]:
    """An unknown number of iterations counts once (no FLOP figure can be right)."""
    params = rule.params
    condition, body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    rule.walk.run_inner(params["cond_jaxpr"], [*rule.inputs[:condition], *rule.inputs[body:]], rule.op.times)
    results = rule.walk.run_inner(params["body_jaxpr"], rule.inputs[condition:], rule.op.times)
    for before, after in zip(rule.inputs[body:], results, strict=True):
        _unify_values(rule, before, after)
    return [_copy(value) for value in results]


@register_rule("cond")
def _cond(rule: Rule) -> list[list[Dim]]:
    """All branches agree on the layout of their results."""
    branches = [rule.walk.run_inner(b, rule.inputs[1:], rule.op.times) for b in rule.params["branches"]]
    for other in branches[1:]:
        for a, b in zip(branches[0], other, strict=True):
            _unify_values(rule, a, b)
    return [_copy(value) for value in branches[0]]
