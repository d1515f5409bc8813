"""One layer kind: its forward and backward pass as one analysed program.

The backward pass is traced, not assumed: ``jax.vjp`` of the segment gives the residuals it really keeps, and the
equations of the pullback give the matrix products, reductions and temporaries of the real backward pass. So no rule
"backward = 2 x forward" is needed anywhere, and one rule ("an operation that sums over a sharded factor leaves partial
results") predicts the collectives of both directions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
from jax.extend.core import jaxpr_as_fun

from ..profile import Phase
from ..strategy import Remat
from ._cut import Segment
from ._dimensions import Dimensions, Op, Value, Walk, is_opened
from ._factors import Factors
from ._flatten import Program, Variable, flatten, is_plain_call
from ._jaxpr import abstract, is_differentiable
from ._no_gradient import no_gradient
from ._primitives import is_kept

BACKWARD = "backward@"
"""Scope text around the pullback."""


@dataclasses.dataclass
class Layer:
    """A segment with both passes analysed; indices refer to the segment's inputs and outputs."""

    segment: Segment
    dimensions: Dimensions
    ops: list[Op]
    """Operations that results depend on, in order (dead code left out)."""
    parameters: tuple[int, ...]
    differentiated: tuple[int, ...]
    """Inputs whose cotangent is computed: parameters and values that depend on parameters."""
    residuals: list[Value]
    """What the pullback keeps, without inputs of the segment."""
    outputs: list[Value]
    gradients: dict[int, Value]
    """Cotangent of each differentiated input."""
    forward: Program
    """The forward pass as the runtime runs it: flat, but calls with derivative rules of their own kept whole."""
    forward_values: dict[Variable, Value]
    """Dimensions of every value of ``forward``, in the same factors."""

    @functools.cached_property
    def makers(self) -> dict[int, Op]:
        """The operation that makes each value, by the value's id."""
        return {id(value): op for op in self.ops for value in op.outputs}

    @functools.cached_property
    def readers(self) -> dict[int, list[Op]]:
        """The operations that read each value, by the value's id."""
        found: dict[int, list[Op]] = {}
        for op in self.ops:
            for value in op.inputs:
                found.setdefault(id(value), []).append(op)
        return found

    @functools.cached_property
    def stream(self) -> list[Value]:
        """The activations that enter and leave with a gradient: not masks, tables, keys or scalars (added losses)."""
        flowing = {id(self.inputs[i]) for i in self.differentiated}
        for op in self.ops:
            if any(id(v) in flowing for v in op.inputs):
                flowing.update(id(v) for v in op.outputs if "float" in v.dtype)
        inputs = [self.inputs[i] for i in self.differentiated if i not in self.parameters and self.inputs[i].shape]
        return inputs + [v for v in self.outputs if len(v.shape) > 1 and id(v) in flowing]

    def contracted(self, op: Op) -> frozenset[int]:
        """Classes that ``op`` sums over."""
        return frozenset(self.dimensions.factors.resolve(op.contracted))

    def classes(self, value: Value) -> frozenset[int]:
        """Classes of all dimensions of ``value``."""
        return frozenset(self.dimensions.flat_classes(value))

    def recomputed_by(self, op: Op) -> frozenset[Remat]:
        """Rematerialisations that run ``op`` again."""
        return frozenset(remat for remat, ops in self._recomputed.items() if id(op) in ops)

    def reads_again(self, value: Value, remat: Remat, exchanged: frozenset[int] = frozenset()) -> bool:
        """Tell whether the backward pass reads an input: its own operations do, or those that ``remat`` runs again.

        Args:
            value: The input.
            remat: What is kept.
            exchanged: Ids of values that are kept besides (``_ulysses``).
        """
        again = self._again(remat, exchanged) if exchanged else self._recomputed[remat]
        return any(phase_of(op) == "backward" or id(op) in again for op in self.readers.get(id(value), ()))

    @functools.cached_property
    def _recomputed(self) -> dict[Remat, set[int]]:
        return {remat: self._again(remat) for remat in get_args(Remat)}

    def _again(self, remat: Remat, exchanged: frozenset[int] = frozenset()) -> set[int]:
        """Forward operations between what ``remat`` keeps, ``exchanged`` among it, and what the backward pass needs."""
        needed = {id(v) for v in self.residuals}
        again = set()
        for op in reversed(self.ops):
            needs = phase_of(op) == "forward" and any(id(v) in needed - exchanged for v in op.outputs)
            kept = is_kept(op.name, remat, batched=op.batched)
            if needs and not kept:
                again.add(id(op))
            if needs and (not kept or op.name == "scan"):
                # What a policy keeps of a loop it keeps inside: the elementwise operations of the body run again.
                needed.update(id(v) for v in op.inputs)
        return again

    @property
    def inputs(self) -> list[Value]:
        """Values of the segment's inputs."""
        return self.dimensions.inputs[: len(self.segment.inputs)]


