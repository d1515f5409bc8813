from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost import Crossing, StageTime, simulate
from galvatron_jax.errors import PlanError
from galvatron_jax.events import Compute, Event, Transfer, global_order, slices_of
from galvatron_jax.schedule import Action, Schedule, build_schedule

times = st.floats(0, 10)
Pipeline = tuple[Schedule, list[StageTime], list[Crossing]]


def stage(forward_s: float = 1.0, backward_s: float = 2.0, step_end_s: float = 0.0) -> StageTime:
    return StageTime(forward_s=forward_s, backward_s=backward_s, step_end_s=step_end_s)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    slices, groups = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    name, chunks = draw(st.sampled_from([("1f1b", 1), ("gpipe", 1), ("interleaved-1f1b", 2)]))
    chunks = chunks if slices > 1 else 1
    schedule = build_schedule(name, slices, groups * (slices if chunks > 1 else 1), chunks)
    stages = [stage(draw(times), draw(times), draw(times)) for _ in range(slices * chunks)]
    return schedule, stages, [Crossing(draw(times), draw(st.booleans()), draw(times)) for _ in stages[1:]]


def longest_path(schedule: Schedule, stages: list[StageTime], crossings: list[Crossing]) -> float:
    """The same graph solved another way: relax all edges until nothing changes (Bellman-Ford)."""
    slices, order = len(schedule), global_order(schedule, len(stages))

    def duration(event: Event) -> float:
        if isinstance(event, Transfer):
            return crossings[event.boundary].seconds
        return stages[event.stage].forward_s if event.phase == "forward" else stages[event.stage].backward_s

    def holds(event: Event) -> bool:
        return isinstance(event, Compute) or crossings[event.boundary].meets

    def early(event: Event, s: int) -> float:
        """By how much slice ``s`` is free before the event ends."""
        if not isinstance(event, Transfer) or event.source % slices != s:
            return 0.0
        return max(0.0, duration(event) - crossings[event.boundary].sender_s)

    own = [[event for event in order if s in slices_of(event, slices) and holds(event)] for s in range(slices)]
    edges = [(a, b, early(a, s)) for s, events in enumerate(own) for a, b in itertools.pairwise(events)]
    edges += [(a, b, 0.0) for t in order if isinstance(t, Transfer) for a, b in ((t.maker, t), (t, t.taker))]
    end, moved = {event: duration(event) for event in order}, True
    while moved:
        moved = False
        for a, b, before in edges:
            if end[a] - before + duration(b) > end[b]:
                end[b], moved = end[a] - before + duration(b), True
    step_ends = [sum(x.step_end_s for x in stages[s::slices]) for s in range(slices)]
    return max(end[events[-1]] - early(events[-1], s) + step_ends[s] for s, events in enumerate(own))


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 8, 9])
def test_simulate_equal_stages_takes_the_closed_form(name: str, count: int, microbatches: int) -> None:
    timeline = simulate(
        build_schedule(name, count, microbatches), [stage(1.0, 2.0)] * count, [Crossing(0.0)] * (count - 1)
    )
    assert timeline.step_time_s == pytest.approx((microbatches + count - 1) * 3.0)
    assert timeline.busy_s == pytest.approx([microbatches * 3.0] * count)
    assert timeline.bubble_s == pytest.approx([(count - 1) * 3.0] * count)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("slices", range(2, 10))
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_simulate_interleaved_stages_that_meet_take_the_closed_form(slices: int, groups: int, chunks: int) -> None:
    """Narayanan et al. 2021, section 2.2.2: what free messages take, so no order of messages that meet is shorter."""
    microbatches, stages = groups * slices, slices * chunks
    schedule = build_schedule("interleaved-1f1b", slices, microbatches, chunks)
    timeline = simulate(schedule, [stage(1.0, 2.0)] * stages, [Crossing(0.0)] * (stages - 1))
    assert timeline.step_time_s == (microbatches * chunks + slices - 1) * 3.0


def test_simulate_messages_between_nodes_hold_both_sides() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 2), [stage(), stage()], [Crossing(0.5)])
    first = 1 + 0.5 + 1  # the second forward of slice 0 and the first of slice 1, side by side
    assert timeline.step_time_s == pytest.approx(first + 0.5 + 2 + 0.5 + 3 + 0.5 + 2)
    assert timeline.busy_s == pytest.approx([6.0, 6.0])


@pytest.mark.parametrize(("sender_s", "later"), [(0.5, 0.5), (9.0, 0.5), (0.2, 0.2), (0.0, 0.0)])
def test_simulate_sender_goes_on_when_buffers_have_the_rest(sender_s: float, later: float) -> None:
    """As above: of the four messages on the way only the cotangent of the first microbatch waits for its sender."""
    timeline = simulate(build_schedule("1f1b", 2, 2), [stage(), stage()], [Crossing(0.5, sender_s=sender_s)])
    assert timeline.step_time_s == pytest.approx(1 + 0.5 + 1 + 0.5 + 2 + later + 3 + 0.5 + 2)


def test_simulate_messages_inside_a_node_delay_the_receiver_only() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 2), [stage(), stage()], [Crossing(0.5, meets=False)])
    assert timeline.step_time_s == pytest.approx(1 + 0.5 + 3 + 3 + 0.5 + 2)


