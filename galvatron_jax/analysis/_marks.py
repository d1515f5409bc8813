"""Trace a user's loss once, abstractly, with every module call inside a named scope that carries its path.

NNX has no interception hook, so ``__call__`` of the classes in the model's graph is replaced for the duration of the
trace (what ``flax.nnx.tabulate`` does), under a lock, and always put back. Instances are known by a static attribute on
a *private* copy: NNX transforms re-merge submodules, so object ids change, but static attributes survive. The user's
object is never touched. ``jax.nn.dot_product_attention`` is marked the same way, so that the cost model knows where a
fused kernel may stand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr

from ..errors import AnalysisError
from ._jaxpr import abstract

ATTENTION = "sdpa@"
"""Scope text around an attention call; ``sdpa@causal`` when it is causal."""

PATH_ATTRIBUTE = "_galvatron_path"
"""Static attribute that names a module of the private copy."""

Loss = Callable[[Any, Any], Any]
"""``loss(model, batch) -> scalar`` (or a tuple whose first entry is the scalar)."""

_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A traced loss: ``program(parameters, state, batch) -> (loss, new state)`` over flat leaves."""

    program: ClosedJaxpr
    graph: Any
    """NNX graph definition of the model without marks: merges leaves back into the user's module."""
    parameters: Any
    """Abstract state of the trained leaves, a pytree."""
    state: Any
    """Abstract state of all other leaves (RNG counters, statistics), a pytree."""
    batch: Any
    """Abstract batch, a pytree."""
    paths: tuple[str, ...]
    """Dotted path of each parameter leaf, in leaf order."""


def abstract_model(model: Any) -> nnx.Module:
    """Return an NNX model with abstract leaves, from a module or from a function that builds one.

    Raises:
        AnalysisError: ``model`` is neither.
    """
    if isinstance(model, nnx.Module):
        graph, state = nnx.split(model)
        return nnx.merge(graph, jax.tree.map(abstract, state))
    if callable(model):
        built = nnx.eval_shape(model)
        if isinstance(built, nnx.Module):
            return built
        model = built
    raise AnalysisError(
        f"got a {type(model).__module__}.{type(model).__name__}",
        expected="a flax.nnx.Module, or a function without arguments that builds one",
        where="model",
        action="pass the module itself or `lambda: Model(...)` (Linen models come in a later version)",
    )


def trace_loss(model: nnx.Module, loss: Loss, batch: Any) -> Trace:
    """Trace ``loss(model, batch)`` at the shapes of ``batch`` (one microbatch).

    Args:
        model: A module, concrete or abstract; not modified.
        loss: The user's loss.
        batch: A pytree of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
        AnalysisError: the loss cannot be traced, or does not return a scalar.
    """
    marked, classes = _marked_copy(model)
    graph, parameters, state = split_parameters(marked)
    clean_graph, _, _ = split_parameters(model)
    parameters, state, batch = jax.tree.map(abstract, (parameters, state, batch))

    def run(parameters: Any, state: Any, batch: Any) -> Any:
        module = nnx.merge(graph, parameters, state)
        value = loss(module, batch)
        value = value[0] if isinstance(value, tuple) else value
        return value, nnx.state(module, nnx.Not(nnx.Param))

    with _LOCK, _scoped_calls(classes), _scoped_attention():
        try:
            program, (value, _) = jax.make_jaxpr(run, return_shape=True)(parameters, state, batch)
        except Exception as error:
            raise AnalysisError(
                f"the loss cannot be traced: {type(error).__name__}: {str(error).splitlines()[0]}",
                expected="loss(model, batch) that runs under jax.jit",
                where=getattr(loss, "__name__", "loss"),
                action="run jax.eval_shape on it to see where it stops",
            ) from error
    if value.shape != ():
        raise AnalysisError(
            f"the loss has shape {value.shape}", expected="a scalar", where="loss", action="take its mean"
        )
    paths = tuple(_dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(parameters)[0])
    return Trace(program, clean_graph, parameters, state, batch, paths)


def split_parameters(model: nnx.Module) -> tuple[Any, Any, Any]:
    """Return (graph definition, trained leaves, all other leaves) of a module."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]  # flax types its variadic result
    return graph, parameters, rest


def _marked_copy(model: nnx.Module) -> tuple[nnx.Module, set[type]]:
    copy = nnx.merge(*nnx.split(model))
    classes: set[type] = set()
    for path, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Module) and path:
            classes.update(c for c in type(node).__mro__ if "__call__" in c.__dict__ and c is not nnx.Module)
            setattr(node, PATH_ATTRIBUTE, ".".join(map(str, path)))
    return copy, classes


@contextlib.contextmanager
def _scoped_calls(classes: set[type]) -> Iterator[None]:
    """Open a named scope in each module call while the context lasts."""
    numbers = itertools.count()
    originals = {cls: cls.__dict__["__call__"] for cls in classes}

    def scoped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = getattr(self, PATH_ATTRIBUTE, None)
            if path is None:
                return original(self, *args, **kwargs)
            with jax.named_scope(f"mark@{path}@{next(numbers)}@"):
                return original(self, *args, **kwargs)

        return call

    try:
        for cls, original in originals.items():
            cls.__call__ = scoped(original)  # type: ignore[method-assign]
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _scoped_attention() -> Iterator[None]:
    """Mark calls of ``jax.nn.dot_product_attention``; without a GPU trace cuDNN calls in their XLA form."""
    original = jax.nn.dot_product_attention
    has_gpu = jax.default_backend() == "gpu"

    def scoped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("implementation") == "cudnn" and not has_gpu:
            kwargs["implementation"] = "xla"
        with jax.named_scope(ATTENTION + "causal" * bool(kwargs.get("is_causal"))):
            return original(*args, **kwargs)

    jax.nn.dot_product_attention = scoped
    try:
        yield
    finally:
        jax.nn.dot_product_attention = original


def _dotted(path: tuple[Any, ...]) -> str:
    """``layers.0.attention.query.kernel`` from a key path (the final ``value`` of an NNX variable left out)."""
    words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(words[:-1] if words[-1] == "value" else words)
