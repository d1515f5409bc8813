"""Marks: while a loss is traced, every module call opens a named scope that carries the module's path.

    mark@layers.3@17@           call number 17, of ``layers.3``
    mark@layers.3:encode@18@    the same module, through another public method

Linen has a hook for it (``nn.intercept_methods``). NNX has none, so the methods of the classes in the model's graph are
replaced for the duration of the trace (what ``flax.nnx.tabulate`` does), under a lock, and always put back; calls from
other threads, and of objects that are not the traced copy, go straight to the original. So are the counters of its
random streams, for speed. Calls of
``jax.nn.dot_product_attention`` are marked the same way, so that the cost model knows where a fused kernel may stand;
those that ask for cuDNN are traced in their XLA form (``_attention``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from ._attention import CUDNN_NAME, asked_of_cudnn, call_in_xla_form
from ._read_nnx import PATH_ATTRIBUTE

ATTENTION = "sdpa@"
"""Scope text around an attention call; ``sdpa@causal`` when it is causal."""

MARK = re.compile(r"mark@([^@]*)@(\d+)@")
"""Scope text of one module call: path (and method), and call number."""

_LOCK = threading.RLock()


@dataclasses.dataclass(slots=True)
class Calls:
    """What happens to the marked calls of one trace."""

    thread: int
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    error: Exception | None = None
    failed: str | None = None
    """Path of the innermost call that raised ``error``."""

    def is_mine(self) -> bool:
        """Tell whether the current call belongs to this trace."""
        return threading.get_ident() == self.thread

    @contextlib.contextmanager
    def scope(self, path: str, method: str) -> Iterator[None]:
        """Mark one call."""
        text = path if method == "__call__" else f"{path}:{method}"
        try:
            with jax.named_scope(f"mark@{text}@{next(self.numbers)}@"):
                yield
        except Exception as error:
            if error is not self.error:
                self.error, self.failed = error, path
            raise

    def place(self, where: str) -> str:
        """Return ``where``, and the module that failed."""
        return f"{where}, in module {self.failed}" if self.failed else where


@contextlib.contextmanager
def marked_calls(classes: Iterable[type]) -> Iterator[Calls]:
    """Mark all module calls of this thread while the context lasts.

    Args:
        classes: NNX classes whose instances carry ``PATH_ATTRIBUTE``; Linen modules need no list.
    """
    with _LOCK:
        calls = Calls(threading.get_ident())
        with (
            _nnx_methods(classes, calls),
            _cheap_counters(calls),
            nn.intercept_methods(_linen_interceptor(calls)),
            _attention(calls),
        ):
            yield calls


# ----------------------------------------------------------------------------------------------------------------- NNX
@contextlib.contextmanager
def _nnx_methods(classes: Iterable[type], calls: Calls) -> Iterator[None]:
    originals = [(cls, name, value) for cls in classes for name, value in cls.__dict__.items() if _is_call(name, value)]
    try:
        for cls, name, method in originals:
            setattr(cls, name, _scoped(method, name, calls))
        yield
    finally:
        for cls, name, method in originals:
            setattr(cls, name, method)


def _is_call(name: str, method: Any) -> bool:
    """``__call__`` in any form (``nnx.jit`` makes it an object), and public methods."""
    is_transformed = callable(method) and hasattr(method, "__get__") and not isinstance(method, (type, FunctionType))
    return name == "__call__" or (not name.startswith("_") and (isinstance(method, FunctionType) or is_transformed))


def _scoped(original: Callable[..., Any], name: str, calls: Calls) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = getattr(self, PATH_ATTRIBUTE, None)
        if path is None or not calls.is_mine():
            return original(self, *args, **kwargs)
        with calls.scope(path, name):
            return original(self, *args, **kwargs)

    return call


@contextlib.contextmanager
def _cheap_counters(calls: Calls) -> Iterator[None]:
    """Let a draw of ``nnx.Rngs`` cost the same at the end of a long trace as at its beginning.

    A stream counts its draws in place. Flax asks the new and the old count for their shardings, which traced values do
    not have, and JAX walks all equations so far to say so: quadratic in depth. Here such a count is put in its place
    at once, which is what flax does after the question.
    """
    original = nnx.RngCount.set_value

    def set_value(self: Any, value: Any, **where: Any) -> None:
        before = self.get_raw_value()
        traced = isinstance(value, jax.core.Tracer) and isinstance(before, jax.core.Tracer)
        if traced and where == {"index": ...} and value.aval == before.aval and calls.is_mine():
            self.set_raw_value(value)
        else:
            original(self, value, **where)

    nnx.RngCount.set_value = set_value  # type: ignore[method-assign]
    try:
        yield
    finally:
        del nnx.RngCount.set_value


# --------------------------------------------------------------------------------------------------------------- Linen
def _linen_interceptor(calls: Calls) -> Callable[..., Any]:
    def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        path, name = ".".join(context.module.path), context.method_name
        if not path or name == "setup" or (name.startswith("_") and name != "__call__"):
            return method(*args, **kwargs)
        with calls.scope(path, name):
            return method(*args, **kwargs)

    return intercept


# ----------------------------------------------------------------------------------------------------------- attention
@contextlib.contextmanager
def _attention(calls: Calls) -> Iterator[None]:
    """Mark attention; trace cuDNN calls in their XLA form."""
    original = jax.nn.dot_product_attention

    @functools.wraps(original)
    def scoped(*args: Any, **kwargs: Any) -> Any:
        if not calls.is_mine():
            return original(*args, **kwargs)
        with jax.named_scope(ATTENTION + "causal" * bool(kwargs.get("is_causal"))):
            asks_cudnn = kwargs.get("implementation") == "cudnn"
            return call_in_xla_form(original, args, kwargs) if asks_cudnn else original(*args, **kwargs)

    # Whoever imported the function itself, or made a partial of it, gets to cuDNN by a name in the function's module.
    module = original.__globals__
    kernel: Callable[..., Any] | None = module.get(CUDNN_NAME)

    def from_inside(*args: Any, **kwargs: Any) -> Any:
        if kernel and not calls.is_mine():
            return kernel(*args, **kwargs)
        return scoped(**asked_of_cudnn(*args, **kwargs), implementation="cudnn")

    jax.nn.dot_product_attention = scoped
    if kernel is not None:
        module[CUDNN_NAME] = from_inside
    try:
        yield
    finally:
        jax.nn.dot_product_attention = original
        if kernel is not None:
            module[CUDNN_NAME] = kernel
