"""Dimension rules of JAX's primitives, one small function for each family.

A rule answers three questions: which dimensions of operands and results hold the same index space, which factors are
summed over, and which factors must be whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ._dimensions import RULES, Rule, Value, copy_dims, register_rule
from ._factors import Dim
from ._jaxpr import scan_operands
from ._primitives import ELEMENTWISE, RANDOM, REDUCTIONS
from ._rule_text import parse_rule, rule_function, shardy_rule


@register_rule(*ELEMENTWISE)
def _elementwise(rule: Rule) -> list[list[Dim]]:
    return [_broadcast(rule, rule.inputs, tuple(aval.shape)) for aval in rule.results]


@register_rule("optimization_barrier")
def _barrier(rule: Rule) -> list[list[Dim]]:
    return [copy_dims(value) for value in rule.inputs]


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
    if rule.params["feature_group_count"] == 1:
        rule.factors.unify(image.dims[numbers.lhs_spec[1]], kernel.dims[numbers.rhs_spec[1]])
        rule.op.contracted = list(image.dims[numbers.lhs_spec[1]])
    else:
        rule.op.needs_whole(image, image.dims[numbers.lhs_spec[1]])
        rule.factors.block(dims[numbers.out_spec[1]])
    if rule.params["batch_group_count"] > 1:  # the gradient of a grouped kernel: groups stand where samples do
        rule.op.needs_whole(image, image.dims[numbers.lhs_spec[0]])
        rule.factors.block(dims[numbers.out_spec[1]])
        dims[numbers.out_spec[0]] = rule.factors.new(aval.shape[numbers.out_spec[0]], blocked=True)
    for out, into, window in zip(numbers.out_spec[2:], numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True):
        rule.op.needs_whole(image, image.dims[into])
        rule.op.needs_whole(kernel, kernel.dims[window])
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
    return [copy_dims(value)] if value.shape == shape else [_regroup(rule, value, shape)]


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
    return [[dim for i, dim in enumerate(copy_dims(rule.inputs[0])) if i not in rule.params["dimensions"]]]


@register_rule("expand_dims")
def _expand_dims(rule: Rule) -> list[list[Dim]]:
    rest = iter(copy_dims(rule.inputs[0]))
    return [[[] if i in rule.params["dimensions"] else next(rest) for i in range(len(rule.results[0].shape))]]


@register_rule("ragged_dot_general")
def _ragged_dot(rule: Rule) -> list[list[Dim]]:
    """A product over ragged rows: they are sorted by group, so rows and groups must be whole.

    Rows that are free meet one matrix each of [group, ...]; contracted or batched ones make or keep groups (the
    gradients of the first).
    """
    numbers, (left, right, group_sizes) = rule.params["ragged_dot_dimension_numbers"], rule.inputs[:3]
    (left_sum, right_sum), (left_batch, right_batch) = numbers.dot_dimension_numbers
    groups = set(numbers.rhs_group_dimensions)
    for i, j in [*zip(left_sum, right_sum, strict=True), *zip(left_batch, right_batch, strict=True)]:
        rule.factors.unify(left.dims[i], right.dims[j])
    for j in groups:
        rule.factors.unify(right.dims[j], group_sizes.dims[-1])
        rule.op.needs_whole(right, right.dims[j])
    rows = list(numbers.lhs_ragged_dimensions)
    for i in rows:
        rule.op.needs_whole(left, left.dims[i])
    rule.op.contracted = [f for i in left_sum if i not in rows for f in left.dims[i]]
    left_free = [i for i in range(len(left.shape)) if i not in left_sum and i not in left_batch]
    right_free = [j for j in range(len(right.shape)) if j not in {*right_sum, *right_batch, *groups}]
    rule.op.flops = 2 * math.prod(left.shape) * math.prod(right.shape[j] for j in right_free)
    made = [list(group_sizes.dims[-1])] if set(rows) & set(left_sum) else []
    return [
        made
        + [list(left.dims[i]) for i in left_batch]
        + [list(left.dims[i]) for i in left_free]
        + [list(right.dims[j]) for j in right_free]
    ]


# ------------------------------------------------------------------------------------------------------- control flow
def _unify_values(rule: Rule, left: Value, right: Value) -> None:
    for a, b in zip(left.dims, right.dims, strict=True):
        rule.factors.unify(a, b)


@register_rule("scan")
def _scan(rule: Rule) -> list[list[Dim]]:
    """The body once for all iterations: carries keep their dimensions, the scanned dimension is whole."""
    params, length = rule.params, rule.params["length"]
    fixed, carried = scan_operands(params)[0], sum(scan_operands(params))
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
    return [copy_dims(value) for value in results[: carried - fixed]] + rows


@register_rule("while")
def _while(rule: Rule) -> list[list[Dim]]:
    """An unknown number of iterations counts once (no FLOP figure can be right)."""
    params = rule.params
    condition, body = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    rule.walk.run_inner(params["cond_jaxpr"], [*rule.inputs[:condition], *rule.inputs[body:]], rule.op.times)
    results = rule.walk.run_inner(params["body_jaxpr"], rule.inputs[condition:], rule.op.times)
    for before, after in zip(rule.inputs[body:], results, strict=True):
        _unify_values(rule, before, after)
    return [copy_dims(value) for value in results]


@register_rule("cond")
def _cond(rule: Rule) -> list[list[Dim]]:
    """All branches agree on the layout of their results."""
    branches = [rule.walk.run_inner(b, rule.inputs[1:], rule.op.times) for b in rule.params["branches"]]
    for other in branches[1:]:
        for a, b in zip(branches[0], other, strict=True):
            _unify_values(rule, a, b)
    return [copy_dims(value) for value in branches[0]]


# ------------------------------------------------------------------------------------------------------ rules as text
def register_rule_text(name: str, text: str) -> None:
    """Register the dimension rule of the primitive called ``name``, written as in ``_rule_text``.

    >>> register_rule_text("my_attention", "b s h d, b t h d, b t h e -> b s h e")

    Raises:
        AnalysisError: ``text`` is no rule.
    """
    RULES[name] = rule_function(parse_rule(text))


@register_rule("custom_partitioning")
def _custom_partitioning(rule: Rule) -> list[list[Dim]]:
    """The Shardy rule that the call carries; without one, what it calls."""
    written = shardy_rule(rule.params.get("sharding_rule"), rule)
    if written is not None:
        return rule_function(written)(rule)
    return [value.dims for value in rule.walk.run_inner(rule.params["call"], rule.inputs, rule.op.times)]
