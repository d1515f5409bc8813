"""Batches: which leaves hold samples, and how large one microbatch is.

Dimension 0 of a leaf is the batch when it has the size that most leaves begin with. All other leaves (class weights,
positions, a temperature, a random key) are the same for every sample: each microbatch and device is given them whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ._jaxpr import abstract


def sample_count(batch: Any) -> int | None:
    """Return the number of samples of a batch, None when no leaf has a dimension.

    Of two sizes that are equally common, the one that comes first.
    """
    return _common_size(jax.tree.leaves(batch))


def which_have_samples(batch: Any) -> tuple[bool, ...]:
    """Tell for each leaf of ``batch`` whether its dimension 0 is the batch."""
    leaves = jax.tree.leaves(batch)
    size = _common_size(leaves)
    return tuple(_may_have_samples(leaf) and leaf.shape[0] == size for leaf in leaves)


def abstract_batch(batch: Any, samples: int) -> Any:
    """Return the shapes of ``batch`` if it had ``samples`` samples."""
    leaves, structure = jax.tree.flatten(batch)
    shapes = [_abstract(leaf) for leaf in leaves]
    sized = [
        jax.ShapeDtypeStruct((samples, *shape.shape[1:]), shape.dtype) if has_samples else shape
        for shape, has_samples in zip(shapes, which_have_samples(batch), strict=True)
    ]
    return jax.tree.unflatten(structure, sized)


def _common_size(leaves: Sequence[Any]) -> int | None:
    sizes = Counter(int(leaf.shape[0]) for leaf in leaves if _may_have_samples(leaf))
    return max(sizes, key=lambda size: sizes[size], default=None)


def _may_have_samples(leaf: Any) -> bool:
    """Random keys and numbers never have samples."""
    return bool(np.ndim(leaf)) and not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return abstract(leaf)
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(np.result_type(leaf)))  # int64 is int32
