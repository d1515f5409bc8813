"""Results of transcendental functions, equal on every machine.

C libraries (and processors with and without fused multiply-add) differ in the last bit of exp, log and pow; all else in
this room is additions, multiplications and divisions, which IEEE 754 fixes. A plan file is to be the same everywhere,
so what comes out of such a function is rounded to 13 significant digits, a thousand times coarser than that bit.
"""

from __future__ import annotations


def portable(value: float) -> float:
    """Return ``value`` rounded to 13 significant digits."""
    return float(f"{value:.13g}")
