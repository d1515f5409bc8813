"""Read what the user passed as their model: which API is it, and does it have values or only a recipe?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import linen as nn
from flax import nnx

from ..errors import AnalysisError, GalvatronError
from ._jaxpr import abstract
from ._marks import marked_calls
from ._pure_model import Loss, PureModel
from ._read_linen import read_linen
from ._read_nnx import Structure, assemble, open_module, read_nnx, split_parameters
from ._read_tree import is_array, read_tree

T = TypeVar("T")


def read_model(model: Any, loss: Loss, batch: Any) -> PureModel:
    """Return the user's model as one value.

    Args:
        model: A ``flax.nnx.Module``; a ``flax.linen.Module``, bound or not; a pytree of parameters; or a function
            without arguments that builds any of these (it is only traced, so no parameter memory is used).
        loss: ``loss(model, batch)``.
        batch: A pytree of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        AnalysisError: ``model`` is none of these, cannot be built, or has nothing to train.
    """
    found = _read_any(model, loss, batch)
    if not jax.tree.leaves(found.parameters):
        raise AnalysisError(
            f"{found.name} has no parameters",
            expected="nnx.Param, the collection params of Linen, or floating-point arrays of a tree",
            where="model",
            action="pass the module that holds what is trained; there is nothing to shard or to train here",
        )
    return found


def _read_any(model: Any, loss: Loss, batch: Any) -> PureModel:
    if isinstance(model, nnx.Module):
        return read_nnx(model, loss)
    if isinstance(model, nn.Module):
        return _checked(lambda: read_linen(model, loss, batch), "be initialised")
    if any(is_array(leaf) for leaf in jax.tree.leaves(model)):
        return read_tree(model, loss)
    if callable(model):
        return _read_recipe(model, loss, batch)
    raise _unreadable(model)


def _read_recipe(recipe: Callable[[], Any], loss: Loss, batch: Any) -> PureModel:
    """Trace the recipe once, abstractly, to see what it builds; modules are no values for JAX and are put aside."""
    opened: list[Any] = []

    def build() -> Any:
        made = recipe()
        if isinstance(made, nnx.Module):
            structure, *arrays = open_module(made)
            opened.append(structure)
            return arrays
        if isinstance(made, nn.Module):
            opened.append(made)
            return made.variables if made.scope is not None else None
        opened.append(jax.tree.map(lambda leaf: abstract(leaf) if is_array(leaf) else leaf, made))
        return [leaf for leaf in jax.tree.leaves(made) if is_array(leaf)]

    made = _checked(lambda: jax.eval_shape(build), "be built")
    found = opened[0]
    if isinstance(found, Structure):
        return assemble(found, made, loss, build=lambda: split_parameters(recipe())[1:], is_built=False)
    if isinstance(found, nn.Module):
        return _checked(lambda: read_linen(found, loss, batch, made, recipe), "be initialised")
    if made:
        return read_tree(found, loss, recipe)
    raise _unreadable(found)


def _checked(read: Callable[[], T], what: str) -> T:
    with marked_calls(()) as calls:  # so that a message can name the module
        try:
            return read()
        except GalvatronError:
            raise
        except Exception as error:
            raise AnalysisError(
                f"the model cannot {what}: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}",
                expected="a model that builds and runs under jax.jit",
                where=calls.place("model"),
                action="build it and call the loss on one batch, to see where it stops",
            ) from error


def _unreadable(model: Any) -> AnalysisError:
    return AnalysisError(
        f"got a {type(model).__module__}.{type(model).__name__}",
        expected="a flax.nnx.Module, a flax.linen.Module, a pytree of arrays, or a function that builds one of them",
        where="model",
        action="pass the module itself or `lambda: Model(...)`",
    )
