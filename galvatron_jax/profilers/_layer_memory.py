"""What compiled programs of a layer say about memory: residuals, and temporaries of the backward pass.

No clock and no arrays: the programs are compiled for the devices in sight and asked. Residuals are what the forward
program hands over and got from nobody; the workspace is the temporary memory of the backward program, whose operands
(residuals, weights, cotangents) and results (gradients) have places of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ..analysis import AnalysedKind, local_layer
from ..errors import UnsupportedError
from ..measured import MemoryTable
from ._layer_agenda import legal_degrees
from ._layer_passes import pass_program


def memory_tables(kind: AnalysedKind, samples: Sequence[int], degrees: Sequence[int]) -> list[MemoryTable]:
    """Return the bytes of a layer of ``kind`` on one device, a table for each degree that it allows.

    Args:
        kind: The layer kind.
        samples: Numbers of samples, rising; memory is linear in them, so two are enough.
        degrees: Tensor-parallel degrees.
    """
    tables = []
    for tp in legal_degrees(kind.profile, degrees):
        try:
            rows = [_bytes(kind, n, tp) for n in samples]
        except (UnsupportedError, jax.errors.JaxRuntimeError):
            continue  # the clock's own attempt at these sizes is reported
        residuals, workspace = zip(*rows, strict=True)
        tables.append(MemoryTable(tp=tp, samples=tuple(samples), residual_bytes=residuals, workspace_bytes=workspace))
    return tables


def _bytes(kind: AnalysedKind, samples: int, tp: int) -> tuple[int, int]:
    layer = local_layer(kind, samples, tp)
    backward = pass_program(layer, "backward")
    needed = jax.jit(backward.run).lower(*backward.inputs).compile().memory_analysis()
    return pass_program(layer, "forward").kept_bytes, int(needed.temp_size_in_bytes) if needed else 0
