"""Dimension rules of primitives that take parts of a dimension: slices, concatenations, lookups, sorts.

A part that lines up with equal parts keeps the minor factors of its dimension; any other part is a new index space,
gathered from the old one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ._dimensions import Rule, Value, copy_dims, register_rule
from ._factors import Dim


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
    """Return the dimension of a part that does not line up: a new index space, gathered from the old one."""
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
        dims = copy_dims(value)
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
    dims = copy_dims(values[0])
    if equal:
        dims[axis] = rule.factors.new(len(values), blocked=True) + dims[axis]
    else:
        dims[axis] = rule.factors.new(rule.results[0].shape[axis])
        for value in values:
            rule.op.needs_whole(value, value.dims[axis])
    return [dims]


@register_rule("stack")
def _stack(rule: Rule) -> list[list[Dim]]:
    """Equal arrays along a new dimension, whose indices mean different things."""
    first = rule.inputs[0]
    for other in rule.inputs[1:]:
        for a, b in zip(first.dims, other.dims, strict=True):
            rule.factors.unify(a, b)
    dims = copy_dims(first)
    dims.insert(rule.params["axis"], rule.factors.new(len(rule.inputs), blocked=True))
    return [dims]


@register_rule("unstack")
def _unstack(rule: Rule) -> list[list[Dim]]:
    value, axis = rule.inputs[0], rule.params["axis"]
    rule.op.needs_whole(value, value.dims[axis])
    rule.factors.block(value.dims[axis])
    return [[dim for i, dim in enumerate(copy_dims(value)) if i != axis] for _ in rule.results]


@register_rule("tile")
def _tile(rule: Rule) -> list[list[Dim]]:
    """Each dimension repeated as a whole: the repetition is the major factor."""
    repeats = rule.params["reps"]
    return [[rule.factors.new(n) + dim for n, dim in zip(repeats, copy_dims(rule.inputs[0]), strict=True)]]


@register_rule("pad")
def _pad(rule: Rule) -> list[list[Dim]]:
    """A padded part of equal parts (the transpose of a slice or split) keeps its factors under a blocked major one."""
    value, dims = rule.inputs[0], []
    for axis, (size, (low, _, interior)) in enumerate(
        zip(rule.results[0].shape, rule.params["padding_config"], strict=True)
    ):
        part = value.shape[axis]
        if size == part and low == 0 and not interior:
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
    return [copy_dims(value)]


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
            list(dim)
            if i not in whole or aval.shape[i] == value.shape[i]
            else rule.factors.new(aval.shape[i], blocked=True)
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


@register_rule("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")
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
    if rule.op.name in ("scatter-add", "scatter-sub"):
        rule.op.contracted = summed
    else:
        rule.op.needs_whole(updates, summed)
    return [copy_dims(table)]
