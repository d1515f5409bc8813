"""A pass of a layer as a step of a loop: each run waits for the one before, and all that it makes is written.

One element of each result, behind a barrier that holds all of them, is added into every floating-point operand of the
next run: no result can be dropped, nothing is fused across runs or taken out of the loop, and the pass writes what it
would hand on. (With one result used and one operand fed, JAX drops the others' products and XLA hoists what does not
need that operand: half of a Llama block's backward pass.) All devices of the mesh run their own copy at the same time,
as in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..analysis import AnalysedKind, local_layer
from ._layer_passes import PassName, pass_program
from ._loop import Loop, Operand, State, compile_loop, group_mesh
from ._timing import MeasurementError

_MOST_ROWS = 2**31 - 1


def pass_loop(
    kind: AnalysedKind,
    what: PassName,
    samples: int,
    tp: int,
    devices: Sequence[jax.Device],
    kernel: str | None = None,
) -> Loop:
    """Return a loop of one pass of a layer of ``kind``, a whole copy on each device.

    Args:
        kind: The layer kind.
        what: The pass.
        samples: On each device.
        tp: Tensor-parallel degree: each device runs this share of the layer.
        devices: All of them run it at the same time.
        kernel: What runs attention that asks for cuDNN; None: its XLA form.

    Raises:
        UnsupportedError: the layer cannot run at these sizes.
        MeasurementError: it has no floating-point operand, or the devices have not enough memory.
    """
    program = pass_program(local_layer(kind, samples, tp, kernel=kernel), what)
    arrays = [i for i, spec in enumerate(program.inputs) if not _is_key(spec)]
    fed = [place for place, i in enumerate(arrays) if _is_float(program.inputs[i])]
    if not fed:
        raise MeasurementError("the layer has no floating-point operand", action="skipped")

    def step(*state: jax.Array) -> State:
        inputs: list[Any] = [jax.random.key(0)] * len(program.inputs)
        for index, array in zip(arrays, state, strict=True):
            inputs[index] = array.reshape(program.inputs[index].shape)
        results = lax.optimization_barrier([r for r in program.run(*inputs) if r.size])
        value = sum(_first(r) for r in results)
        return tuple(_feed(array, value) if place in fed else array for place, array in enumerate(state))

    rows = max(kind.profile.classes.values(), default=_MOST_ROWS)
    operands = [_operand(program.inputs[index], rows) for index in arrays]
    loop = compile_loop(step, operands, group_mesh(devices, len(devices), 1))
    return dataclasses.replace(loop, glue=len(fed))


def _first(result: jax.Array) -> jax.Array:
    """One element, kept small."""
    return jnp.clip(result[(0,) * result.ndim].astype(jnp.float32), -1, 1)


def _feed(operand: jax.Array, value: Any) -> jax.Array:
    """Write ``value`` into the first place of ``operand``."""
    first = jnp.full((1,) * operand.ndim, value, operand.dtype)
    return lax.dynamic_update_slice(operand, first, (0,) * operand.ndim)


def _operand(spec: jax.ShapeDtypeStruct, rows: int) -> Operand:
    whole = jnp.issubdtype(spec.dtype, jnp.integer) or spec.dtype == jnp.bool_
    return Operand(shape=spec.shape or (1,), dtype=str(spec.dtype), noise=not whole, below=rows if whole else 0)


def _is_float(value: Any) -> bool:
    return bool(value.size and jnp.issubdtype(value.dtype, jnp.inexact))


def _is_key(spec: jax.ShapeDtypeStruct) -> bool:
    return bool(jnp.issubdtype(spec.dtype, jax.dtypes.prng_key))
