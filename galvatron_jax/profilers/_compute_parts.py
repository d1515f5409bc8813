"""Launch, copy, products and overlap: from readings to fields of a hardware profile.

Products: the peak of the main dtype is the best rate at any size and the efficiency curve the share of it, so the peak
here is a ceiling that was reached, not a data sheet's. Shares that the base profile states of its own peak (attention,
dtypes without a reading) are rescaled by the ratio of the two peaks.

Overlap: an all-reduce of g seconds beside products of c seconds, c > g, takes T = c + g (1 - 1/s); so the slowdown of
compute is s = 1 / (1 - (T - c) / g). Nothing hidden is T = c + g, for which no s is large enough: the largest that a
profile holds stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..profile import CurvePoint, HardwareProfile
from ..units import format_seconds
from ._fit import monotone_fit
from ._parts import NOTHING, Fields, Overheads, Part, by_series, outlier_notes, without_unsteady
from ._readings import COPY, LAUNCH, MATMUL, OVERLAP, Reading, Subject, overlap_parts
from ._text import format_si

MOST_SLOWDOWN = 1000.0
"""Bound of ``HardwareProfile.overlap_slowdown``."""


def launch_fields(known: Mapping[Subject, Reading], overheads: Overheads) -> Part:
    """Return the seconds that starting a kernel takes."""
    if overheads.launch_s == 0:
        return NOTHING
    operations = known[Subject(what=LAUNCH)].operations
    how = f"kernels that add 1 to 128 numbers, in a loop with {operations} in a trip"
    return Part({"kernel_launch_s": overheads.launch_s}, {"kernel_launch_s": how}, [])


def copy_fields(known: Mapping[Subject, Reading], overheads: Overheads) -> Part:
    """Return the memory bandwidth, in bytes/s: the best rate of all sizes."""
    rates = {s.size: 2 * s.size / overheads.corrected(r) for s, r in known.items() if s.what == COPY}
    if not rates:
        return NOTHING
    size, rate = max(rates.items(), key=lambda item: item[1])
    how = f"x + 1 over {format_si(size, 'B')} on all devices at once, bytes read plus bytes written"
    return Part({"memory_bandwidth_bytes_per_s": rate}, {"memory_bandwidth_bytes_per_s": how}, [])


def product_fields(known: Mapping[Subject, Reading], overheads: Overheads, base: HardwareProfile, main: str) -> Part:
    """Return the matmul peaks in FLOP/s and the efficiency curve of the dtype ``main``.

    Dtypes that were not measured keep their proportion to ``main`` in the profile ``base``.
    """
    series = by_series((s, overheads.corrected(r)) for s, r in without_unsteady(known).items() if s.what == MATMUL)
    fits = {dtype: monotone_fit(points) for (_, dtype, *_), points in series.items()}
    if main not in fits:
        return NOTHING
    rates = {point.size: point.size / point.seconds for point in fits[main].points}
    peak = max(rates.values())
    ratio = peak / base.matmul_flops_per_s[main]
    curve = tuple(CurvePoint(flops=size, efficiency=rate / peak) for size, rate in rates.items())
    peaks = {dtype: rate * ratio for dtype, rate in base.matmul_flops_per_s.items()}
    # at its largest size, another dtype's peak times the main dtype's efficiency is the rate that was measured
    for dtype, fit in fits.items():
        top = fit.points[-1]
        peaks[dtype] = top.size / top.seconds / _nearest(curve, top.size).efficiency
    fields: Fields = {"matmul_flops_per_s": peaks, "matmul_efficiency": curve}
    sizes = f"square products of {main}, {format_si(curve[0].flops, 'FLOP')} to {format_si(curve[-1].flops, 'FLOP')}"
    others = ", ".join(sorted(set(peaks) - set(fits))) or "none"
    how = {
        "matmul_flops_per_s": f"best rate of {sizes}; {', '.join(sorted(set(fits) - {main})) or 'no other dtype'} at "
        f"their largest; not measured, in proportion to {base.name}: {others}",
        "matmul_efficiency": f"{sizes}, as shares of the best rate",
    }
    if base.fused_attention:
        fields["attention_efficiency"] = {p: min(1.0, e / ratio) for p, e in base.attention_efficiency.items()}
        how["attention_efficiency"] = f"not measured, the rates of {base.name} as shares of the peak measured here"
    return Part(
        fields, how, [note for dtype, fit in fits.items() for note in outlier_notes(f"{dtype} product", fit, "FLOP")]
    )


def overlap_fields(known: Mapping[Subject, Reading], overheads: Overheads, side: int) -> Part:
    """Return the factor by which products of ``side`` x ``side`` are slower beside a collective."""
    found = [(s, r, parts) for s, r in known.items() if s.what == OVERLAP and (parts := overlap_parts(s, side, known))]
    if not found:
        return NOTHING
    subject, both, (alone, product) = found[0]
    communication_s = overheads.corrected(alone)
    compute_s = both.products * (product.seconds - overheads.loop_s / product.operations)
    added = (both.seconds - overheads.loop_s / both.operations - compute_s) / communication_s
    slowdown = min(MOST_SLOWDOWN, 1 / (1 - added)) if added < 1 else MOST_SLOWDOWN
    slowdown = max(1.0, slowdown)
    how = (
        f"an all-reduce of {format_si(subject.size, 'B')} over {subject.group} devices "
        f"({format_seconds(communication_s)}) beside {both.products} products ({format_seconds(compute_s)}) "
        f"added {added:.0%} of its time"
    )
    notes = ["overlap: nothing was hidden, compute waits for collectives"] if slowdown == MOST_SLOWDOWN else []
    return Part({"overlap_slowdown": slowdown}, {"overlap_slowdown": how}, notes)


def _nearest(curve: Sequence[CurvePoint], flops: float) -> CurvePoint:
    return min(curve, key=lambda point: abs(point.flops - flops))
