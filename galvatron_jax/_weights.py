"""Weights that are somewhere else: given by dotted path, read part by part, each device its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from .analysis import Rows, Stack
from .errors import ModelError
from .runtime import UnreadArray

Index = tuple[slice, ...]

MOST_SHOWN = 8


class Sliceable(Protocol):
    """A numpy array, a memory map, a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return a part, as something that numpy understands."""


Weights = Mapping[str, Sliceable]
"""By dotted path of the parameter: ``layers.0.attention.query.kernel``."""


def unread_parameters(rows: Rows, weights: Weights) -> Any:
    """Return the program's parameters, none of them read yet, in the dtypes of the model.

    Args:
        rows: How the program's parameters are made of the user's.
        weights: All parameters of the user's model, and no others.

    Raises:
        ModelError: names or shapes are not those of the model; the message lists them.
    """
    wanted = dict(zip(rows.model.paths, jax.tree.leaves(rows.model.parameters), strict=True))
    _check(wanted, weights)
    leaves: list[UnreadArray] = []
    for position, (path, leaf) in enumerate(wanted.items()):
        stack, source = rows.stacks.get(position), weights[path]
        if stack is None:
            leaves.append(UnreadArray(leaf.shape, leaf.dtype, _Part(source, leaf.dtype)))
        else:
            shape = tuple(n for axis, n in enumerate(leaf.shape) if axis != stack.axis)
            leaves += [UnreadArray(shape, leaf.dtype, _Part(source, leaf.dtype, stack, r)) for r in range(stack.count)]
    return jax.tree.unflatten(jax.tree.structure(rows.parameters), leaves)


class _Part:
    """Reads a part of a source, or of one row of a stack."""

    def __init__(self, source: Sliceable, dtype: Any, stack: Stack | None = None, row: int = 0) -> None:
        self._source, self._dtype, self._stack, self._row = source, dtype, stack, row

    def __call__(self, index: Index) -> np.ndarray[Any, Any]:
        if self._stack is None:
            return np.asarray(self._source[index]).astype(self._dtype)
        axis = self._stack.axis
        row = (*index[:axis], slice(self._row, self._row + 1), *index[axis:])
        return np.asarray(self._source[row]).astype(self._dtype).squeeze(axis)


def _check(wanted: Mapping[str, Any], weights: Weights) -> None:
    problems = [f"{path} is missing" for path in wanted if path not in weights]
    problems += [f"{path} is no parameter of this model" for path in weights if path not in wanted]
    problems += [
        f"{path} has shape {tuple(weights[path].shape)}, the model's has {tuple(leaf.shape)}"
        for path, leaf in wanted.items()
        if path in weights and tuple(weights[path].shape) != tuple(leaf.shape)
    ]
    if problems:
        more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
        raise ModelError(
            "\n  - ".join(["they are not those of the model:", *problems[:MOST_SHOWN], *more]),
            where="weights",
            action="give the weights of this very model",
        )
