"""From a user's model and loss to the ``ModelProfile``: trace, flatten, cut, analyse each kind, name, count."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec

from ..profile import BATCH, SEQ, LayerKind, LayerRun, ModelProfile
from ._batch import abstract_batch, sample_count
from ._boundaries import Crossings, find_crossings
from ._cut import Cut, Segment, cut_layers
from ._dimensions import Value
from ._flatten import Equation, Variable, flatten, holds_marks, is_plain_call_or_layers
from ._flow import trained_values
from ._kind import AnalysedKind, analyse_kind
from ._marks import ATTENTION
from ._mixing import mixed_samples
from ._pure_model import Loss, dotted
from ._read import read_model
from ._rows import Rows
from ._trace import Trace, trace_loss

VariableNames = dict[Variable, list[list[str | None]]]
"""Class names of boundary values, by dimension and factor."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A model as the runtime needs it: the traced and cut program, its kinds, and the profile."""

    trace: Trace
    cut: Cut
    kinds: dict[str, AnalysedKind]
    profile: ModelProfile

    @property
    def statistics(self) -> list[str]:
        """Paths of the state that a step makes from activations (BatchNorm): it depends on the microbatch's size."""
        source, known = self.cut.source, jax.tree_util.tree_flatten_with_path(self.trace.state)[0]
        before = source.inputs[source.weights : source.weights + len(known)]
        after = source.outputs[1 : 1 + len(known)]
        floating = (jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) for _, leaf in known)
        changes = zip(known, before, after, floating, strict=True)
        return [dotted(path) for (path, _), old, new, is_float in changes if is_float and new is not old]

    @property
    def calls_attention(self) -> bool:
        """Tell whether the model calls ``jax.nn.dot_product_attention``."""
        return bool(self._attention)

    @property
    def asks_for_kernels(self) -> bool:
        """Tell whether every ``jax.nn.dot_product_attention`` of the model asks for cuDNN (and there is one)."""
        calls = [call for kind in self.kinds.values() for call in kind.layer.forward.calls]
        return bool(calls) and self._attention <= {equation for call in calls for equation in call.equations}

    @functools.cached_property
    def _attention(self) -> set[Equation]:
        programs = [kind.layer.forward for kind in self.kinds.values()]
        return {equation for program in programs for equation in program.equations if ATTENTION in equation.scope}

    @functools.cached_property
    def mixed_samples(self) -> list[str]:
        """Where the loss is no mean over samples, as ``"div in head"``: it depends on the microbatch's size."""
        return mixed_samples(self.cut.segments, self.kinds)


def analyse_model(
    model: Any, loss: Loss, batch: Any, *, name: str | None = None, source: str = "", layers: str | None = None
) -> Analysis:
    """Analyse ``loss(model, batch)`` abstractly: no device, no parameter memory.

    Args:
        model: A ``flax.nnx.Module``; a ``flax.linen.Module``, bound or not; a pytree of parameters; or a function that
            builds one of them.
        loss: ``loss(model, batch)``, a scalar, or a tuple whose first entry is one. A Linen module arrives bound.
        batch: A pytree of arrays or ``jax.ShapeDtypeStruct`` at the shape of one microbatch (samples over all devices);
            dimension 0 of its leaves is the batch (see ``Trace.has_samples``).
        name: Name of the model in documents; the class of the model by default.
        source: Where the profile comes from, for its ``source`` field.
        layers: The repeated blocks, where the analysis should not look for them: ``"model.layers.*"``.

    Raises:
        AnalysisError: the model or loss cannot be traced, or ``layers`` names nothing.
    """
    batch = abstract_batch(batch, sample_count(batch) or 0)
    read = read_model(model, loss, batch)
    trace = trace_loss(read, batch, where=getattr(loss, "__name__", "loss"))
    counts = {"weights": len(read.paths), "states": len(read.roles)}
    cut = cut_layers(
        flatten(trace.program, holds_marks, **counts),
        lambda: flatten(trace.program, is_plain_call_or_layers, **counts),
        layers=layers,
    )
    trace = dataclasses.replace(trace, rows=Rows.of(read, cut.source.stacks))
    kinds = _analyse_kinds(trace, cut, frozenset())
    return Analysis(trace, cut, kinds, _profile(name or read.name, source, trace, cut, kinds))


