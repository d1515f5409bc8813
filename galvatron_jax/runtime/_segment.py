"""Run one segment of the user's program under a layout: constrain, gather, rematerialise.

The segment's own equations are run again, with sharding constraints on the results of kernels (matrix products and
lookups) and, under sequence parallelism, on the sums and products of the stream: XLA's propagation fills in the rest.
Parameters are cast to their compute dtype, then gathered, *inside* the rematerialised function and under a name that no
policy keeps, so neither casts nor gathered weights live from the forward to the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal
from jax.sharding import NamedSharding

from ..analysis import Equation, Value, Variable, is_batched, is_kept, is_kernel_name
from ..strategy import Remat
from ._attention import Attention
from ._border import EXCHANGED, Border
from ._copies import Copies, PerRank, copyable, partial_axes, unreduced_axes
from ._entrances import Entrances
from ._grouped import is_grouped, run_grouped
from ._kept import Kept
from ._layout import LayerLayout, Role
from ._mesh import Axes
from ._products import product_orders, run_product
from ._rankings import ranked_place, run_ranking

WEIGHTS = "galvatron_weights"
"""Name of parameters as a layer uses them: cast and gathered."""

PER_RANK = "galvatron_per_rank"
"""Name of products with copies of weights: batched over the ranks, but for remat ``dots`` products with weights."""

_STREAM_PRIMITIVES = frozenset(("add", "mul"))
"""Under sequence parallelism residual adds and norm products are constrained too."""

SegmentFunction = Callable[[Sequence[Any]], list[Any]]
"""From the segment's inputs to its outputs."""


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the gradients of a layer's parameters are reduced over its data-parallel ranks."""

    role: Role = "gradient"
    """Where each one is put."""
    spread: frozenset[int] = frozenset()
    """Parameters (by position) that come as copies, and whose gradients leave as copies (see ``_copies``)."""
    in_float32: bool = False
    """In the storage dtype, not in the dtype in which they are computed."""

    def role_of(self, position: int) -> Role:
        """Return where the gradient of one parameter is put; copies are nowhere shared out further than gradients."""
        return "gradient" if position in self.spread else self.role


def build_segment(
    layout: LayerLayout,
    *,
    in_loop: bool = False,
    reduction: Reduction | None = None,
    rows: frozenset[int] = frozenset(),
    kept: Mapping[int, Kept] | None = None,
) -> SegmentFunction:
    """Return the segment of ``layout.kind`` as a function under the layout's strategy.

    It takes its inputs where they are: the caller puts all but the parameters into the layer's layout.

    Args:
        layout: The segment's kind and strategy.
        in_loop: It is the body of a loop, so forward and backward pass are loops of their own, and nothing needs to
            keep the compiler from merging what is computed in both.
        reduction: How gradients are reduced.
        rows: Parameters (by position) that a loop takes from stacks.
        kept: Parameters (by position) that another layer keeps, as it has them.
    """
    weights = _Weights(layout, reduction or Reduction(), rows, kept or {})

    def run(*inputs: Any) -> list[Any]:
        return _run_equations(layout, weights.place(inputs), weights.copies, weights.copied)

    remat = layout.strategy.remat
    checkpointed = jax.checkpoint(run, policy=_policy(remat), prevent_cse=_waiting(layout, in_loop=in_loop))
    return lambda inputs: checkpointed(*inputs)


def _waiting(layout: LayerLayout, *, in_loop: bool) -> bool | Sequence[bool]:
    """Which inputs the backward pass reads only when the layer's cotangents are there.

    Without this XLA computes the activations of a layer again while it is busy with the layers after it (a loop turn
    holds two of them: docs/design/0055). Weights do not wait in a loop, so that gathers run ahead; nor does what remat
    ``none`` kept, which would be copied out of the stack first.
    """
    if not in_loop:
        return True
    parameters = frozenset(layout.kind.layer.parameters)
    return (
        [i not in parameters for i in range(len(layout.kind.layer.inputs))]
        if layout.strategy.remat != "none"
        else False
    )


def _policy(remat: Remat) -> Callable[..., bool]:
    """What ``jax.checkpoint`` keeps: the estimate's own rule (``analysis.is_kept``)."""

    def keep(primitive: Any, *_: Any, **params: Any) -> bool:
        name = str(primitive.name)
        if name == "name" and params["name"] in (EXCHANGED, PER_RANK):
            return remat == ("none" if params["name"] == EXCHANGED else "dots")
        return is_kept(name, remat, batched=is_batched(name, params))

    return keep


