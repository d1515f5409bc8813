"""Stages with made-up prices: relayouts in any proportion, where a detour through a third layout can pay."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import numpy as np
import pytest

from galvatron_jax.plan import Strategy
from galvatron_jax.search._assignment import Assigner
from galvatron_jax.search._pricing import Contents, KindPrices, Prices, Relayouts
from galvatron_jax.search._space import Layout
from galvatron_jax.search._stage import Section, Span, Weights

COLUMNS = ("forward_s", "backward_s", "step_end_s", "state_bytes", "residual_bytes", "live_bytes")
LAYOUTS = (Layout(1, False), Layout(2, False), Layout(2, True))


class Sequence(NamedTuple):
    """One way to assign all layers, tried by hand."""

    times: tuple[float, float, float]
    peak_bytes: float


def random_prices(seed: int) -> Prices:
    """Two kinds with three layouts; relayout costs without a triangle inequality."""
    draw = np.random.default_rng(seed)
    kinds, relayouts = [], []
    for name in ("a", "b"):
        rows = int(draw.integers(2, 5))
        columns = dict(zip(COLUMNS, draw.integers(1, 20, (6, rows)).astype(float), strict=True))
        layout = draw.integers(0, 3, rows)
        kinds.append(KindPrices(name=name, strategies=(Strategy(),) * rows, layout=layout, every={}, **columns))
        between = draw.integers(0, 8, (2, 3, 3)).astype(float) * (1 - np.eye(3))
        wires = [(draw.integers(0, 4, 3).astype(float), draw.integers(0, 4, 3).astype(float)) for _ in range(2)]
        relayouts.append(Relayouts(between[0], between[1], wires[0], wires[1]))
    order = np.array([0, 0, 1])
    nothing = np.zeros(len(order) + 1)
    return Prices(
        layouts=LAYOUTS,
        kinds=tuple(kinds),
        relayouts=tuple(relayouts),
        order=order,
        contents=Contents.of(order, 2),
        message_bytes_J=nothing,
        transfer_BJ=nothing[None, :],
        sender_BJ=nothing[None, :],
        meets_B=(False,),
        work=(0.0,) * len(nothing),
        repeated_K=np.ones(2),
    )


def every_sequence(prices: Prices, span: Span) -> list[Sequence]:
    """Try all sequences of options, layer by layer."""
    (section,), ((in_flight,),) = span.sections, span.moments
    kinds = [kind for kind, layers in section.runs for _ in range(layers)]
    found = []
    for rows in itertools.product(*(range(len(prices.kinds[kind].layout)) for kind in kinds)):
        chosen = [(prices.kinds[kind], row) for kind, row in zip(kinds, rows, strict=True)]
        layouts = [int(kind.layout[row]) for kind, row in chosen]
        forward = sum(kind.forward_s[row] for kind, row in chosen)
        backward = sum(kind.backward_s[row] for kind, row in chosen)
        for kind, before, after in zip(kinds[1:], layouts, layouts[1:], strict=False):
            forward += prices.relayouts[kind].forward_s[before, after]
            backward += prices.relayouts[kind].backward_s[before, after]
        if section.enters:
            forward += prices.relayouts[kinds[0]].from_wire_s[0][layouts[0]]
            backward += prices.relayouts[kinds[0]].from_wire_s[1][layouts[0]]
        if section.leaves_to >= 0:
            forward += prices.relayouts[section.leaves_to].to_wire_s[0][layouts[-1]]
            backward += prices.relayouts[section.leaves_to].to_wire_s[1][layouts[-1]]
        step_end = sum(kind.step_end_s[row] for kind, row in chosen)
        held = sum(kind.state_bytes[row] + in_flight * kind.residual_bytes[row] for kind, row in chosen)
        peak = held + max(kind.live_bytes[row] for kind, row in chosen) + span.buffer_bytes
        found.append(Sequence((float(forward), float(backward), float(step_end)), float(peak)))
    return found


def random_span(seed: int) -> Span:
    draw = random.Random(seed)
    runs = draw.choice([((0, 4),), ((0, 2), (1, 2)), ((1, 1), (0, 3)), ((0, 1), (1, 2), (0, 1)), ((1, 1),)])
    moments, enters = ((draw.choice([1, 2, 3]),),), draw.random() < 0.5
    return Span((Section(runs, enters, draw.choice([-1, 0, 1])),), moments, draw.choice([0.0, 3.0]))


WEIGHTS = (Weights(1.0, 1.0, 0.0), Weights(1.0, 1.0, 0.125), Weights(1.0, 0.0, 0.0), Weights(0.75, 1.0, 1.0))


@pytest.mark.parametrize("seed", range(60))
def test_cheapest_stage_equals_trying_all_sequences(seed: int) -> None:
    prices, span, weights = random_prices(seed), random_span(seed), WEIGHTS[seed % len(WEIGHTS)]
    tried = every_sequence(prices, span)
    for share in (0.0, 0.1, 0.5, 1.0):
        capacity = float(np.quantile([s.peak_bytes for s in tried], share))
        best = min(np.dot(weights, s.times) for s in tried if s.peak_bytes <= capacity)
        found = Assigner(prices, capacity).cheapest(span, (weights,))
        assert found is not None
        (stage,) = found.stages
        assert stage.cost(weights) == pytest.approx(best, rel=1e-12)
        assert replayed(prices, span, stage.runs, tried_times=(stage.forward_s, stage.backward_s, stage.step_end_s))


@pytest.mark.parametrize("seed", range(40))
def test_choices_within_a_limit_are_the_unbeaten_sequences(seed: int) -> None:
    prices, span, weights = random_prices(seed), random_span(seed), WEIGHTS[seed % len(WEIGHTS)]
    tried = every_sequence(prices, span)
    capacity = float(np.quantile([s.peak_bytes for s in tried], 0.4))
    costs = [float(np.dot(weights, s.times)) for s in tried if s.peak_bytes <= capacity]
    limit = float(np.quantile(costs, 0.3))
    feasible = {s.times for s in tried if s.peak_bytes <= capacity and np.dot(weights, s.times) <= limit}
    unbeaten = {times for times in feasible if not any(beats(other, times) for other in feasible)}
    found = Assigner(prices, capacity).within(span, (weights,), limit)
    assert {tuple(choice.times()) for choice in found} == unbeaten


@pytest.mark.parametrize("seed", range(40))
def test_stage_bound_stays_below_the_optimum(seed: int) -> None:
    prices, span, weights = random_prices(seed), random_span(seed), WEIGHTS[seed % len(WEIGHTS)]
    tried = every_sequence(prices, span)
    counts = np.zeros((1, 2))
    for kind, layers in span.sections[0].runs:
        counts[0, kind] += layers
    for share in (0.0, 0.2, 1.0):
        capacity = float(np.quantile([s.peak_bytes for s in tried], share))
        best = min(float(np.dot(weights, s.times)) for s in tried if s.peak_bytes <= capacity)
        bound = Assigner(prices, capacity).bounds(weights, span.moments[0][0], counts, span.buffer_bytes)
        assert bound[0] <= best * (1 + 1e-12)


def test_stage_that_does_not_fit_has_no_choice() -> None:
    prices, span = random_prices(1), Span((Section(((0, 3),), False, -1),), ((1,),), 0.0)
    smallest = min(s.peak_bytes for s in every_sequence(prices, span))
    assert Assigner(prices, smallest - 0.5).cheapest(span, (Weights(1.0, 1.0, 0.0),)) is None


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def replayed(
    prices: Prices, span: Span, runs: tuple[tuple[int, int, int], ...], tried_times: tuple[float, float, float]
) -> bool:
    """Whether the runs hold the span's layers in order and really take the times that they claim."""
    layers = [(kind, row) for kind, row, count in runs for _ in range(count)]
    assert [kind for kind, _ in layers] == [kind for kind, count in span.sections[0].runs for _ in range(count)]
    rows = [row for _, row in layers]
    sequences = itertools.product(*(range(len(prices.kinds[kind].layout)) for kind, _ in layers))
    at = next(i for i, sequence in enumerate(sequences) if list(sequence) == rows)
    return every_sequence(prices, span)[at].times == pytest.approx(tried_times)
