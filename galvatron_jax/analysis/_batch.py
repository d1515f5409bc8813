"""Batches: which leaves hold samples, and how large one microbatch is.

Dimension 0 of a leaf is the batch when it has the size that most leaves begin with; of two sizes that are equally
common, the one of the leaves with more elements. All other leaves (class weights, positions, a temperature, a random
key) are the same for every sample: each microbatch and device is given them whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..errors import AnalysisError
from ._jaxpr import abstract

_NUMBERS = "biufcV"
"""Kinds of NumPy dtypes that JAX knows: bfloat16 and its like are V."""


def sample_count(batch: Any) -> int | None:
    """Return the number of samples of a batch, None when no leaf has a dimension."""
    return _common_size(jax.tree.leaves(batch))


def which_have_samples(batch: Any) -> tuple[bool, ...]:
    """Tell for each leaf of ``batch`` whether its dimension 0 is the batch."""
    leaves = jax.tree.leaves(batch)
    size = _common_size(leaves)
    return tuple(_may_have_samples(leaf) and leaf.shape[0] == size for leaf in leaves)


def disagreeing_samples(batch: Any) -> list[int]:
    """Return the sizes of dimension 0 of leaves that differ in nothing else: one of them must be a mistake."""
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(batch) if _may_have_samples(leaf)}
    tails = Counter(shape[1:] for shape in shapes if len(shape) > 1)
    return sorted({shape[0] for shape in shapes if tails[shape[1:]] > 1})


def abstract_batch(batch: Any, samples: int) -> Any:
    """Return the shapes of ``batch`` if it had ``samples`` samples.

    Raises:
        AnalysisError: a leaf is neither an array nor a number.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(batch)
    shapes = [_abstract(path, leaf) for path, leaf in leaves]
    sized = [
        jax.ShapeDtypeStruct((samples, *shape.shape[1:]), shape.dtype) if has_samples else shape
        for shape, has_samples in zip(shapes, which_have_samples(batch), strict=True)
    ]
    return jax.tree.unflatten(structure, sized)


def _common_size(leaves: Sequence[Any]) -> int | None:
    counts: Counter[int] = Counter()
    elements: Counter[int] = Counter()
    for leaf in leaves:
        if _may_have_samples(leaf):
            counts[leaf.shape[0]] += 1
            elements[leaf.shape[0]] += int(np.prod(leaf.shape))
    return max(counts, key=lambda size: (counts[size], elements[size]), default=None)


def _may_have_samples(leaf: Any) -> bool:
    """Random keys and numbers never have samples."""
    return bool(np.ndim(leaf)) and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return abstract(leaf)
    if np.asarray(leaf).dtype.kind not in _NUMBERS:
        raise AnalysisError(
            f"got a {type(leaf).__name__}",
            expected="an array, a number or a jax.ShapeDtypeStruct",
            where=f"batch{jax.tree_util.keystr(path)}",
            action="leave it out of the batch",
        )
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(np.result_type(leaf)))  # int64 is int32
