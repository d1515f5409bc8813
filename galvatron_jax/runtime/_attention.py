"""Attention by cuDNN's kernel: put back where the model asked for it and the analysis saw its XLA form.

The kernel runs rank by rank (``jax.shard_map``) on whole sequences: a rank has some of the samples and some of the
heads, the key and value heads that they read among them, and nothing is communicated. Where a layout divides anything
else, where the devices are no GPUs, or where the operands are no 16-bit floats, the XLA form runs: the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Literal
from jax.sharding import NamedSharding

from ..analysis import KERNEL_DTYPES, Call, Equation, Variable, attention_call, attention_kernel
from ._border import Border
from ._layout import LayerLayout

_HEADS = {"query": 2, "key": 2, "value": 2, "bias": 1, "mask": 1}
"""The dimension of the heads: ``[B, T, N, H]``, ``[B, N, T, S]``; lengths of sequences, ``[B]``, have none."""


class Attention:
    """The calls of attention in one layer that a kernel runs under the layer's layout."""

    def __init__(self, layout: LayerLayout) -> None:
        """Find them."""
        self._layout, self._values = layout, layout.kind.layer.forward_values
        self._implementation = attention_kernel(layout.stage.mesh.devices.flat[0].platform)
        calls = layout.kind.layer.forward.calls if self._implementation else ()
        self._calls = {call.equations[0]: call for call in calls if self._is_legal(call)}

    def starting_at(self, equation: Equation) -> Call | None:
        """Return the call whose first equation this is."""
        return self._calls.get(equation)

    def run(self, call: Call, environment: Mapping[Any, Any], border: Border) -> Any:
        """Return the result of ``call`` where the layer's next operations read it."""
        asked, implementation = attention_call(call.name), self._implementation
        assert implementation is not None, "only then there are calls"
        arrays = [environment[v] for v in call.inputs]
        for i, variable in enumerate(call.inputs[:3]):  # queries, keys and values; masks have no sequence to exchange
            arrays[i] = border.cross_at_kernel(arrays[i], self._values[_variable(variable)], inside=True)

        def run(*shards: Any) -> Any:
            return asked.run(shards, implementation)

        kernel: Callable[..., Any] = jax.shard_map(
            run,
            mesh=self._layout.stage.mesh,
            in_specs=tuple(self._place(v).spec for v in call.inputs),
            out_specs=self._place(call.outputs[0]).spec,
            check_vma=False,
        )
        result = kernel(*arrays)
        if self._layout.strategy.ulysses > 1:
            # The kernel keeps its result where it made it, the layer where it reads it. Seen as one array, XLA keeps
            # one, and exchanges all that a loop has stacked in every turn.
            result = jax.lax.optimization_barrier(result)
        return border.cross_at_kernel(result, self._values[_variable(call.outputs[0])], inside=False)

    def _place(self, atom: Any) -> NamedSharding:
        return self._layout.value(self._values[_variable(atom)], inside=True)

    def _is_legal(self, call: Call) -> bool:
        """Tell whether every rank has all that its samples and heads read, in a shape and dtype of the kernel."""
        if any(isinstance(v, Literal) for v in call.inputs):
            return False
        arrays = dict(zip(attention_call(call.name).arrays, map(_variable, call.inputs), strict=True))
        if str(arrays["query"].aval.dtype) not in KERNEL_DTYPES:
            return False
        if any(variable.aval.ndim != 4 for name, variable in arrays.items() if name in _HEADS):
            return False
        ranks = {name: self._ranks(variable) for name, variable in arrays.items()}
        if any(n > 1 for name, counts in ranks.items() for d, n in enumerate(counts) if d not in (0, _HEADS.get(name))):
            return False
        queries, keys, values = (ranks[name][2] for name in ("query", "key", "value"))
        one_kv_head = keys == arrays["key"].aval.shape[2] and queries % keys == 0
        masks = [(ranks[name][1], arrays[name].aval.shape[1]) for name in ("bias", "mask") if name in arrays]
        return values == keys and (keys == queries or one_kv_head) and all(n in (queries, size) for n, size in masks)

    def _ranks(self, variable: Variable) -> list[int]:
        """Over how many ranks each dimension is divided."""
        spec = self._place(variable).spec
        axes = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
        return [self._layout.stage.size(names) for names in axes]


def _variable(atom: Any) -> Variable:
    assert isinstance(atom, Variable), "literals are no operands of a kernel"
    return atom
