"""What the analysis found, for people: layers, kinds, shapes with named classes, how each may be sharded, its cost.

Shapes are written with their classes, ``[embed, heads head_dim]``: names that are equal in one kind are one index space
and are sharded together; numbers are sizes that must not be sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .._text import Line, Piece, clean, labelled, table
from ..profile import Array, Boundary, Collective, LayerKind, Parameter, Phase
from ..units import MIB, format_count
from ._factored import undivided_fusions
from ._kind import AnalysedKind
from ._profile import Analysis

_MOST_PARAMETERS = 16
"""Rows of a kind's parameter table."""


def analysis_lines(analysis: Analysis) -> list[Line]:
    """Return everything the analysis found as lines of text."""
    lines = [*_header(analysis), (), *_runs(analysis)]
    for kind in analysis.profile.kinds:
        lines += [(), *_kind(kind, analysis)]
    return lines


def _attention(analysis: Analysis) -> str:
    if analysis.asks_for_kernels:
        return "by cuDNN's kernel on GPUs, as it asks; memory below is that of its XLA form, scores included"
    return 'with its scores in memory: not all calls ask for a kernel (implementation="cudnn")'


# -------------------------------------------------------------------------------------------------------------- model
def _header(analysis: Analysis) -> list[Line]:
    profile, cut = analysis.profile, analysis.cut
    kinds = _plural(len(profile.kinds), "kind")
    lines = [
        labelled(
            "model",
            Piece(clean(profile.name), "bold"),
            f" · {_plural(profile.layer_count, 'layer')} of {kinds}",
            f" · {format_count(profile.parameter_count)} parameters · {profile.dtype} compute",
        ),
        labelled("batch", _batch(analysis)),
    ]
    if cut.is_whole:
        lines.append(labelled("layers", Piece("not cut", "yellow"), f": {cut.reason}"))
        action = "name the blocks with layers='model.layers.*', if they are modules"
        lines.append(labelled("", f"it trains as one segment (data and fully sharded parallelism); {action}"))
    else:
        lines.append(
            labelled("layers", "found as repeated module calls" if cut.by_name else "found as repeated equations")
        )
    if analysis.calls_attention:
        lines.append(labelled("attends", _attention(analysis)))
    random = sorted(set(analysis.trace.rows.roles) & {"key", "count"})
    if random:
        lines.append(labelled("random", "draws from keys in its state; each microbatch draws its own numbers"))
    if analysis.statistics:
        lines.append(labelled("state", "statistics made from activations: of each microbatch, not of the whole batch"))
    elif analysis.mixed_samples:
        where = ", ".join(analysis.mixed_samples)
        lines.append(labelled("loss", f"no mean over samples ({where}): microbatches lose what they would alone"))
    return lines


def _batch(analysis: Analysis) -> str:
    sizes = {name: size for kind in analysis.profile.kinds for name, size in kind.classes.items()}
    traced = ", ".join(f"{name} {sizes[name]}" for name in ("batch", "seq") if name in sizes)
    whole = analysis.trace.has_samples.count(False)
    shared = f" · {_plural(whole, 'leaf', 'leaves')} without samples, given whole to every microbatch" * bool(whole)
    return f"traced at {traced or 'the shapes given'}{shared}"


def _runs(analysis: Analysis) -> list[Line]:
    """One row for each run of alike layers."""
    profile, position, rows = analysis.profile, 0, []
    for run in profile.layers:
        kind = profile.kind(run.kind)
        last = position + run.count - 1
        rows.append(
            [
                f"{position}-{last}" if run.count > 1 else str(position),
                clean(run.kind),
                format_count(run.count * sum(_elements(p, kind) for p in kind.parameters if not p.tied)),
                _flop(run.count * _flops(kind, "forward")),
                _flop(run.count * _flops(kind, "backward")),
                _mib(run.count * _bytes(kind.residuals, kind)),
                _best(kind),
            ]
        )
        position = last + 1
    return _titled(["layer", "kind", "parameters", "forward", "backward", "kept MiB", "tensor parallel"], rows)


