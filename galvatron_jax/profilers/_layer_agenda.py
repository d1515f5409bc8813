"""Which passes of which layers to measure, most needed first: a short budget still covers every kind and degree.

Kinds with most of the model's FLOPs come first. Of each pass the smallest and the largest number of samples make a
line; sizes between them show how straight it is, so they come last.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..profile import LayerKind, ModelProfile
from ._layer_passes import PassName
from ._readings import LAUNCH, LOOP, Subject


def layer_agenda(model: ModelProfile, samples: Sequence[int], degrees: Sequence[int]) -> tuple[Subject, ...]:
    """Return the subjects for a profile of the layers of ``model``.

    Args:
        model: Its profile.
        samples: Numbers of samples on one device, rising.
        degrees: Tensor-parallel degrees; those that a kind does not allow are left out for it.
    """
    ends, middle = sorted({samples[0], samples[-1]}), list(samples[1:-1])
    kinds = sorted(model.kinds, key=lambda kind: -_flops(model, kind))
    rounds: list[tuple[Sequence[PassName], Sequence[int]]] = [
        (("forward", "backward"), ends),
        (("backward-full",), ends),
        (("forward", "backward"), middle),
        (("backward-dots",), ends),
        (("backward-full", "backward-dots"), middle),
    ]
    subjects = [
        Subject(what=what, size=size, layer=kind.name, group=tp)
        for passes, sizes in rounds
        for kind in kinds
        for tp in legal_degrees(kind, degrees)
        for what in passes
        for size in sizes
        if what != "backward-dots" or kind.residuals_dots is not None
    ]
    return (Subject(what=LOOP), Subject(what=LAUNCH), *dict.fromkeys(subjects))


def legal_degrees(kind: LayerKind, degrees: Sequence[int]) -> list[int]:
    """Return those of ``degrees`` that tensor parallelism of ``kind`` allows."""
    candidate = kind.best_candidate
    return [tp for tp in degrees if tp == 1 or (candidate and not candidate.undivided(kind.classes, tp))]


def _flops(model: ModelProfile, kind: LayerKind) -> float:
    count = sum(run.count for run in model.layers if run.kind == kind.name)
    return count * sum(dot.count * dot.flops(kind.classes, {}) for dot in kind.dots)
