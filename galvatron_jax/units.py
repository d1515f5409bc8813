"""Units: inside the library only seconds, bytes, FLOP and bytes/s; here they become text and back.

GiB is 2^30 bytes, GB is 10^9 bytes; the two are never mixed.
"""

from __future__ import annotations

import re

from .errors import GalvatronError

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9

ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "uint16": 2,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
}
"""Bytes of one element, by dtype name (numpy's and ml_dtypes' names)."""

_BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "tb": 10**12}
_BYTE_UNITS |= {"k": KIB, "m": MIB, "g": GIB, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40}


def parse_bytes(text: str, *, where: str = "--memory") -> int:
    """Return the number of bytes in ``text``, for example ``"72GiB"``, ``"80 GB"`` or ``"8589934592"``.

    Args:
        text: A positive number with an optional unit; ``GiB`` is 2^30, ``GB`` is 10^9, ``G`` is read as GiB.
        where: Named in the error.

    Raises:
        GalvatronError: ``text`` is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text, flags=re.ASCII)
    if match and match[2].lower() in _BYTE_UNITS:
        size_bytes = round(float(match[1]) * _BYTE_UNITS[match[2].lower()])
        if 0 < size_bytes < 2**63:
            return size_bytes
    raise GalvatronError(
        f"got {text!r}", expected="a positive size such as 72GiB or 80GB", where=where, action="give a size with a unit"
    )


def format_gib(size_bytes: float) -> str:
    """Return ``size_bytes`` in GiB with one decimal, for example ``"68.3 GiB"``; below 0.1 GiB in MiB, ``"31 MiB"``."""
    if 0 < size_bytes < 0.1 * GIB:
        return f"{size_bytes / MIB:.3g} MiB"
    return f"{size_bytes / GIB:.1f} GiB"


def format_seconds(duration_s: float) -> str:
    """Return a duration in the unit a person would use: ``"1.62 s"``, ``"38.1 ms"``, ``"12 µs"``."""
    if duration_s >= 1:
        return f"{duration_s:.2f} s"
    if duration_s >= 1e-3:
        return f"{duration_s * 1e3:.1f} ms"
    return f"{duration_s * 1e6:.0f} µs"


def format_count(number: float) -> str:
    """Return a large count with three digits: ``"6.74 B"``, ``"1.29 M"``, ``"80.1 k"``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"