def _titled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Line]:
    """A table whose last column runs on to the right under its title."""
    lines = table([*header[:-1], ""], rows, left=2)
    first = "".join(piece.text for piece in lines[0])
    start = len("".join(piece.text for piece in table([*header[:-1]], [row[:-1] for row in rows], left=2)[0]))
    return [(Piece(f"{first:<{start}}  {header[-1]}", "dim"),), *lines[1:]]


# --------------------------------------------------------------------------------------------------------------- kinds
def _kind(kind: LayerKind, analysis: Analysis) -> list[Line]:
    layers = [s.name for s in analysis.cut.segments if s.kind == kind.name]
    where = "" if layers == [kind.name] else f" · {_names(layers)}"
    sizes = ", ".join(f"{name} {size}" for name, size in kind.classes.items())
    lines: list[Line] = [(Piece(clean(kind.name), "bold"), Piece(clean(where))), _labelled("classes", sizes)]
    lines += _parameters(kind, analysis.kinds[kind.name])
    lines += [_values("takes", kind.inputs, kind), _values("gives", kind.outputs, kind)]
    lines += _sharding(kind)
    if whole := [kind.parameters[p].path for p in undivided_fusions(analysis.kinds[kind.name].layer)]:
        text = (
            f"{clean(', '.join(whole))}: projections fused in parts that cannot be sharded by class (of unequal width?)"
        )
        lines.append(_labelled("whole", Piece(text, "yellow"), "; a product for each part can"))
    unknown = analysis.kinds[kind.name].layer.dimensions.unknown
    if unknown:
        names = ", ".join(f"{clean(name)} ×{count}" for name, count in unknown.items())
        lines.append(_labelled("unknown", Piece(names, "yellow"), ": never sharded (register_rule teaches a rule)"))
    return lines


def _parameters(kind: LayerKind, analysed: AnalysedKind) -> list[Line]:
    notes = ["tied: a layer before holds it" if p.tied else "" for p in kind.parameters]
    for position, shape in enumerate(analysed.user_shapes):
        if shape != analysed.stored_shapes[position]:
            notes[position] = f"stored so, yours is {list(shape)}"
    rows = [
        [
            clean(p.path),
            _shape(p),
            p.dtype if p.dtype == p.compute_dtype else f"{p.dtype}, read as {p.compute_dtype}",
            f"{_elements(p, kind):,}",
            note,
        ]
        for p, note in zip(kind.parameters[:_MOST_PARAMETERS], notes, strict=False)
    ]
    rest = len(kind.parameters) - _MOST_PARAMETERS
    lines = table(["parameter", "shape", "dtype", "elements", ""], rows, left=3) if rows else []
    return [*lines, (Piece(f"  and {rest} more", "dim"),)] if rest > 0 else lines


def _values(label: str, boundaries: Iterable[Boundary], kind: LayerKind) -> Line:
    counts: dict[str, int] = {}
    for boundary in boundaries:
        role = "stream" if boundary.stream else "remade" if boundary.recomputed else "forwarded"
        back = ", gradient back" if boundary.gradient and not boundary.stream else ""
        text = f"{_array(boundary.array)} ({role}{back})"
        counts[text] = counts.get(text, 0) + 1
    return _labelled(label, " · ".join(f"{n} × {text}" if n > 1 else text for text, n in counts.items()) or "nothing")


