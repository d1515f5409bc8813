"""One global order: complete, free of deadlock in every schedule, equal wherever it is derived."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.errors import PlanError
from galvatron_jax.runtime._events import (
    Compute,
    Event,
    Phase,
    Transfer,
    check_order,
    forwards_only,
    global_order,
    project,
)
from galvatron_jax.schedule import Action, Schedule, build_schedule

chains = st.builds(
    lambda name, slices, microbatches: (build_schedule(name, slices, microbatches), slices),
    *(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(1, 7)),
)
schedules = chains | st.builds(
    lambda slices, groups, chunks: (
        build_schedule("interleaved-1f1b", slices, groups * slices, chunks),
        slices * chunks,
    ),
    *(st.integers(1, 4), st.integers(1, 3), st.integers(2, 3)),
)


@given(schedules)
def test_every_schedule_runs_to_its_end(case: tuple[Schedule, int]) -> None:
    schedule, stages = case
    events = global_order(schedule, stages)
    check_order(project(events, len(schedule)), stages)
    assert len(set(events)) == len(events)
    computes = [e for e in events if isinstance(e, Compute)]
    microbatches = len(schedule[0]) * len(schedule) // (2 * stages)
    assert len(computes) == 2 * stages * microbatches
    assert len(events) - len(computes) == 2 * (stages - 1) * microbatches


@given(schedules)
def test_slices_keep_the_order_of_their_schedule(case: tuple[Schedule, int]) -> None:
    schedule, stages = case
    slices = len(schedule)
    for s, sequence in enumerate(project(global_order(schedule, stages), slices)):
        computes = [e for e in sequence if isinstance(e, Compute)]
        assert [Action(c.phase, c.microbatch, c.stage // slices) for c in computes] == list(schedule[s])


@given(chains)
def test_on_a_chain_values_are_sent_before_the_next_compute_of_their_maker(case: tuple[Schedule, int]) -> None:
    schedule, stages = case
    for sequence in project(global_order(schedule, stages), len(schedule)):
        for before, event in zip(sequence, sequence[1:], strict=False):
            if isinstance(before, Compute) and isinstance(event, Compute):
                # Nothing was sent in between, so the first of them makes nothing that moves.
                ends = {("forward", stages - 1), ("backward", 0)}
                assert (before.phase, before.stage) in ends


@given(chains)
def test_a_chain_empties_its_end_first(case: tuple[Schedule, int]) -> None:
    """A slice that has a value to send on and one to take sends first: else all wait for the last one in turn."""
    schedule, stages = case
    for sequence in project(global_order(schedule, stages), len(schedule)):
        for before, event in zip(sequence, sequence[1:], strict=False):
            if isinstance(before, Transfer) and isinstance(event, Transfer) and before.phase == event.phase:
                assert before.boundary != event.boundary
                assert (before.boundary > event.boundary) == (event.phase == "forward")


def test_1f1b_of_two_stages_by_hand() -> None:
    f: Phase = "forward"
    b: Phase = "backward"
    events = global_order(build_schedule("1f1b", 2, 2), 2)
    assert [str(e) for e in events] == [
        str(e)
        for e in (
            Compute(0, f, 0),
            Transfer(0, 1, f, 0),
            Compute(0, f, 1),
            Compute(1, f, 0),
            Transfer(0, 1, f, 1),
            Compute(1, b, 0),
            Transfer(1, 0, b, 0),
            Compute(1, f, 1),
            Compute(0, b, 0),
            Compute(1, b, 1),
            Transfer(1, 0, b, 1),
            Compute(0, b, 1),
        )
    ]


def test_evaluation_has_forwards_alone() -> None:
    schedule = forwards_only(build_schedule("interleaved-1f1b", 2, 4, 2))
    events = global_order(schedule, 4)
    check_order(project(events, 2), 4)
    assert {e.phase for e in events} == {"forward"}
    assert len(events) == 4 * 4 + 3 * 4


def test_backward_before_its_forward_is_refused_with_what_waits() -> None:
    actions = (Action("backward", 0), Action("forward", 0))
    with pytest.raises(PlanError, match=r"slice 1 waits at the backward of microbatch 0 on stage 1"):
        global_order((build_schedule("1f1b", 2, 1)[0], actions), 2)


def test_slices_that_send_to_each_other_first_are_refused() -> None:
    """The classic deadlock of 1F1B with blocking sends: both neighbours send before they receive."""
    f: Phase = "forward"
    b: Phase = "backward"
    first: list[Event] = [
        *(Compute(0, f, 0), Transfer(0, 1, f, 0), Compute(0, f, 1)),
        *(Transfer(0, 1, f, 1), Transfer(1, 0, b, 0), Compute(0, b, 0), Transfer(1, 0, b, 1), Compute(0, b, 1)),
    ]
    second: list[Event] = [
        *(Transfer(0, 1, f, 0), Compute(1, f, 0), Compute(1, b, 0)),
        *(Transfer(1, 0, b, 0), Transfer(0, 1, f, 1), Compute(1, f, 1), Compute(1, b, 1), Transfer(1, 0, b, 1)),
    ]
    with pytest.raises(PlanError, match="cotangents of microbatch 0 from stage 1 to stage 0") as error:
        check_order([first, second], 2)
    assert "slice 0 waits at the values of microbatch 1" in error.value.message


def test_missing_transfer_is_refused() -> None:
    with pytest.raises(PlanError, match="slice 1 waits at the forward of microbatch 0"):
        check_order([[Compute(0, "forward", 0)], [Compute(1, "forward", 0)]], 2)


def test_any_exchange_of_two_events_of_one_slice_runs_or_is_refused() -> None:
    """``check_order`` never hangs and never lets an order through that a slice-by-slice run cannot finish."""
    rng = random.Random(0)
    events = project(global_order(build_schedule("1f1b", 3, 3), 3), 3)
    refused = 0
    for _ in range(200):
        shuffled = [list(sequence) for sequence in events]
        s = rng.randrange(3)
        i, j = rng.sample(range(len(shuffled[s])), 2)
        shuffled[s][i], shuffled[s][j] = shuffled[s][j], shuffled[s][i]
        try:
            check_order(shuffled, 3)
        except PlanError:
            refused += 1
    assert 100 < refused < 200
