"""What is alive in a layer's backward pass: as read in programs that XLA:GPU compiled (docs/design/0055)."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.plan import Remat
from galvatron_jax.profile import Array, LayerKind
from tests.support.small_models import SMALL_MODELS, small_llama


@functools.cache
def block() -> LayerKind:
    """Of a Llama whose scores are larger than all else, as at real sequence lengths."""
    model = small_llama(seq=128, dtype="bfloat16")
    return analyse_model(model.build, model.loss, model.abstract_batch).kinds["layers.*"].profile


def sized(arrays: tuple[Array, ...], *marks: str) -> Counter[str]:
    """Count arrays by dtype: those with exactly the classes in ``marks`` among (seq, seq) and mlp."""
    found: Counter[str] = Counter()
    for array in arrays:
        if array.classes.count("seq") == marks.count("seq") and ("mlp" in array.classes) == ("mlp" in marks):
            found[array.dtype] += array.count
    return found


@pytest.mark.parametrize(
    ("remat", "scores", "inner"),
    [
        # the cotangent of the scores in float32, probabilities and their cotangent; the scores themselves are kept
        ("none", {"float32": 1, "bfloat16": 2}, {"bfloat16": 3}),
        ("dots", {"float32": 2, "bfloat16": 2}, {"bfloat16": 3}),
        # gate and up are made again, and wait with their cotangents for the gradients of the weights
        ("full", {"float32": 2, "bfloat16": 2}, {"bfloat16": 4}),
    ],
)
def test_softmax_backward_is_the_fullest_moment(remat: Remat, scores: dict[str, int], inner: dict[str, int]) -> None:
    fullest = block().live[remat].moments[0]
    assert sized(fullest.arrays, "seq", "seq") == scores
    assert sized(fullest.arrays, "seq", "mlp") == inner


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_gradients_of_weights_come_last_so_their_operands_wait(remat: Remat) -> None:
    waiting = block().live[remat].waiting
    assert sized(waiting, "seq", "mlp") == {"bfloat16": 3}
    assert not sized(waiting, "seq", "seq")


def test_weights_that_are_still_to_be_read_are_those_of_what_comes_after() -> None:
    """Only queries, keys and values come after the softmax in a backward pass: mlp and output are through."""
    fullest = block().live["full"].moments[0]
    assert all("mlp" not in weight.classes for weight in fullest.weights)
    assert sum(weight.count for weight in fullest.weights if len(weight.classes) > 1) == 3


@functools.cache
def analysed(name: str) -> Analysis:
    model = SMALL_MODELS[name]()
    return analyse_model(model.build, model.loss, model.abstract_batch)


@pytest.mark.parametrize("name", sorted(SMALL_MODELS))
def test_every_kind_says_what_it_needs_and_whether_it_stands_in_a_row(name: str) -> None:
    found = analysed(name)
    counts = Counter(segment.kind for segment in found.cut.segments)
    for kind in (analysed.profile for analysed in found.kinds.values()):
        assert kind.repeated == (counts[kind.name] > 1)
        assert set(kind.live) == {"none", "dots", "full"}
        for live in kind.live.values():
            assert all(set(a.classes) <= set(kind.classes) for m in live.moments for a in (*m.arrays, *m.weights))
