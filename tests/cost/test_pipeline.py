from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost import StageTime, simulate
from galvatron_jax.errors import PlanError
from galvatron_jax.schedule import Action, Schedule, build_schedule

times = st.floats(0, 10)
Pipeline = tuple[Schedule, list[StageTime], list[float]]
Node = tuple[int, str, int]


def stage(forward_s: float = 1.0, backward_s: float = 2.0, step_end_s: float = 0.0) -> StageTime:
    return StageTime(forward_s=forward_s, backward_s=backward_s, step_end_s=step_end_s)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    count, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    schedule = build_schedule(draw(st.sampled_from(["1f1b", "gpipe"])), count, microbatches)
    stages = [stage(draw(times), draw(times), draw(times)) for _ in range(count)]
    return schedule, stages, [draw(times) for _ in range(count - 1)]


def longest_path(schedule: Schedule, stages: list[StageTime], transfer_s: list[float]) -> float:
    """The same graph solved another way: relax all edges until nothing changes (Bellman-Ford)."""
    nodes: list[Node] = [
        (s, action.phase, action.microbatch) for s, actions in enumerate(schedule) for action in actions
    ]
    duration = {n: stages[n[0]].forward_s if n[1] == "forward" else stages[n[0]].backward_s for n in nodes}
    edges: list[tuple[Node, Node, float]] = [
        ((s, *a[:2]), (s, *b[:2]), 0.0) for s, actions in enumerate(schedule) for a, b in itertools.pairwise(actions)
    ]
    last = len(stages) - 1
    for s, phase, i in nodes:
        if phase == "forward" and s > 0:
            edges.append(((s - 1, "forward", i), (s, "forward", i), transfer_s[s - 1]))
        if phase == "backward":
            source = (s, "forward", i) if s == last else (s + 1, "backward", i)
            edges.append((source, (s, "backward", i), 0.0 if s == last else transfer_s[s]))
    end = dict(duration)
    for _ in nodes:
        for a, b, delay in edges:
            end[b] = max(end[b], end[a] + delay + duration[b])
    return max(end[n] + stages[n[0]].step_end_s for n in nodes)


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches", [1, 2, 8, 9])
def test_simulate_equal_stages_takes_the_closed_form(name: str, count: int, microbatches: int) -> None:
    timeline = simulate(build_schedule(name, count, microbatches), [stage(1.0, 2.0)] * count, [0.0] * (count - 1))
    assert timeline.step_time_s == pytest.approx((microbatches + count - 1) * 3.0)
    assert timeline.busy_s == pytest.approx([microbatches * 3.0] * count)
    assert timeline.bubble_s == pytest.approx([(count - 1) * 3.0] * count)


def test_simulate_transfers_delay_the_receiver_only() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 1), [stage(), stage()], [0.5])
    assert timeline.step_time_s == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)
    assert timeline.busy_s == pytest.approx([3.0, 3.0])


def test_simulate_slow_middle_stage_is_the_bound() -> None:
    stages = [stage(1.0, 1.0), stage(5.0, 5.0), stage(1.0, 1.0)]
    timeline = simulate(build_schedule("1f1b", 3, 20), stages, [0.0, 0.0])
    assert timeline.step_time_s == pytest.approx(1 + 20 * (5 + 5) + 1)


def test_simulate_step_end_of_an_early_stage_can_decide() -> None:
    timeline = simulate(build_schedule("1f1b", 2, 2), [stage(1, 2), stage(1, 2, step_end_s=50)], [0.0])
    assert timeline.slowest_slice == 1
    assert timeline.step_time_s == pytest.approx(1 + 3 + 3 + 50)


def test_simulate_one_stage_is_the_exact_sum() -> None:
    timeline = simulate(build_schedule("1f1b", 1, 7), [stage(0.1, 0.3, 0.7)], [])
    assert timeline.step_time_s == 7 * (0.1 + 0.3) + 0.7
    assert timeline.bubble_s == (0.0,)


def test_simulate_schedule_that_waits_for_itself_raises() -> None:
    backward_first = ((Action("backward", 0), Action("forward", 0)), (Action("forward", 0), Action("backward", 0)))
    with pytest.raises(PlanError, match="waits for itself with 4 actions left"):
        simulate(backward_first, [stage(), stage()], [0.0])


@given(pipelines())
def test_simulate_equals_the_longest_path(pipeline: Pipeline) -> None:
    assert simulate(*pipeline).step_time_s == pytest.approx(longest_path(*pipeline))


@given(pipelines(), st.data())
def test_simulate_never_faster_when_anything_gets_slower(pipeline: Pipeline, data: st.DataObject) -> None:
    schedule, stages, transfers = pipeline
    slower = [stage(*(getattr(s, f) + data.draw(times) for f in StageTime.__slots__)) for s in stages]
    late = [wire + data.draw(times) for wire in transfers]
    before = simulate(schedule, stages, transfers).step_time_s
    assert simulate(schedule, slower, late).step_time_s >= before - 1e-9
