"""Calls of ``jax.nn.dot_product_attention`` that ask for cuDNN.

The kernel hides the heads, and where there is no GPU it cannot even be traced. So such a call is traced in its XLA
form, inside a call of its own whose name says what was asked for. The analysis opens that call and sees products and
softmax; the flat program remembers it (``Program.calls``), and on GPUs the runtime puts the kernel back in its place.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np

CUDNN_NAME = "cudnn_dot_product_attention"
"""What JAX calls cuDNN's attention in the module of ``jax.nn.dot_product_attention`` (0.10 to 0.12)."""

_PREFIX = "cudnn_attention"
_ARRAYS = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
)
"""Arguments of ``jax.nn.dot_product_attention`` that are arrays; the others are settings."""


_KERNELS = {"gpu": "cudnn", "cuda": "cudnn"}
"""Implementations that run in place of the XLA form, by platform."""

KERNEL_DTYPES = ("bfloat16", "float16")
"""What cuDNN's attention computes in."""


class AttentionCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one call asked for."""

    arrays: tuple[str, ...]
    """Names of the arguments that are arrays, in order."""
    is_causal: bool = False
    scale: float | None = None
    local_window_size: int | tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The call as the name of a function."""
        return _PREFIX + msgspec.json.encode(self).decode()

    def run(self, arrays: Sequence[Any], implementation: str) -> Any:
        """Return attention of ``arrays`` by ``implementation``, ``"cudnn"`` or ``"xla"``."""
        settings = {f: getattr(self, f) for f in self.__struct_fields__ if f != "arrays"}
        named = dict(zip(self.arrays, arrays, strict=True))
        attention: Callable[..., Any] = jax.nn.dot_product_attention
        return attention(**named, **settings, implementation=implementation)


def attention_name(params: Mapping[str, Any]) -> str | None:
    """Return the name of an ``AttentionCall`` from the parameters of an equation; None when it is something else."""
    name = params.get("name")
    return name if isinstance(name, str) and name.startswith(_PREFIX) else None


def attention_call(name: str) -> AttentionCall:
    """Return the call of which ``name`` is the name."""
    return msgspec.json.decode(name.removeprefix(_PREFIX), type=AttentionCall)


def call_in_xla_form(original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a call of ``original`` for cuDNN returns, traced in its XLA form as a call of its own.

    A call whose settings are no plain numbers, or that wants more than the result, stays in its XLA form.

    Args:
        original: ``jax.nn.dot_product_attention``.
        args: Its arguments by position.
        kwargs: Its arguments by name.
    """
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    arrays = {name: given.pop(name) for name in _ARRAYS if given.get(name) is not None}
    settings = {name: value for name, value in given.items() if name not in (*_ARRAYS, "implementation")}
    if settings.pop("return_residual", False):
        return original(**arrays, **settings, return_residual=True, implementation="xla")
    settings = {name: value.item() if isinstance(value, np.generic) else value for name, value in settings.items()}
    try:
        call = msgspec.convert({**settings, "arrays": tuple(arrays)}, AttentionCall)
    except msgspec.ValidationError:
        return original(**arrays, **settings, implementation="xla")

    def run(*values: Any) -> Any:
        return original(**dict(zip(arrays, values, strict=True)), **settings, implementation="xla")

    run.__name__ = call.name
    return jax.jit(run)(*arrays.values())


def asked_of_cudnn(*arrays: Any, mask_type: Any = None, sliding_window_length: int | None = None, **other: Any) -> Any:
    """Return arguments of ``jax.nn.dot_product_attention`` from those that it hands on to cuDNN.

    Args:
        *arrays: In the order of the public function.
        mask_type: A member of JAX's enumeration of masks, by its name.
        sliding_window_length: Positions to the left that a query sees, itself among them.
        **other: ``scale`` and ``return_residual``, of the same meaning.
    """
    window = None if sliding_window_length is None else (sliding_window_length - 1, 0)
    is_causal = mask_type is not None and "CAUSAL" in mask_type.name
    return {**dict(zip(_ARRAYS, arrays, strict=False)), **other, "is_causal": is_causal, "local_window_size": window}


def attention_kernel(platform: str) -> str | None:
    """Return what runs attention that asks for cuDNN on devices of ``platform``; None: its XLA form."""
    found = _KERNELS.get(platform)
    # Compiled for GPUs that are not there: JAX wants to know the version of cuDNN even so.
    return found if found != "cudnn" or jax.default_backend() == "gpu" or has_cudnn() else None


def has_cudnn() -> bool:
    """Tell whether the optional wheel of cuDNN is installed."""
    try:
        return importlib.util.find_spec("nvidia.cudnn") is not None
    except ModuleNotFoundError:
        return False
