"""Communication beside computation: one compute stream, one communication stream.

While a collective runs, compute is slower by the factor ``s = hardware.overlap_slowdown`` (collective kernels take
multiprocessors and memory bandwidth). So ``c`` seconds of compute beside ``g`` seconds of communication take

    T = max(g, c + g * (1 - 1 / s))

If communication ends first, g seconds did g / s of the work and c - g / s remain. Continuous at g = s * c, and never
falls while c, g or s rises. What hides: gradient reductions and zero-3 gathers. What does not: tensor-parallel
collectives, whose result the next product needs.
"""

from __future__ import annotations


def overlapped_seconds(compute_s: float, communication_s: float, slowdown: float) -> float:
    """Return the seconds until both are done."""
    return max(communication_s, compute_s + communication_s * (1 - 1 / slowdown))


def exposed_seconds(compute_s: float, communication_s: float, slowdown: float) -> float:
    """Return what the communication adds to ``compute_s``."""
    return overlapped_seconds(compute_s, communication_s, slowdown) - compute_s
