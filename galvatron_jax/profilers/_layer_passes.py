"""The passes of one layer on one device as functions, cut where the training step cuts them.

    forward           what a layer hands on, and what it keeps for its backward pass
    backward          from what it kept and the cotangents of its results to gradients
    backward-dots     the same, with only results of products with weights kept
    backward-full     the same, with only its inputs kept: the forward pass runs again inside

What is kept is decided as the runtime does (``analysis.is_kept``), and weights come in their compute dtype: casting and
gathering them depends on zero, not on the layer. Full and dots less plain backward is what recomputation adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..analysis import LocalLayer, is_batched, is_kept
from ..measured import Pass
from ..strategy import Remat

PassName = Literal["forward", "backward", "backward-full", "backward-dots"]
PASSES: tuple[PassName, ...] = ("forward", "backward", "backward-full", "backward-dots")

ADDED_BY: dict[PassName, Pass] = {"backward-full": "recompute", "backward-dots": "recompute-dots"}
"""What a backward pass that runs forward again adds to the plain one."""


_REMAT: dict[PassName, Remat] = {"backward": "none", "backward-full": "full", "backward-dots": "dots"}


@dataclasses.dataclass(frozen=True)
class PassProgram:
    """One pass: a function of arrays, and what they look like."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    kept_bytes: int = 0
    """Of what forward keeps, its own inputs left out."""


def pass_program(layer: LocalLayer, what: PassName) -> PassProgram:
    """Return one pass of ``layer``.

    Raises:
        UnsupportedError: the layer cannot run at these sizes.
    """
    if what == "forward":
        kept, _ = _pullback(layer, "none")
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in _own(kept, layer))
        return PassProgram(lambda *inputs: _forward(layer, inputs), layer.inputs, size)
    kept, tree = _pullback(layer, _REMAT[what])

    def run(*arrays: Any) -> Sequence[Any]:
        gradients: Sequence[Any] = jax.tree.unflatten(tree, arrays[: len(kept)])(list(arrays[len(kept) :]))
        return gradients

    return PassProgram(run, (*kept, *_cotangents(layer)))


def _forward(layer: LocalLayer, inputs: Sequence[Any]) -> list[Any]:
    """Outputs and all that is kept and not an input."""
    _, pullback, outputs = _differentiate(layer, "none", inputs)
    given = {id(x) for x in inputs}
    return [*outputs, *(leaf for leaf in jax.tree.leaves(pullback) if id(leaf) not in given)]


def _differentiate(layer: LocalLayer, remat: Remat, inputs: Sequence[Any]) -> tuple[Any, Any, Any]:
    """``jax.vjp`` of the layer: (differentiable outputs, pullback, all outputs)."""

    def forward(*parts: Any) -> tuple[list[Any], list[Any]]:
        values = list(inputs)
        for index, part in zip(layer.differentiated, parts, strict=True):
            values[index] = part
        outputs = jax.checkpoint(layer.run, policy=_policy(remat))(values)
        return [o for o in outputs if jnp.issubdtype(o.dtype, jnp.inexact)], outputs

    result: tuple[Any, Any, Any] = jax.vjp(forward, *[inputs[i] for i in layer.differentiated], has_aux=True)
    return result


def _policy(remat: Remat) -> Callable[..., bool]:
    """What ``jax.checkpoint`` keeps: the estimate's own rule (``analysis.is_kept``), as in the runtime."""

    def keep(primitive: Any, *_: Any, **params: Any) -> bool:
        name = str(primitive.name)
        return is_kept(name, remat, batched=is_batched(name, params))

    return keep


def _pullback(layer: LocalLayer, remat: Remat) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """Leaves and structure of what backward needs, abstract."""
    abstract = jax.eval_shape(lambda inputs: _differentiate(layer, remat, inputs)[1], list(layer.inputs))
    leaves, tree = jax.tree.flatten(abstract)
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves], tree


def _own(kept: Sequence[jax.ShapeDtypeStruct], layer: LocalLayer) -> list[jax.ShapeDtypeStruct]:
    """Leaves that are none of the inputs: those are found by shape and dtype, each once."""
    inputs = [(x.shape, x.dtype) for x in layer.inputs]
    own = []
    for leaf in kept:
        if (leaf.shape, leaf.dtype) in inputs:
            inputs.remove((leaf.shape, leaf.dtype))
        else:
            own.append(leaf)
    return own


def _cotangents(layer: LocalLayer) -> tuple[jax.ShapeDtypeStruct, ...]:
    outputs = jax.eval_shape(layer.run, list(layer.inputs))
    return tuple(o for o in outputs if jnp.issubdtype(o.dtype, jnp.inexact))
