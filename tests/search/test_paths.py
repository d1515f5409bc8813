from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest

from galvatron_jax.cost import Crossing, StageTime, simulate
from galvatron_jax.events import Event, global_order
from galvatron_jax.schedule import Schedule, build_schedule
from galvatron_jax.search._paths import Path, bottleneck_path, longest_path
from galvatron_jax.search._stage import StageChoice


class Pipeline(NamedTuple):
    schedule: Schedule
    stages: list[StageChoice]
    meets: list[bool]
    """By slice."""
    crossings: list[Crossing]

    @property
    def order(self) -> tuple[Event, ...]:
        return global_order(self.schedule, len(self.stages))


def random_pipeline(seed: int) -> Pipeline:
    draw = random.Random(seed)
    slices, groups = draw.randint(1, 5), draw.randint(1, 9)
    name, chunks = draw.choice([("1f1b", 1), ("gpipe", 1), ("interleaved-1f1b", draw.randint(2, 3))])
    if chunks > 1:
        slices, groups = max(slices, 2), max(slices, 2) * min(groups, 3)
    choices = [
        StageChoice(draw.uniform(0.1, 3), draw.uniform(0.1, 5), draw.choice([0.0, draw.uniform(0, 9)]), ())
        for _ in range(slices * chunks)
    ]
    meets = [draw.random() < 0.7 for _ in range(slices)]
    crossings = [random_crossing(draw, meets[k % slices]) for k in range(len(choices) - 1)]
    return Pipeline(build_schedule(name, slices, groups, chunks), choices, meets, crossings)


def random_crossing(draw: random.Random, meets: bool) -> Crossing:
    """Its sender is held for all of it, for a part, or not at all."""
    seconds = draw.choice([0.0, draw.uniform(0, 2)])
    return Crossing(seconds, meets, draw.choice([math.inf, seconds * draw.random(), 0.0]))


def length(path: Path, stages: list[StageChoice], crossings: list[Crossing]) -> float:
    crossing = sum(k.seconds(c) for k, c in zip(path.crossings, crossings, strict=True))
    return crossing + sum(stage.cost(weights) for stage, weights in zip(stages, path.weights, strict=True))


@pytest.mark.parametrize("seed", range(80))
def test_longest_path_takes_the_simulated_time(seed: int) -> None:
    pipeline = random_pipeline(seed)
    schedule, stages, meets, crossings = pipeline
    time_s, path = longest_path(pipeline.order, len(schedule), stages, crossings)
    times = [StageTime(forward_s=s.forward_s, backward_s=s.backward_s, step_end_s=s.step_end_s) for s in stages]
    assert time_s == pytest.approx(simulate(schedule, times, crossings).step_time_s, rel=1e-12)
    assert time_s == pytest.approx(length(path, stages, crossings), rel=1e-12)


@pytest.mark.parametrize("seed", range(80))
def test_every_path_bounds_every_pipeline_from_below(seed: int) -> None:
    pipeline = random_pipeline(seed)
    schedule, stages, meets, crossings = pipeline
    slices, chunks = len(meets), len(stages) // len(meets)
    time_s, _ = longest_path(pipeline.order, slices, stages, crossings)
    draw = random.Random(seed)
    others = [StageChoice(draw.random(), draw.random(), draw.random(), ()) for _ in stages]
    _, foreign = longest_path(pipeline.order, slices, others, [random_crossing(draw, c.meets) for c in crossings])
    microbatches = len(schedule[0]) // 2 // chunks
    paths = [foreign] + [bottleneck_path(microbatches, s, meets, chunks) for s in range(slices)]
    assert all(length(path, stages, crossings) <= time_s * (1 + 1e-12) for path in paths)
