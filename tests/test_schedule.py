"""Schedules: every action once, in an order that cannot deadlock, with the promised memory."""

from __future__ import annotations

import pytest

from galvatron_jax.schedule import Action, Schedule, build_schedule, in_flight_microbatches

NAMES = ("1f1b", "gpipe")
SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 2), (4, 3), (4, 4), (4, 9), (8, 16)]


def run(schedule: Schedule) -> list[int]:
    """Run the action lists with unlimited links; return the most microbatches that each stage held at once.

    Raises:
        AssertionError: no stage can go on, though actions are left.
    """
    last = len(schedule) - 1
    done: set[tuple[int, Action]] = set()
    position, held, most = [0] * len(schedule), [0] * len(schedule), [0] * len(schedule)
    while any(position[s] < len(actions) for s, actions in enumerate(schedule)):
        moved = False
        for s, actions in enumerate(schedule):
            if position[s] == len(actions):
                continue
            action = actions[position[s]]
            if action.phase == "forward":
                ready = s == 0 or (s - 1, action) in done
            else:
                own = (s, Action("forward", action.microbatch)) in done
                ready = own and (s == last or (s + 1, action) in done)
            if ready:
                done.add((s, action))
                position[s] += 1
                held[s] += 1 if action.phase == "forward" else -1
                most[s] = max(most[s], held[s])
                moved = True
        assert moved, f"deadlock at {position}"
    assert held == [0] * len(schedule)
    return most


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_build_schedule_has_every_action_once(name: str, stages: int, microbatches: int) -> None:
    schedule = build_schedule(name, stages, microbatches)
    everything = {Action(phase, m) for phase in ("forward", "backward") for m in range(microbatches)}
    assert len(schedule) == stages
    for actions in schedule:
        assert set(actions) == everything
        assert len(actions) == 2 * microbatches


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_build_schedule_runs_and_holds_the_promised_microbatches(name: str, stages: int, microbatches: int) -> None:
    promised = [in_flight_microbatches(name, s, stages, microbatches) for s in range(stages)]
    assert run(build_schedule(name, stages, microbatches)) == promised


def test_1f1b_order_is_the_published_one() -> None:
    """Narayanan et al. 2021, figure 4 (top): 4 stages, 8 microbatches."""
    schedule = build_schedule("1f1b", 4, 8)
    text = ["".join(f"{a.phase[0]}{a.microbatch + 1}" for a in actions) for actions in schedule]
    assert text[0] == "f1f2f3f4b1f5b2f6b3f7b4f8b5b6b7b8"
    assert text[1] == "f1f2f3b1f4b2f5b3f6b4f7b5f8b6b7b8"
    assert text[3] == "f1b1f2b2f3b3f4b4f5b5f6b6f7b7f8b8"


def test_gpipe_runs_all_forwards_first() -> None:
    for actions in build_schedule("gpipe", 3, 4):
        assert [a.phase for a in actions] == ["forward"] * 4 + ["backward"] * 4


@pytest.mark.parametrize(
    ("name", "stage", "stages", "microbatches", "held"),
    [("1f1b", 0, 4, 8, 4), ("1f1b", 3, 4, 8, 1), ("1f1b", 0, 4, 2, 2), ("gpipe", 3, 4, 8, 8), ("1f1b", 0, 1, 8, 1)],
)
def test_in_flight_microbatches_by_hand(name: str, stage: int, stages: int, microbatches: int, held: int) -> None:
    assert in_flight_microbatches(name, stage, stages, microbatches) == held