def _analyse_kinds(trace: Trace, cut: Cut, flat: frozenset[str]) -> dict[str, AnalysedKind]:
    """Analyse each kind; those named in ``flat`` in the user's shapes."""
    paths = parameter_paths(trace, cut)
    trained = trained_variables(cut, set(paths))
    differentiated = _positions(cut, trained)
    names = _batch_names(trace, cut)
    kinds: dict[str, AnalysedKind] = {}
    for segment in cut.segments:
        if segment.kind not in kinds:
            factored = segment.kind not in flat
            kinds[segment.kind] = _analyse_kind(segment, paths, differentiated[segment.kind], names, factored=factored)
        _hand_down(segment, kinds[segment.kind], names)
    for segment, outputs in _late_samples(cut, kinds):
        factored = segment.kind not in flat
        kinds[segment.kind] = _analyse_kind(
            segment, paths, differentiated[segment.kind], names, outputs, factored=factored
        )
    if disputed := _disputed(cut, kinds):
        return _analyse_kinds(trace, cut, flat | disputed)
    crossings = find_crossings(cut, len(trace.has_samples))
    return {name: _placed(kind, cut, crossings, set(paths)) for name, kind in kinds.items()}


def _late_samples(cut: Cut, kinds: dict[str, AnalysedKind]) -> list[tuple[Segment, list[int]]]:
    """Return the layers with results whose dimension 0 only a reader knows to be the batch, one layer of each kind.

    A mask broadcast to the shape of the tokens reads none of them; the layer that attends says what it is.
    """
    read_as_batch = {
        variable
        for segment in cut.segments
        for variable, value in zip(segment.inputs, kinds[segment.kind].layer.inputs, strict=True)
        if _is_batch_first(kinds[segment.kind], value)
    }
    found: dict[str, tuple[Segment, list[int]]] = {}
    for segment in cut.segments:
        kind = kinds[segment.kind]
        made = zip(segment.outputs, kind.layer.outputs, strict=True)
        outputs = [i for i, (v, value) in enumerate(made) if v in read_as_batch and not _is_batch_first(kind, value)]
        if outputs:
            found.setdefault(segment.kind, (segment, outputs))
    return list(found.values())


def _is_batch_first(kind: AnalysedKind, value: Value) -> bool:
    return bool(value.dims) and [kind.names.get(f) for f in kind.layer.dimensions.classes(value)[0]] == [BATCH]


def _disputed(cut: Cut, kinds: Mapping[str, AnalysedKind]) -> frozenset[str]:
    """Return the kinds that would store a parameter in another shape than a kind that reads it too."""
    shapes: dict[Variable, dict[str, tuple[int, ...]]] = {}
    for segment in cut.segments:
        kind = kinds[segment.kind]
        for index, shape in zip(kind.layer.parameters, kind.stored_shapes, strict=True):
            shapes.setdefault(segment.inputs[index], {})[segment.kind] = shape
    return frozenset(
        name
        for variable, by_kind in shapes.items()
        if len(set(by_kind.values())) > 1
        for name, shape in by_kind.items()
        if shape != variable.aval.shape
    )


def _placed(kind: AnalysedKind, cut: Cut, crossings: Crossings, parameters: set[Variable]) -> AnalysedKind:
    """Add what only the whole program knows: repetition, how boundary values flow, which parameters are held twice."""
    segments = [segment for segment in cut.segments if segment.kind == kind.profile.name]
    profile = crossings.classify(kind.profile, segments, parameters)
    tied = [index in segments[0].tied for index in kind.layer.parameters]
    profile = msgspec.structs.replace(
        profile,
        repeated=len(segments) > 1,
        parameters=tuple(
            msgspec.structs.replace(parameter, tied=is_tied)
            for parameter, is_tied in zip(profile.parameters, tied, strict=True)
        ),
    )
    return dataclasses.replace(kind, profile=profile)


def _positions(cut: Cut, trained: set[Variable]) -> dict[str, list[int]]:
    """Inputs of each kind that need a cotangent in any of its layers (the first layer may read plain data)."""
    found: dict[str, set[int]] = {}
    for segment in cut.segments:
        found.setdefault(segment.kind, set()).update(i for i, v in enumerate(segment.inputs) if v in trained)
    return {kind: sorted(positions) for kind, positions in found.items()}


