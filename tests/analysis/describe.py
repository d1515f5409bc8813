"""Write the dimensions that the analysis finds in a function as text, so that tests read like einsum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp

from galvatron_jax.analysis import Value
from galvatron_jax.analysis._dimensions import Dimensions, analyse_dimensions


def analyse(function: Callable[..., Any], *shapes: Sequence[int] | jax.ShapeDtypeStruct) -> Dimensions:
    """Analyse ``function`` of float32 arrays of ``shapes``."""
    return analyse_dimensions(jax.make_jaxpr(function)(*map(_abstract, shapes)))


def describe(function: Callable[..., Any], *shapes: Sequence[int] | jax.ShapeDtypeStruct) -> str:
    """Return what the analysis finds, for example ``"ab,bc->ac sums b"`` for a matrix product.

    Letters name index spaces in the order of their appearance. ``1`` is a dimension of size 1, ``(ab)`` one with major
    part a and minor part b, ``3!`` a blocked one of size 3. ``sums`` lists what some operation sums over, ``whole``
    what some operation needs whole.
    """
    found = analyse(function, *shapes)
    letters: dict[int, str] = {}

    def name(factor: int) -> str:
        if found.factors.is_blocked(factor):
            return f"{found.factors.size(factor)}!"
        return letters.setdefault(factor, ascii_lowercase[len(letters)])

    def dim(parts: list[int]) -> str:
        return "1" if not parts else name(parts[0]) if len(parts) == 1 else f"({''.join(map(name, parts))})"

    def values(them: Iterable[Value]) -> str:
        return ",".join("".join(map(dim, found.classes(value))) for value in them)

    def names(factors: Iterable[int]) -> str:
        return "".join(sorted({name(f) for f in found.factors.resolve(factors)}))

    text = f"{values(found.inputs)}->{values(found.outputs)}"
    summed = names(f for op in found.ops for f in op.contracted)
    whole = names(f for op in found.ops for _, parts in op.gathered for f in parts)
    return text + f" sums {summed}" * bool(summed) + f" whole {whole}" * bool(whole)


def _abstract(shape: Sequence[int] | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return shape if isinstance(shape, jax.ShapeDtypeStruct) else jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