def test_simulate_slow_middle_stage_is_the_bound() -> None:
    stages = [stage(1.0, 1.0), stage(5.0, 5.0), stage(1.0, 1.0)]
    timeline = simulate(build_schedule("1f1b", 3, 20), stages, [Crossing(0.0, meets=False)] * 2)
    assert timeline.step_time_s == pytest.approx(1 + 20 * (5 + 5) + 1)


def test_simulate_step_end_of_an_early_stage_can_decide() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 2), [stage(1, 2), stage(1, 2, step_end_s=50)], [Crossing(0.0)])
    assert timeline.slowest_slice == 1
    assert timeline.step_time_s == pytest.approx(1 + 3 + 3 + 50)


def test_simulate_one_stage_is_the_exact_sum() -> None:
    timeline = simulate(build_schedule("1f1b", 1, 7), [stage(0.1, 0.3, 0.7)], [])
    assert timeline.step_time_s == 7 * (0.1 + 0.3) + 0.7
    assert timeline.bubble_s == (0.0,)


def test_simulate_schedule_that_waits_for_itself_raises() -> None:
    backward_first = ((Action("backward", 0), Action("forward", 0)), (Action("forward", 0), Action("backward", 0)))
    with pytest.raises(PlanError, match="can never finish"):
        simulate(backward_first, [stage(), stage()], [Crossing(0.0)])


SHORTEST_ENOUGH = {(2, 2): 1.0, (2, 4): 1.0, (3, 3): 1.03}
"""(Slices, microbatches) of two chunks, and how much longer than under the best order for it a step may be, messages of
up to 0.3 of a forward pass: one order for all lengths is not the best for each (docs/design/0083)."""


@pytest.mark.parametrize("message_s", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("case", SHORTEST_ENOUGH)
def test_an_interleaved_order_is_held_against_all_others(case: tuple[int, int], message_s: float) -> None:
    slices, microbatches = case
    schedule = build_schedule("interleaved-1f1b", slices, microbatches, 2)
    timeline = simulate(schedule, [stage(1.0, 2.0)] * 2 * slices, [Crossing(message_s)] * (2 * slices - 1))
    best = shortest(schedule, 2 * slices, message_s)
    assert best - 1e-9 <= timeline.step_time_s <= SHORTEST_ENOUGH[case] * best + 1e-9


Progress = tuple[tuple[int, ...], frozenset[Transfer]]
"""How many actions each slice has done, and the messages that are made and not there yet."""


def shortest(schedule: Schedule, stages: int, message_s: float) -> float:
    """The step time under the best order of all: every one is tried, clocks that are later everywhere left out."""
    slices, last = len(schedule), 0.0
    reached: dict[Progress, set[tuple[float, ...]]] = {((0,) * slices, frozenset()): {(0.0,) * slices}}
    while reached:
        found: dict[Progress, set[tuple[float, ...]]] = {}
        for progress, clocks in reached.items():
            last = min(max(clock) for clock in clocks)
            for following, event in possible(schedule, stages, progress):
                at, took = set(slices_of(event, slices)), message_s
                if isinstance(event, Compute):
                    took = 1.0 if event.phase == "forward" else 2.0
                for clock in clocks:
                    end = max(clock[s] for s in at) + took
                    found.setdefault(following, set()).add(tuple(end if s in at else clock[s] for s in range(slices)))
        reached = {
            progress: {c for c in clocks if not any(below(o, c) for o in clocks)} for progress, clocks in found.items()
        }
    return last


def possible(schedule: Schedule, stages: int, progress: Progress) -> Iterator[tuple[Progress, Event]]:
    """What can happen next, and how far that is."""
    done, sent = progress
    slices = len(schedule)
    made = {Compute(a.chunk * slices + s, a.phase, a.microbatch) for s in range(slices) for a in schedule[s][: done[s]]}
    for transfer in sent:
        yield (done, sent - {transfer}), transfer
    for s in range(slices):
        for action in schedule[s][done[s] : done[s] + 1]:
            event = Compute(action.chunk * slices + s, action.phase, action.microbatch)
            step = 1 if action.phase == "forward" else -1
            source, target = event.stage - step, event.stage + step
            taken = Transfer(source, event.stage, event.phase, event.microbatch)
            if 0 <= source < stages and (taken.maker not in made or taken in sent):
                continue
            sends = {Transfer(event.stage, target, event.phase, event.microbatch)} if 0 <= target < stages else set()
            yield ((*done[:s], done[s] + 1, *done[s + 1 :]), sent | sends), event


def below(clock: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return clock != other and all(a <= b for a, b in zip(clock, other, strict=True))


@given(pipelines())
def test_simulate_equals_the_longest_path(pipeline: Pipeline) -> None:
    assert simulate(*pipeline).step_time_s == pytest.approx(longest_path(*pipeline))


@given(pipelines(), st.data())
def test_simulate_never_faster_when_anything_gets_slower(pipeline: Pipeline, data: st.DataObject) -> None:
    schedule, stages, crossings = pipeline
    slower = [stage(*(getattr(s, f) + data.draw(times) for f in StageTime.__slots__)) for s in stages]
    late = [Crossing(c.seconds + data.draw(times), c.meets, c.sender_s + data.draw(times)) for c in crossings]
    before = simulate(schedule, stages, crossings).step_time_s
    assert simulate(schedule, slower, late).step_time_s >= before - 1e-9