def _analyse_kind(
    segment: Segment,
    paths: dict[Variable, str],
    differentiated: list[int],
    names: VariableNames,
    sampled_outputs: Sequence[int] = (),
    *,
    factored: bool,
) -> AnalysedKind:
    parameters = {i: _inner_path(paths[v], segment) for i, v in enumerate(segment.inputs) if v in paths}
    given = {i: names[v] for i, v in enumerate(segment.inputs) if v in names and i not in parameters}
    return analyse_kind(segment, parameters, differentiated, given, sampled_outputs, factored=factored)


def _profile(name: str, source: str, trace: Trace, cut: Cut, kinds: dict[str, AnalysedKind]) -> ModelProfile:
    runs: list[LayerRun] = []
    for segment in cut.segments:
        if runs and runs[-1].kind == segment.kind:
            runs[-1] = LayerRun(kind=segment.kind, count=runs[-1].count + 1)
        else:
            runs.append(LayerRun(kind=segment.kind, count=1))
    profiles = tuple(kind.profile for kind in kinds.values())
    return ModelProfile(
        name=name,
        source=source or f"galvatron_jax.analysis, jax {jax.__version__}",
        structure=_structure(runs, profiles),
        dtype=_compute_dtype(profiles),
        seq=max((kind.classes.get(SEQ, 1) for kind in profiles), default=1),
        layers=tuple(runs),
        kinds=profiles,
        causal_attention=any(ATTENTION + "causal" in op.scope for k in kinds.values() for op in k.layer.ops),
    )


def parameter_paths(trace: Trace, cut: Cut) -> dict[Variable, str]:
    """Return the path of each parameter, by its variable in the cut program."""
    return dict(zip(cut.source.inputs, trace.paths, strict=False))


def trained_variables(cut: Cut, parameters: set[Variable]) -> set[Variable]:
    """Return all differentiable values that depend on a parameter, parameters included."""
    return trained_values(cut.source, parameters)


def _batch_names(trace: Trace, cut: Cut) -> VariableNames:
    """Dimension 0 of every batch leaf is ``batch``; dimension 1 of a leaf with two or three is ``seq``."""
    leaves = len(trace.has_samples)
    names: VariableNames = {}
    for variable, has_samples in zip(cut.source.inputs[-leaves:], trace.has_samples, strict=True) if leaves else []:
        shape = variable.aval.shape
        if not has_samples:
            continue
        known: list[str | None] = [BATCH, SEQ if len(shape) <= 3 else None, *[None] * len(shape)]
        names[variable] = [[name] if size > 1 else [] for name, size in zip(known, shape, strict=False)]
    return names


def _hand_down(segment: Segment, kind: AnalysedKind, names: VariableNames) -> None:
    """Name the classes of a segment's results for the segments that read them."""
    for variable, value in zip(segment.outputs, kind.layer.outputs, strict=True):
        names[variable] = [[kind.names.get(f) for f in dim] for dim in kind.layer.dimensions.classes(value)]


def _inner_path(path: str, segment: Segment) -> str:
    """Path inside the layer: of ``layers.3.kernel`` and, of a stack, ``layers.kernel[3]`` the same ``kernel``."""
    inner = path.removeprefix(re.sub(r"\[\d+\]", "", segment.name) + ".")
    return inner if inner == path else re.sub(r"\[\d+\]$", "", inner)


def _structure(runs: Sequence[LayerRun], kinds: Sequence[LayerKind]) -> str:
    """Hash of what a plan depends on: the layers in order, their parameters, and the classes that may be sharded.

    Batch, sequence length and dtypes are left out: the same model at another shape takes the same plan.
    """
    text = [f"{run.count}x{run.kind}" for run in runs]
    for kind in kinds:
        sizes = {n: size for n, size in kind.classes.items() if n not in (BATCH, SEQ)}
        dims = [
            (p.path, [[sizes.get(f, f) if isinstance(f, str) else f for f in dim] for dim in p.dims])
            for p in kind.parameters
        ]
        text.append(f"{kind.name}{dims}{[candidate.classes for candidate in kind.candidates]}")
    return hashlib.sha256("|".join(text).encode()).hexdigest()[:16]


def _compute_dtype(kinds: Sequence[LayerKind]) -> str:
    """The dtype of most matmul FLOPs."""
    totals: dict[str, float] = {}
    for kind in kinds:
        for dot in kind.dots:
            totals[dot.dtype] = totals.get(dot.dtype, 0) + dot.count * dot.flops(kind.classes, {})
    return max(sorted(totals), key=lambda dtype: totals[dtype], default="float32")