class _Weights:
    """Parameters as a layer uses them: cast, gathered, and copied where their gradients need it.

    Copies made here, inside the layer, are reduced here: hsdp scatters gradients inside a group and then sums the
    shards across groups, and reductions in the storage dtype take their operands in it. The partitioner does neither
    with a gradient that it makes whole.
    """

    def __init__(
        self, layout: LayerLayout, reduction: Reduction, rows: frozenset[int], kept: Mapping[int, Kept]
    ) -> None:
        self._layout, self._reduction, self._rows, self._kept = layout, reduction, rows, kept
        axes = given = unreduced_axes(layout) if reduction.spread else ()
        wanted: Axes = layout.replica_axes if layout.strategy.zero and not reduction.spread else ()
        wanted = partial_axes(layout) if reduction.in_float32 else wanted
        self._own = frozenset[int]()
        if wanted and reduction.spread <= (able := copyable(layout, wanted)):
            axes, self._own = wanted, able - (reduction.spread if wanted == given else frozenset())
        if not reduction.in_float32:  # what another layer keeps elsewhere is not scattered here
            self._own = frozenset(filter(self._scatters, self._own))
        self._given, self.copies = Copies(layout, given), Copies(layout, axes)
        self.copied = reduction.spread | self._own

    def place(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs of a layer with its parameters as it uses them."""
        placed = list(inputs)
        for position, index in enumerate(self._layout.kind.layer.parameters):
            use = self._copy if position in self._own else self._gather
            placed[index] = checkpoint_name(use(placed[index], position), WEIGHTS)
        return placed

    def _gather(self, weight: Any, position: int) -> Any:
        kept, used = self._places(position)
        if position not in self._kept:
            return self._gathered(weight, position)
        dtype = weight.dtype
        use = jax.custom_vjp(lambda weight: self._gathered(weight, position))
        use.defvjp(
            lambda weight: (self._gathered(weight, position), None),
            lambda _, gradient: (kept.take_back(gradient, used).astype(dtype),),
        )
        return use(weight)

    def _gathered(self, weight: Any, position: int) -> Any:
        kept, used = self._places(position)
        dtype = self._layout.kind.profile.parameters[position].compute_dtype
        if str(weight.dtype) != dtype or position in self._rows:
            # The cast stays where the parameter is stored: else XLA gathers first and casts then, twice the bytes. So
            # does the row of a stack: else XLA gathers it with its leading dimension, and copies the stack and every
            # row for it. Others stay the value that they are: layers that share a parameter share its gather
            # (docs/design/0081).
            weight = jax.lax.with_sharding_constraint(weight.astype(dtype), kept.stored)
        return kept.bring(weight, used)

    def _places(self, position: int) -> tuple[Kept, NamedSharding]:
        """Return how the keeper has a parameter, and where it is used here: both of its copies, if it comes as such."""
        kept, used = self._keeper(position), self._used(position)
        is_spread = position in self._reduction.spread
        return (kept.copied(self._given.place), self._given.place(used)) if is_spread else (kept, used)

    def _used(self, position: int) -> NamedSharding:
        return self._layout.value(self._layout.kind.layer.inputs[self._layout.kind.layer.parameters[position]])

    def _keeper(self, position: int) -> Kept:
        """How the layer that keeps a parameter has it: this one, unless another one does."""
        return self._kept.get(position) or Kept.of(self._layout, position, self._reduction.role_of(position))

    def _scatters(self, position: int) -> bool:
        """Tell whether gradients are kept where this layer would have them: they are reduced right to there."""
        return bool(self._keeper(position).gradient == self._layout.stored(position, self._reduction.role_of(position)))

    def _copy(self, weight: Any, position: int) -> Any:
        """Gather a parameter and copy it; backward, sum the gradients of the copies into their place."""
        kept, used, dtype = self._keeper(position), self._used(position), weight.dtype
        place = kept.gradient if self._scatters(position) else used
        parameter = self._layout.kind.profile.parameters[position]
        is_spread = position in self._reduction.spread
        # Left to itself the partitioner has tensor ranks that hold the same weight sum a part each, and exchanges the
        # parts (docs/design/0090). A lookup's gradient it may make from rows, which may be less than the table.
        is_summed_whole = self._layout.strategy.inner > 1 or not parameter.lookups

        def copied(weight: Any) -> Any:
            whole = self._gathered(weight, position)
            return self.copies.spread_on(whole, used, self._given) if is_spread else self.copies.spread(whole, used)

        def backward(_: None, cotangent: Any) -> tuple[Any]:
            if is_spread:
                inside = self.copies.sum_inside(cotangent.astype(dtype), place, self._given)
                of_copies, used_copies = self._places(position)
                return (inside if self._scatters(position) else of_copies.take_back(inside, used_copies),)
            if self._reduction.in_float32:
                total = self.copies.sum(cotangent.astype(dtype), place)
                return (total if self._scatters(position) else kept.take_back(total, used),)
            if is_summed_whole:
                cotangent = jax.lax.with_sharding_constraint(cotangent, self.copies.place(used))
            inside = jax.lax.with_sharding_constraint(cotangent, self.copies.place(place))
            return (self.copies.sum(inside, place).astype(dtype),)

        use = jax.custom_vjp(copied)
        use.defvjp(lambda weight: (copied(weight), None), backward)
        return use(weight)


def _run_equations(layout: LayerLayout, inputs: Sequence[Any], copies: Copies, copied: frozenset[int]) -> list[Any]:
    layer = layout.kind.layer
    program, values = layer.forward, layer.forward_values
    border, attention, entrances = Border(layout), Attention(layout), Entrances(layout)
    ranks = PerRank(copies, [program.inputs[layer.parameters[position]] for position in copied])
    orders = product_orders(program)
    environment: dict[Any, Any] = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}

    def read(atom: Any, inside: bool = False) -> Any:
        return atom.val if isinstance(atom, Literal) else border.cross(environment[atom], values[atom], inside=inside)

    def run(equation: Equation, arguments: Sequence[Any]) -> list[Any]:
        if divided := ranked_place(layout, equation):
            return run_ranking(layout, divided, equation, arguments[0])
        if is_grouped(layout, equation):
            return run_grouped(layout, equation, arguments)
        if ranks.reads_copies(equation) or not orders.keys() & set(equation.outputs):
            return ranks.run(equation, arguments)
        return run_product(equation, arguments, orders[equation.outputs[0]])

    def place(variable: Any, equation: Equation, result: Any, inside: bool) -> Any:
        if variable in ranks.copied:
            return result
        partial = _is_partial(layout, equation)
        placed = _constrain(layout, equation.name, result, values[variable], inside=inside, partial=partial)
        is_product = is_kept(equation.name, "dots", batched=is_batched(equation.name, equation.eqn.params))
        return checkpoint_name(placed, PER_RANK) if is_product and ranks.reads_copies(equation) else placed

    by_kernel: set[Equation] = set()
    for position, equation in enumerate(program.equations):
        call = attention.starting_at(equation)
        if call and ranks.copied.isdisjoint(call.inputs):
            environment[call.outputs[0]] = attention.run(call, environment, border)
            by_kernel.update(call.equations)
        if equation in by_kernel:
            continue
        inside = border.is_inside(position)
        results = run(equation, [entrances.enter(equation, v, read(v, inside)) for v in equation.inputs])
        for variable, result in zip(equation.outputs, results, strict=True):
            environment[variable] = place(variable, equation, result, inside)
    return [read(v) for v in program.outputs]


def _is_partial(layout: LayerLayout, equation: Equation) -> bool:
    """Tell whether ``equation`` looks up in a sharded table: each rank finds its own rows only."""
    table = equation.inputs[0] if equation.name == "gather" else None
    return isinstance(table, Variable) and layout.is_tensor_sharded(layout.kind.layer.forward_values[table])


def _constrain(layout: LayerLayout, primitive: str, result: Any, value: Value, *, inside: bool, partial: bool) -> Any:
    stream = layout.strategy.sp and layout.is_stream(value)
    # What is cut out of a fused projection: else XLA may hand the sequence sharding of the stream on to its cotangent.
    part = primitive == "slice" and layout.kind.is_factored
    if not result.ndim or not (is_kernel_name(primitive) or part or (stream and primitive in _STREAM_PRIMITIVES)):
        return result
    if stream and partial:
        # Summed over the vocabulary first, sharded along the sequence after: else XLA shards the indices along it.
        result = jax.lax.with_sharding_constraint(result, layout.value(value, sequence=False))
    return jax.lax.with_sharding_constraint(result, layout.value(value, inside=inside))


def is_array(value: Any) -> bool:
    """Tell whether ``value`` has dimensions to shard: neither a scalar nor a random key."""
    return value.ndim > 0 and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
