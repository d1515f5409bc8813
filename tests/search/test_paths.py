from __future__ import annotations

import random

import pytest

from galvatron_jax.cost import StageTime, simulate
from galvatron_jax.schedule import build_schedule
from galvatron_jax.search._paths import Path, bottleneck_path, longest_path
from galvatron_jax.search._stage import StageChoice


def random_pipeline(seed: int) -> tuple[int, list[StageChoice], list[float]]:
    draw = random.Random(seed)
    stages = draw.randint(1, 5)
    choices = [
        StageChoice(draw.uniform(0.1, 3), draw.uniform(0.1, 5), draw.choice([0.0, draw.uniform(0, 9)]), ())
        for _ in range(stages)
    ]
    return draw.randint(1, 9), choices, [draw.choice([0.0, draw.uniform(0, 2)]) for _ in range(stages - 1)]


def length(path: Path, stages: list[StageChoice], transfer_s: list[float]) -> float:
    crossing = sum(k * t for k, t in zip(path.crossings, transfer_s, strict=True))
    return crossing + sum(stage.cost(weights) for stage, weights in zip(stages, path.weights, strict=True))


@pytest.mark.parametrize("seed", range(80))
def test_longest_path_takes_the_simulated_time(seed: int) -> None:
    microbatches, stages, transfer_s = random_pipeline(seed)
    schedule = build_schedule("1f1b", len(stages), microbatches)
    time_s, path = longest_path(schedule, stages, transfer_s)
    times = [StageTime(forward_s=s.forward_s, backward_s=s.backward_s, step_end_s=s.step_end_s) for s in stages]
    assert time_s == pytest.approx(simulate(schedule, times, transfer_s).step_time_s, rel=1e-12)
    assert time_s == pytest.approx(length(path, stages, transfer_s), rel=1e-12)


@pytest.mark.parametrize("seed", range(80))
def test_every_path_bounds_every_pipeline_from_below(seed: int) -> None:
    microbatches, stages, transfer_s = random_pipeline(seed)
    schedule = build_schedule("1f1b", len(stages), microbatches)
    time_s, _ = longest_path(schedule, stages, transfer_s)
    draw = random.Random(seed)
    others = [StageChoice(draw.random(), draw.random(), draw.random(), ()) for _ in stages]
    _, foreign = longest_path(schedule, others, [draw.random() for _ in transfer_s])
    paths = [foreign] + [bottleneck_path(len(stages), microbatches, s) for s in range(len(stages))]
    assert all(length(path, stages, transfer_s) <= time_s * (1 + 1e-12) for path in paths)
