"""Schedules: every action once, in an order that cannot deadlock, with the promised memory."""

from __future__ import annotations

import pytest

from galvatron_jax.schedule import Action, Schedule, build_schedule, in_flight_microbatches, in_flight_units

NAMES = ("1f1b", "gpipe")
SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 2), (4, 3), (4, 4), (4, 9), (8, 16)]


def run(schedule: Schedule, chunks: int = 1) -> list[set[tuple[int, ...]]]:
    """Run the action lists with unlimited links; return what each slice held, by chunk, at each moment.

    Raises:
        AssertionError: no slice can go on, though actions are left.
    """
    slices, last = len(schedule), len(schedule) * chunks - 1
    done: set[tuple[int, str, int]] = set()
    position, held = [0] * slices, [[0] * chunks for _ in schedule]
    moments: list[set[tuple[int, ...]]] = [set() for _ in schedule]
    while any(position[s] < len(actions) for s, actions in enumerate(schedule)):
        moved = False
        for s, actions in enumerate(schedule):
            if position[s] == len(actions):
                continue
            phase, m, chunk = actions[position[s]]
            stage = chunk * slices + s
            if phase == "forward":
                ready = stage == 0 or (stage - 1, phase, m) in done
            else:
                ready = (stage, "forward", m) in done and (stage == last or (stage + 1, phase, m) in done)
            if ready:
                done.add((stage, phase, m))
                position[s] += 1
                held[s][chunk] += 1 if phase == "forward" else -1
                moments[s].add(tuple(held[s]))
                moved = True
        assert moved, f"deadlock at {position}"
    assert held == [[0] * chunks for _ in schedule]
    return moments


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
    assert [max(held)[0] for held in run(build_schedule(name, stages, microbatches))] == promised
    assert promised == [max(in_flight_units(name, s, stages, microbatches))[0] for s in range(stages)]


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


@pytest.mark.parametrize(
    ("slices", "groups", "chunks"), [(2, 1, 2), (2, 3, 2), (3, 2, 4), (4, 1, 2), (4, 4, 3), (8, 2, 2)]
)
def test_interleaved_schedule_runs_everything_once_within_its_promise(slices: int, groups: int, chunks: int) -> None:
    microbatches = groups * slices
    schedule = build_schedule("interleaved-1f1b", slices, microbatches, chunks)
    for actions in schedule:
        assert len(set(actions)) == len(actions) == 2 * microbatches * chunks
    for s, moments in enumerate(run(schedule, chunks)):
        promised = in_flight_units("interleaved-1f1b", s, slices, microbatches, chunks)
        assert promised <= moments
        assert all(any(all(a <= b for a, b in zip(m, p, strict=True)) for p in promised) for m in moments)
        assert max(map(sum, moments)) == min(2 * (slices - 1 - s) + (chunks - 1) * slices + 1, microbatches * chunks)


def test_interleaved_order_is_the_published_one() -> None:
    """Narayanan et al. 2021, figure 4 (bottom): 4 slices, 8 microbatches, 2 chunks (upper case: the second chunk)."""
    first = build_schedule("interleaved-1f1b", 4, 8, 2)[0]
    letters = ["".join((a.phase[0].upper() if a.chunk else a.phase[0]) + str(a.microbatch + 1)) for a in first]
    assert letters[:13] == "f1 f2 f3 f4 F1 F2 F3 F4 f5 f6 f7 B1 f8".split()
