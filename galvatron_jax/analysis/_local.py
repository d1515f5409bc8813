"""A layer at other sizes: the program that one device runs of it, made from the equations of the one trace.

An unmodified model cannot be traced at a share of its heads: its sizes are written in its configuration. But the
analysis knows which index space every dimension of every value holds. So the layer's own equations run again on arrays
whose dimensions are recomputed from those index spaces, with the sizes of sharded classes divided and any number of
samples: exactly what a partitioner leaves on one device, without its collectives. An operation that sums over a sharded
class gives a partial sum of the right shape; its time and bytes are those of the share, its values mean nothing.

Most primitives take their shapes from their operands. Those that carry shapes as parameters (``SHAPED``) get them anew
from the dimensions of their result; loops and calls with derivative rules of their own are entered. Every result is
checked against the shape that its dimensions have, and what cannot be run at other sizes is refused, never guessed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from ..errors import UnsupportedError
from ..profile import BATCH
from ._attention import KERNEL_DTYPES, attention_call
from ._dimensions import Value, Walk, copy_dims
from ._factors import Factors
from ._flatten import Equation, Program, Variable, flatten, is_call
from ._jaxpr import abstract, inner_programs, is_differentiable, run_equation, scan_operands
from ._kind import AnalysedKind

Shape = tuple[int, ...]
Pullback = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class LocalLayer:
    """One layer kind as one device runs it."""

    inputs: tuple[jax.ShapeDtypeStruct, ...]
    """Of the segment, parameters in their compute dtype."""
    run: Callable[[Sequence[Any]], list[Any]]
    """From such inputs to the outputs; can be differentiated and traced."""
    parameters: tuple[int, ...]
    differentiated: tuple[int, ...]


def local_layer(kind: AnalysedKind, samples: int, tp: int = 1, *, kernel: str | None = None) -> LocalLayer:
    """Return what one device runs of a layer of ``kind``.

    Args:
        kind: The analysed kind, traced with more than one sample.
        samples: On the device.
        tp: Tensor-parallel degree; it divides the classes of the best candidate.
        kernel: What runs attention that asks for cuDNN; None: its XLA form.

    Raises:
        UnsupportedError: when run, a primitive of the layer cannot run at these sizes.
    """
    layer, profile = kind.layer, kind.profile
    shards = profile.best_candidate.shards(tp, profile.classes) if profile.best_candidate else {}
    factors = copy.deepcopy(layer.dimensions.factors)  # entering inner programs unifies more: not in the analysis
    sizes = {
        factor: samples if name == BATCH else factors.size(factor) // shards[name]
        for factor, name in kind.names.items()
        if name == BATCH or name in shards
    }
    local = _Local(factors, sizes, kernel)
    dtypes = {index: profile.parameters[p].compute_dtype for p, index in enumerate(layer.parameters)}
    inputs = tuple(
        jax.ShapeDtypeStruct(local.shape(value), dtypes.get(i, variable.aval.dtype))
        for i, (value, variable) in enumerate(zip(layer.inputs, layer.segment.inputs, strict=True))
    )

    def run(arrays: Sequence[Any]) -> list[Any]:
        return local.run(layer.forward, layer.forward_values, arrays)

    return LocalLayer(inputs, run, layer.parameters, layer.differentiated)


@dataclasses.dataclass(frozen=True)
class _Local:
    """Runs flat programs at other sizes."""

    factors: Factors
    sizes: Mapping[int, int]
    """Size of each class; a factor that is not named keeps its size."""
    kernel: str | None = None
    """Implementation of attention that asks for cuDNN."""

    def shape(self, value: Value) -> Shape:
        """Return the shape of ``value`` at these sizes."""
        sizes = self._part_sizes()
        resolve, size = self.factors.resolve, self.factors.size
        return tuple(math.prod(sizes.get(f, size(f)) for f in resolve(dim)) for dim in value.dims)

    def _part_sizes(self) -> dict[int, int]:
        """Sizes by the factors as they are known now; of a class that has been broken, the major part changes."""
        found = {}
        for factor, size in self.sizes.items():
            major, *minor = self.factors.resolve([factor])
            found[major] = size // math.prod(self.factors.size(f) for f in minor)
        return found

    def run(self, program: Program, values: Mapping[Variable, Value], inputs: Sequence[Any]) -> list[Any]:
        """Run ``program`` on arrays of the shapes that ``values`` have at these sizes."""
        environment: dict[Variable, Any] = dict(zip(program.inputs, inputs, strict=True))
        for variable, constant in program.constants.items():
            environment[variable] = constant[tuple(slice(n) for n in self.shape(values[variable]))]

        def read(atom: Variable | Literal) -> Any:
            return atom.val if isinstance(atom, Literal) else environment[atom]

        kernels = {call.equations[0]: call for call in program.calls} if self.kernel else {}
        by_kernel: set[Equation] = set()
        for equation in program.equations:
            call = kernels.get(equation)
            if call and self.kernel and read(call.inputs[0]).dtype in KERNEL_DTYPES:
                attention = attention_call(call.name).run([read(v) for v in call.inputs], self.kernel)
                environment.update(zip(call.outputs, [attention], strict=True))  # type: ignore[arg-type]
                by_kernel.update(call.equations)
            if equation in by_kernel:
                continue
            described = [values.get(v) if isinstance(v, Variable) else None for v in equation.inputs]
            outputs = [values[v] for v in equation.outputs]
            results = self._equation(equation, [read(v) for v in equation.inputs], described, outputs)
            for value, result in zip(outputs, results, strict=True):
                if tuple(result.shape) != self.shape(value):
                    raise _refused(equation, f"got {tuple(result.shape)} in place of {self.shape(value)}")
            environment.update(zip(equation.outputs, results, strict=True))
        return [read(v) for v in program.outputs]

    def _equation(
        self, equation: Equation, arrays: Sequence[Any], inputs: Sequence[Value | None], outputs: Sequence[Value]
    ) -> Sequence[Any]:
        known = [value for value in (*inputs, *outputs) if value is not None]
        if all(self.shape(value) == value.shape for value in known):
            return run_equation(equation.eqn, arrays)
        shapes = [self.shape(value) for value in outputs]
        if equation.name in SHAPED:
            change = SHAPED[equation.name](equation, arrays, shapes)
            return run_equation(equation.eqn.replace(params={**equation.eqn.params, **change}), arrays)
        whole = [v if v is not None else _literal(a) for v, a in zip(inputs, equation.inputs, strict=True)]
        if equation.name == "scan":
            return self._scan(equation.eqn, arrays, whole)
        if equation.name.startswith("custom_"):
            results: list[Any] = self._custom(equation.eqn, whole)(*arrays)
            return results
        is_scatter = equation.name.startswith("scatter")  # its program combines two scalars
        if next(inner_programs(equation.eqn), None) is not None and not is_scatter:
            raise _refused(equation, "it holds a program that has not been entered")
        try:
            return run_equation(equation.eqn, arrays)
        except (TypeError, ValueError) as error:
            raise _refused(equation, str(error).splitlines()[0]) from None

    def _walk(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> tuple[Program, list[Value], dict[Variable, Value]]:
        """Return an inner program flat, the dimensions of its results and those of all its values."""
        program = flatten(closed, is_call)
        results, values = Walk(self.factors).run(program, inputs)
        return program, results, values

    def _scan(self, eqn: JaxprEqn, arrays: Sequence[Any], inputs: Sequence[Value]) -> list[Any]:
        fixed, carried = scan_operands(eqn.params)
        start = fixed + carried
        rows = [Value(value.shape[1:], value.dtype, value.dims[1:]) for value in inputs[start:]]
        program, _, values = self._walk(eqn.params["jaxpr"], [*inputs[:start], *rows])

        def body(carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            results = self.run(program, values, [*arrays[:fixed], *carry, *xs])
            return results[:carried], results[carried:]

        length = arrays[start].shape[0] if arrays[start:] else eqn.params["length"]
        carry, columns = jax.lax.scan(
            body, list(arrays[fixed:start]), list(arrays[start:]), length, reverse=eqn.params["reverse"]
        )
        return [*carry, *columns]

    def _custom(self, eqn: JaxprEqn, inputs: Sequence[Value]) -> Callable[..., Any]:
        """Return a call with a derivative rule of its own as a function at these sizes, its rule with it."""
        chosen = [i for i, value in enumerate(inputs) if is_differentiable(value.dtype)]
        trees: list[Any] = []

        def both(*whole: Any) -> tuple[Any, list[Any]]:
            outputs, pullback = jax.vjp(
                lambda *parts: run_equation(eqn, _put(whole, chosen, parts)), *_get(whole, chosen)
            )
            leaves, tree = jax.tree.flatten(pullback)
            trees.append(tree)
            return outputs, leaves

        spec = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs]
        closed = jax.make_jaxpr(both)(*spec)
        count = len(eqn.outvars)
        forward, results, values = self._walk(closed, inputs)
        kept = [abstract(aval) for aval in closed.out_avals[count:]]
        cotangents = [abstract(aval) for aval in closed.out_avals[:count]]
        pull = jax.make_jaxpr(lambda leaves, given: jax.tree.unflatten(trees[-1], leaves)(given))(kept, cotangents)
        given = [Value(value.shape, value.dtype, copy_dims(value)) for value in results[:count]]
        backward, _, back_values = self._walk(pull, [*results[count:], *given])

        @jax.custom_vjp
        def call(*parts: Any) -> Any:
            return self.run(forward, values, parts)[:count]

        def run_forward(*parts: Any) -> tuple[Any, Any]:
            made = self.run(forward, values, parts)
            return made[:count], made[count:]

        def run_backward(leaves: Any, given: Any) -> Any:
            return tuple(_put([None] * len(inputs), chosen, self.run(backward, back_values, [*leaves, *given])))

        call.defvjp(run_forward, run_backward)
        return call


def _reshaped(equation: Equation, arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    return {"new_sizes": shapes[0]}


def _shape(equation: Equation, arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    return {"shape": shapes[0]}


def _sliced(equation: Equation, arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    """Along a dimension whose size changes, only the whole of it may be taken."""
    params, whole = equation.eqn.params, abstract(equation.inputs[0].aval).shape
    limits = list(params["limit_indices"])
    for axis, (before, now) in enumerate(zip(whole, arrays[0].shape, strict=True)):
        if before != now:
            if (params["start_indices"][axis], limits[axis]) != (0, before):
                raise _refused(equation, f"it takes a part of axis {axis}, whose size changes")
            limits[axis] = now
    return {"limit_indices": tuple(limits)}


def _split(equation: Equation, arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    axis = equation.eqn.params["axis"]
    return {"sizes": tuple(shape[axis] for shape in shapes)}


def _windowed(equation: Equation, arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    return {"slice_sizes": shapes[0]}


def _gathered(equation: Equation, arrays: Sequence[Any], shapes: Sequence[Shape]) -> dict[str, Any]:
    """A window over the whole of a dimension stays that; a sharded dimension is looked up like a whole one."""
    whole = abstract(equation.inputs[0].aval).shape
    sizes = equation.eqn.params["slice_sizes"]
    windows = zip(sizes, whole, arrays[0].shape, strict=True)
    return {"slice_sizes": tuple(now if size == before else size for size, before, now in windows)}


SHAPED: dict[str, Callable[[Equation, Sequence[Any], Sequence[Shape]], dict[str, Any]]] = {
    "broadcast_in_dim": _shape,
    "dynamic_slice": _windowed,
    "gather": _gathered,
    "iota": _shape,
    "random_bits": _shape,
    "reshape": _reshaped,
    "rng_bit_generator": _shape,
    "rng_uniform": _shape,
    "slice": _sliced,
    "split": _split,
}
"""Primitives with shapes among their parameters: (equation, local operands, local result shapes) to new parameters."""


def _literal(atom: Any) -> Value:
    """A constant written into the program: scalars have no dimensions."""
    return Value(tuple(atom.aval.shape), str(atom.aval.dtype), [[] for _ in atom.aval.shape])


def _get(values: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
    return [values[i] for i in chosen]


def _put(values: Sequence[Any], chosen: Sequence[int], parts: Sequence[Any]) -> list[Any]:
    filled = list(values)
    for index, part in zip(chosen, parts, strict=True):
        filled[index] = part
    return filled


def _refused(equation: Equation, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"the operation {equation.name} cannot run at another size: {reason}",
        where=equation.scope,
        action="its layer is priced by formulas there",
    )