def _sharding(kind: LayerKind) -> list[Line]:
    lines = []
    for candidate in kind.candidates:
        spill = "".join(f", {a} spills into {b}" for a, b in candidate.spill.items())
        share = f"{candidate.flops_share:.0%} of the FLOPs"
        classes = " ".join(candidate.classes)
        lines.append(
            _labelled(
                "tp",
                Piece(clean(classes), "green"),
                f" up to {candidate.max_degree}{spill}, {share}: ",
                _collectives(candidate.tensor, kind),
            )
        )
        if candidate.sequence is not None:
            lines.append(_labelled("tp + sp", _collectives(candidate.sequence, kind)))
    if not kind.candidates:
        lines.append(_labelled("tp", Piece("no class may be sharded", "yellow")))
    if kind.ulysses is not None:
        inside = f"{' '.join(kind.ulysses.classes)} inside attention: " if kind.ulysses.classes else ""
        lines.append(_labelled("ulysses", clean(inside), _collectives(kind.ulysses.collectives, kind)))
    kept = {"none": kind.residuals, "dots": kind.residuals_dots}
    texts = [f"{_mib(_bytes(arrays, kind))} under remat {name}" for name, arrays in kept.items() if arrays is not None]
    lines.append(_labelled("memory", f"MiB kept: {', '.join(texts)}; workspace {_mib(_bytes(kind.workspace, kind))}"))
    return lines


def _collectives(collectives: Sequence[Collective], kind: LayerKind) -> str:
    """``forward 2 all-reduce 33.6 MiB · backward 5 (2 merged) all-reduce 84 MiB``, whole arrays, all together."""
    texts = []
    phases: tuple[Phase, ...] = ("forward", "backward")
    for phase in phases:
        names = dict.fromkeys(c.kind for c in collectives if c.phase == phase)
        parts = []
        for name in names:
            chosen = [c for c in collectives if c.phase == phase and c.kind == name]
            count, merged = sum(c.array.count for c in chosen), sum(c.merged_count for c in chosen)
            some = f"{count}" if merged == count else f"{count} ({merged} merged)"
            parts.append(f"{some} {name} {_mib(_bytes([c.array for c in chosen], kind))} MiB")
        if parts:
            texts.append(f"{phase} {' + '.join(parts)}")
    return " · ".join(texts) or "no collectives"


# ------------------------------------------------------------------------------------------------------------- figures
def _best(kind: LayerKind) -> str:
    best = kind.best_candidate
    return f"{clean(' '.join(best.classes))} ≤ {best.max_degree}" if best else "–"


def _shape(parameter: Parameter) -> str:
    return f"[{', '.join(clean(' '.join(map(str, dim))) or '1' for dim in parameter.dims)}]"


def _array(array: Array) -> str:
    factor = [str(array.factor)] if array.factor > 1 else []
    text = " ".join([*map(clean, array.classes), *factor])
    return f"{array.dtype} [{text}]" if text else array.dtype


def _elements(parameter: Parameter, kind: LayerKind) -> int:
    return round(parameter.array().elements(kind.classes, {}))


def _bytes(arrays: Iterable[Array], kind: LayerKind) -> float:
    return sum(array.local_bytes(kind.classes, {}) for array in arrays)


def _flops(kind: LayerKind, phase: str) -> float:
    no_shards: Mapping[str, int] = {}
    return sum(dot.count * dot.flops(kind.classes, no_shards) for dot in kind.dots if dot.phase == phase)


def _flop(flops: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= size:
            return f"{flops / size:.3g} {letter}FLOP"
    return f"{flops:.3g} FLOP" if flops else "–"


def _mib(size_bytes: float) -> str:
    mib = size_bytes / MIB
    return "0" if not mib else f"{mib:,.0f}" if mib >= 100 else f"{mib:.3g}" if mib >= 0.01 else "<0.01"


def _names(names: Sequence[str]) -> str:
    """``layers.0 ... layers.31 (32)``."""
    different = list(dict.fromkeys(names))
    if len(different) == 1:
        return f"{different[0]} × {len(names)}" if len(names) > 1 else different[0]
    return f"{different[0]} … {different[-1]} ({len(names)})" if len(names) > 2 else ", ".join(names)


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _labelled(label: str, *pieces: str | Piece) -> Line:
    return labelled(f" {label}", *pieces)
