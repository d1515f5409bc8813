"""One layer kind, from its segment to its profile: both passes, names, candidates, quantities."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import msgspec

from ..profile import BATCH, SEQ, Candidate, Collective, LayerKind, Ulysses
from ._candidates import ClassSet, class_sets, sequence_parallel, spill_class, stream_classes, tensor_parallel
from ._collectives import data_collectives, tensor_collectives
from ._cut import Segment
from ._factored import factor
from ._layer import Layer, Samples, analyse_layer
from ._names import Given, Names, name_classes, samples
from ._per_sample import PerSample
from ._quantities import Quantities
from ._ulysses import Attention, exchanged_values, find_attention, ulysses_collectives

_WORTH_FACTORING = 0.001
"""Share of the FLOPs that a set behind blocked factors must divide beyond the best flat one."""


@dataclasses.dataclass(frozen=True)
class AnalysedKind:
    """One layer kind with the analysis behind its profile."""

    layer: Layer
    """Its program takes parameters in their stored shapes."""
    names: Names
    profile: LayerKind
    tensor_classes: frozenset[int]
    """Classes of the best candidate (empty when there is none)."""
    attention: Attention | None
    """Attention as Ulysses runs it; None when Ulysses is not legal."""
    stored_shapes: tuple[tuple[int, ...], ...]
    """Shape in which the state keeps each parameter, a reshape of the user's: another one only in the factored form."""

    @property
    def is_factored(self) -> bool:
        """Tell whether some parameter is stored in another shape than the user's."""
        return self.user_shapes != self.stored_shapes

    @property
    def user_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each parameter as the user has it."""
        return tuple(tuple(self.layer.segment.inputs[i].aval.shape) for i in self.layer.parameters)

    @functools.cached_property
    def samples(self) -> PerSample:
        """Where the samples are in the forward pass."""
        return PerSample(self.layer, next((f for f, name in self.names.items() if name == BATCH), None))

    @functools.cached_property
    def stream_classes(self) -> frozenset[int]:
        """Classes of the values that flow from layer to layer."""
        return stream_classes(self.layer)


def analyse_kind(
    segment: Segment,
    parameters: Mapping[int, str],
    differentiated: Sequence[int],
    given: Given,
    sampled_outputs: Sequence[int] = (),
    *,
    factored: bool = True,
) -> AnalysedKind:
    """Analyse one layer kind.

    Args:
        segment: A segment of that kind.
        parameters: Path inside the layer of each input that is a trained parameter.
        differentiated: Inputs that need a cotangent.
        given: Class names already known, by input (see ``name_classes``).
        sampled_outputs: Results whose dimension 0 is the batch, as their readers know.
        factored: Rewrite the program where the flat form of a parameter loses a class (``_factored``); whoever runs it
            must keep parameters in ``stored_shapes``.
    """
    batched = Samples(samples(given), sampled_outputs)
    layer = analyse_layer(segment, list(parameters), differentiated, batched)
    sets = class_sets(layer)
    if factored:
        layer, sets = _factored(layer, sets, batched)
    names = name_classes(layer, given)
    by_name = {name: f for f, name in names.items()}
    batch, seq = by_name.get(BATCH), by_name.get(SEQ)
    quantities = Quantities(layer, names)
    attention = None if batch is None or seq is None else find_attention(layer, batch, seq)
    inputs, outputs = quantities.boundaries()
    profile = LayerKind(
        name=segment.kind,
        classes={},
        parameters=quantities.parameters(list(parameters.values()), PerSample(layer, batch)),
        dots=quantities.dots(),
        traffic=quantities.traffic(),
        inputs=inputs,
        outputs=outputs,
        residuals=quantities.residuals("none"),
        residuals_dots=quantities.residuals("dots"),
        workspace=quantities.workspace(),
        live=quantities.live(),
        candidates=tuple(_candidate(layer, found, quantities, seq) for found in sets[:1]),
        ulysses=_ulysses(layer, attention, quantities, by_name, list(parameters.values())),
        data=() if batch is None else quantities.collectives(data_collectives(PerSample(layer, batch), seq)),
    )
    sizes = {name: layer.dimensions.factors.size(f) for f, name in names.items()}
    return AnalysedKind(
        layer=layer,
        names=names,
        profile=msgspec.structs.replace(profile, classes=_used_classes(profile, sizes)),
        tensor_classes=sets[0].classes if sets else frozenset(),
        attention=attention,
        stored_shapes=tuple(layer.inputs[i].shape for i in layer.parameters),
    )


def _factored(layer: Layer, sets: list[ClassSet], batched: Samples) -> tuple[Layer, list[ClassSet]]:
    """Return the layer in factored form and its class sets, or both unchanged where the flat form loses nothing."""
    wanted = next(iter(class_sets(layer, factored=True)), None)
    flat_share = sets[0].flops_share if sets else 0.0
    if wanted is None or wanted.flops_share <= flat_share + _WORTH_FACTORING:
        return layer, sets
    segment = factor(layer, wanted.classes)
    if segment is None:
        return layer, sets
    stored = analyse_layer(segment, layer.parameters, layer.differentiated, batched)
    stored.dimensions.factors.block(_part_factors(layer, stored))
    return stored, class_sets(stored)


def _part_factors(layer: Layer, stored: Layer) -> set[int]:
    """Return what stands before the classes in split parameters: it numbers parts, and was blocked in the flat form."""
    pairs = [(layer.inputs[i], stored.inputs[i]) for i in layer.parameters]
    split = {f for flat, value in pairs if flat.shape != value.shape for f in stored.classes(value)}
    whole = {f for op in stored.ops for _, dim in op.gathered for f in stored.dimensions.factors.resolve(dim)}
    return split & whole


def _candidate(layer: Layer, found: ClassSet, quantities: Quantities, seq: int | None) -> Candidate:
    names, spill, degree = quantities.names, spill_class(layer, found), found.max_degree
    spilled: tuple[Collective, ...] = ()
    if spill is not None:
        sizes = {f: layer.dimensions.factors.size(f) for f in (*found.classes, *spill)}
        degree = math.gcd(sizes[spill[0]] * sizes[spill[1]], *[sizes[f] for f in found.classes if f != spill[0]])
        spilled = quantities.collectives(tensor_collectives(layer, found.classes | {spill[1]}))
    sequence = sequence_parallel(layer, found, seq)
    return Candidate(
        classes=tuple(sorted(names[f] for f in found.classes)),
        max_degree=degree,
        flops_share=min(1.0, found.flops_share),
        spill={names[spill[0]]: names[spill[1]]} if spill else {},
        tensor=quantities.collectives(tensor_parallel(layer, found)),
        sequence=None if sequence is None else quantities.collectives(sequence),
        spilled=spilled,
    )


def _ulysses(
    layer: Layer,
    attention: Attention | None,
    quantities: Quantities,
    by_name: Mapping[str, int],
    paths: Sequence[str],
) -> Ulysses | None:
    if attention is None:
        return None
    exchanges = ulysses_collectives(layer, attention, by_name[BATCH], by_name[SEQ])
    exchanged = exchanged_values(layer, by_name[SEQ])
    read = {path: layer.inputs[i] for path, i in zip(paths, layer.parameters, strict=True)}
    return Ulysses(
        classes=tuple(quantities.names[f] for f in attention.heads),
        collectives=quantities.collectives(exchanges),
        unread=tuple(
            path
            for path, value in read.items()
            if layer.reads_again(value, "none") and not layer.reads_again(value, "none", exchanged)
        ),
    )


def _used_classes(kind: LayerKind, sizes: Mapping[str, int]) -> dict[str, int]:
    """Keep the classes that some quantity mentions (``batch`` and ``seq`` always)."""
    text = msgspec.json.encode(kind).decode()
    return {n: size for n, size in sorted(sizes.items()) if f'"{n}"' in text or n in (BATCH, SEQ)}
