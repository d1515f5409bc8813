"""Options of XLA's GPU compiler that belong to every program of the runtime.

Without them a loop over layers waits for the first gather of each turn, and for all its gradient reductions at the end
of it. Read in the schedule of a program for 16 H100 (zero 3, full remat, 16 layers; docs/design/0023): 9.9 of 28.6 ms
of collectives exposed without, 2.3 with them; 3.4 and 3.9 GiB at the peak.

``pipelined_*``         a collective of one turn runs beside the products of the turn before or after it
``double_buffering``    two turns of the loop become one, so that what is on its way needs no copy: of loops whose
                        number of turns XLA knows, so not of the loop over microbatches (``_microbatches``)
"""

from __future__ import annotations

from collections.abc import Mapping

from ._mesh import StageMesh

Options = Mapping[str, bool | int]

_OVERLAP: Options = {
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
}

_MEMORY: Options = {"xla_gpu_memory_limit_slop_factor": 300}
"""Percent of 0.8 * device memory, above which XLA recomputes by itself. It judges by an estimate made before it
schedules: 109 GiB for a program whose buffers take 61.7 (16 H100, zero 3, no remat), so its default of 95 % clones
operations of plans that fit well (184 there; with 300 none, at the same peak). Whether a plan fits is for the estimate
and ``verify`` to say, by the buffers."""


def compiler_options(mesh: StageMesh) -> dict[str, bool | int]:
    """Return the options for programs on the devices of ``mesh``: none but for GPUs.

    Returns:
        For ``jax.jit(..., compiler_options=...)``; the same dictionary belongs into records of what was run.
    """
    return platform_options(mesh.mesh.devices.flat[0].platform)


def platform_options(platform: str) -> dict[str, bool | int]:
    """Return the same for devices of a platform, as ``jax.default_backend`` names it."""
    return {**_OVERLAP, **_MEMORY} if platform in ("gpu", "cuda") else {}