def phase_of(op: Op) -> Phase:
    """Tell the pass that ``op`` belongs to."""
    return "backward" if BACKWARD in op.scope else "forward"


class Samples(NamedTuple):
    """Inputs and outputs whose dimension 0 holds the same samples, whether an operation says so or not."""

    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()


def analyse_layer(
    segment: Segment, parameters: Sequence[int], differentiated: Sequence[int], samples: Samples
) -> Layer:
    """Trace both passes of ``segment`` and analyse their dimensions.

    Args:
        segment: A segment of a cut program.
        parameters: Indices of the inputs that are trained parameters.
        differentiated: Indices of the inputs that need a cotangent.
        samples: Which inputs and outputs hold the samples of the batch.

    Raises:
        AnalysisError: an operation of it has no gradient.
    """
    chosen = tuple(differentiated)
    try:
        joint, outputs, kept = _trace_both_passes(segment, chosen)
    except Exception as error:
        raise no_gradient(segment.program, error) from error
    walk = Walk(Factors())
    arguments = [walk.fresh(v.aval) for v in joint.inputs]
    for index in samples.inputs[1:]:
        walk.factors.unify(arguments[samples.inputs[0]].dims[0], arguments[index].dims[0])
    forward = flatten(segment.program, is_plain_call)
    _, forward_values = walk.run(forward, arguments[: len(segment.inputs)])
    walk.ops.clear()
    results, _ = walk.run(joint, arguments)
    for index in samples.outputs if samples.inputs else ():
        walk.factors.unify(arguments[samples.inputs[0]].dims[0], results[index].dims[0])
    dimensions = Dimensions(walk.factors, walk.ops, arguments, results, walk.unknown)
    gradients = dict(zip(chosen, results[outputs + kept :], strict=True))
    _tie(dimensions, segment, results[:outputs], gradients)
    own = {id(v) for v in arguments}
    return Layer(
        segment=segment,
        dimensions=dimensions,
        ops=_live_ops(dimensions),
        parameters=tuple(parameters),
        differentiated=chosen,
        residuals=list({id(v): v for v in results[outputs : outputs + kept] if id(v) not in own}.values()),
        outputs=results[:outputs],
        gradients=gradients,
        forward=forward,
        forward_values=forward_values,
    )


def _trace_both_passes(segment: Segment, chosen: tuple[int, ...]) -> tuple[Program, int, int]:
    """Return the flat program of both passes, and how many of its results are outputs and how many residuals.

    It takes the segment's inputs and the cotangents of its outputs; its results are the outputs, what the pullback
    keeps, and the cotangents of the ``chosen`` inputs.
    """
    run = jaxpr_as_fun(segment.program)
    counts: dict[str, int] = {}

    def both_passes(inputs: list[Any], cotangents: list[Any]) -> tuple[Any, Any, Any]:
        def forward(*parts: Any) -> tuple[list[Any], list[Any]]:
            values = list(inputs)
            for index, part in zip(chosen, parts, strict=True):
                values[index] = part
            outputs = run(*values)
            return [o for o in outputs if is_differentiable(o.dtype)], outputs

        _, pullback, outputs = jax.vjp(forward, *[inputs[i] for i in chosen], has_aux=True)
        with jax.named_scope(BACKWARD):
            gradients = pullback(cotangents)
        kept = jax.tree.leaves(pullback)
        counts.update(outputs=len(outputs), kept=len(kept))
        return outputs, kept, gradients

    inputs = [abstract(aval) for aval in segment.program.in_avals]
    cotangents = [abstract(v.aval) for v in segment.outputs if is_differentiable(v.aval.dtype)]
    joint = flatten(jax.make_jaxpr(both_passes)(inputs, cotangents), is_opened)
    return joint, counts["outputs"], counts["kept"]


def _tie(dimensions: Dimensions, segment: Segment, outputs: list[Value], gradients: dict[int, Value]) -> None:
    """A value and its cotangent hold the same index spaces."""
    cotangents = iter(dimensions.inputs[len(segment.inputs) :])
    for variable, output in zip(segment.outputs, outputs, strict=True):
        if is_differentiable(variable.aval.dtype):
            _unify(dimensions, output, next(cotangents))
    for index, gradient in gradients.items():
        _unify(dimensions, dimensions.inputs[index], gradient)


def _unify(dimensions: Dimensions, left: Value, right: Value) -> None:
    for a, b in zip(left.dims, right.dims, strict=True):
        dimensions.factors.unify(a, b)


def _live_ops(dimensions: Dimensions) -> list[Op]:
    """Drop operations that no result depends on (XLA does; bodies of loops are kept whole)."""
    needed = {id(v) for v in dimensions.outputs}
    live = []
    for op in reversed(dimensions.ops):
        if op.inner or any(id(v) in needed for v in op.outputs):
            needed.update(id(v) for v in op.inputs)
            live.append(op)
    return live[::-1]
