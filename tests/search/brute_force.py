"""The optimum by trying everything, written as plainly as possible; the only price is ``cost.estimate_plan``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.errors import ClusterError
from galvatron_jax.plan import Plan, PlanRun, Remat, Stage, Strategy, model_reference, strategy_violations
from galvatron_jax.profile import HardwareProfile, ModelProfile


class Tried(NamedTuple):
    """One plan of the space."""

    seconds_per_sample: float
    peak_bytes: int
    plan: Plan


def every_plan(
    model: ModelProfile, cluster: Cluster, hardware: HardwareProfile, batches: Sequence[int]
) -> Iterator[Tried]:
    """Yield every plan of the search's space with its price."""
    kinds = [run.kind for run in model.layers for _ in range(run.count)]
    for batch, stages in itertools.product(batches, range(1, len(kinds) + 1)):
        if cluster.devices % stages:
            continue
        try:
            degrees = cluster.tensor_degrees(cluster.devices // stages)
        except ClusterError:
            continue
        for microbatches in range(1, batch + 1):
            if batch % microbatches == 0:
                for shape in _plans(model, cluster, kinds, degrees, batch, microbatches, stages):
                    predicted = estimate_plan(shape, model, hardware)
                    peak = max(stage.peak_bytes for stage in predicted.stages)
                    yield Tried(predicted.step_time_s / batch, peak, shape)


def _plans(
    model: ModelProfile,
    cluster: Cluster,
    kinds: list[str],
    degrees: tuple[int, ...],
    batch: int,
    microbatches: int,
    stages: int,
) -> Iterator[Plan]:
    devices = cluster.devices // stages
    choices = [
        [s for s in _strategies(devices, degrees) if not strategy_violations(model.kind(k), s, batch // microbatches)]
        for k in kinds
    ]
    for inner in itertools.combinations(range(1, len(kinds)), stages - 1):
        ends = [0, *inner, len(kinds)]
        for assignment in itertools.product(*choices):
            yield Plan(
                model=model_reference(model),
                cluster=cluster,
                global_batch=batch,
                microbatches=microbatches,
                stages=tuple(
                    Stage(
                        devices=devices,
                        runs=tuple(
                            PlanRun(kind=k, count=1, strategy=s)
                            for k, s in zip(kinds[a:b], assignment[a:b], strict=True)
                        ),
                    )
                    for a, b in itertools.pairwise(ends)
                ),
            )


def _strategies(devices: int, degrees: tuple[int, ...]) -> Iterator[Strategy]:
    remats: tuple[Remat, ...] = ("none", "full")
    for tp, sp, zero, remat in itertools.product(degrees, (False, True), range(4), remats):
        yield Strategy(tp=tp, sp=sp, dp=devices // tp, zero=zero, remat=remat)
