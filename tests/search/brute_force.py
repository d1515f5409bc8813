"""The optimum by trying everything, written as plainly as possible; the only price is ``cost.estimate_plan``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import estimate_plan, least_seconds
from galvatron_jax.errors import ClusterError, PlanError
from galvatron_jax.plan import (
    ModelReference,
    Plan,
    PlanRun,
    Remat,
    Stage,
    Strategy,
    check_plan,
    model_reference,
    strategy_violations,
)
from galvatron_jax.profile import HardwareProfile, ModelProfile
from galvatron_jax.schedule import ScheduleName
from galvatron_jax.search._space import MAX_CHUNKS, Limits, even_cuts


class Tried(NamedTuple):
    """One plan of the space."""

    seconds_per_sample: float
    peak_bytes: int
    plan: Plan


class Skeleton(NamedTuple):
    """A plan without strategies."""

    slices: int
    batch: int
    microbatches: int
    schedule: ScheduleName
    chunks: int
    cuts: tuple[int, ...]


def every_plan(
    model: ModelProfile,
    cluster: Cluster,
    hardware: HardwareProfile,
    batches: Sequence[int],
    limits: Limits | None = None,
) -> Iterator[Tried]:
    """Yield every plan of the search's space with its price."""
    for skeleton in skeletons(model, cluster, hardware, batches):
        for plan in plans(model, cluster, skeleton, limits or Limits()):
            predicted = estimate_plan(plan, model, hardware)
            peak = max(stage.peak_bytes for stage in predicted.stages)
            yield Tried(predicted.step_time_s / plan.global_batch, peak, plan)


def skeletons(
    model: ModelProfile, cluster: Cluster, hardware: HardwareProfile, batches: Sequence[int]
) -> Iterator[Skeleton]:
    """Yield everything but strategies."""
    layers = model.layer_count
    for batch, slices in itertools.product(batches, range(1, layers + 1)):
        try:
            cluster.slice_shape(cluster.devices // slices if cluster.devices % slices == 0 else 0)
        except ClusterError:
            continue
        for microbatches in (m for m in range(1, batch + 1) if batch % m == 0):
            inner = itertools.combinations(range(1, layers), slices - 1)
            for cuts in ((0, *some, layers) for some in inner):
                yield Skeleton(slices, batch, microbatches, "1f1b", 1, cuts)
                if slices > 1:
                    yield Skeleton(slices, batch, microbatches, "gpipe", 1, cuts)
            for chunks in range(2, MAX_CHUNKS + 1):
                if slices > 1 and slices * chunks <= layers and microbatches % slices == 0:
                    for cuts in even_cuts(slices * chunks, work(model, hardware)):
                        yield Skeleton(slices, batch, microbatches, "interleaved-1f1b", chunks, cuts)


def plan_count(
    model: ModelProfile, cluster: Cluster, hardware: HardwareProfile, batches: Sequence[int], limits: Limits
) -> int:
    """Return how many plans ``every_plan`` yields."""
    return sum(
        math.prod(len(menu) for menu in _menus(model, cluster, skeleton, limits)[1])
        for skeleton in skeletons(model, cluster, hardware, batches)
    )


def plans(model: ModelProfile, cluster: Cluster, skeleton: Skeleton, limits: Limits) -> Iterator[Plan]:
    """Yield the skeleton with every assignment of strategies."""
    kinds = [run.kind for run in model.layers for _ in range(run.count)]
    owners, menus = _menus(model, cluster, skeleton, limits)
    names = list(dict.fromkeys(owners))
    devices = cluster.devices // skeleton.slices
    for picked in itertools.product(*menus):
        strategy = dict(zip(names, picked, strict=True))
        runs = [PlanRun(kind=k, count=1, strategy=strategy[owner]) for k, owner in zip(kinds, owners, strict=True)]
        yield Plan(
            model=model_reference(model),
            cluster=cluster,
            global_batch=skeleton.batch,
            microbatches=skeleton.microbatches,
            schedule=skeleton.schedule,
            chunks=skeleton.chunks,
            stages=tuple(Stage(devices=devices, runs=tuple(runs[a:b])) for a, b in itertools.pairwise(skeleton.cuts)),
        )


def _menus(
    model: ModelProfile, cluster: Cluster, skeleton: Skeleton, limits: Limits
) -> tuple[list[object], list[list[Strategy]]]:
    """Who decides the strategy of each layer, and what each of them can choose from.

    Each layer decides for itself; interleaved, all layers of one kind on one slice together.
    """
    kinds = [run.kind for run in model.layers for _ in range(run.count)]
    stages = [stage for stage, (a, b) in enumerate(itertools.pairwise(skeleton.cuts)) for _ in range(a, b)]
    owners: list[object] = [
        (stage % skeleton.slices, kind) if skeleton.chunks > 1 else i
        for i, (stage, kind) in enumerate(zip(stages, kinds, strict=True))
    ]
    choices = {kind: _strategies(model, cluster, kind, skeleton, limits) for kind in set(kinds)}
    return owners, [choices[kinds[owners.index(name)]] for name in dict.fromkeys(owners)]


def work(model: ModelProfile, hardware: HardwareProfile) -> list[float]:
    """Least seconds of the first ``n`` layers, at index ``n``."""
    each = [
        least_seconds(model.kind(run.kind), hardware, model.causal_attention, 1.0)
        for run in model.layers
        for _ in range(run.count)
    ]
    return list(itertools.accumulate(each, initial=0.0))


def _strategies(model: ModelProfile, cluster: Cluster, kind: str, skeleton: Skeleton, limits: Limits) -> list[Strategy]:
    devices = cluster.devices // skeleton.slices
    remats: tuple[Remat, ...] = ("none", "dots", "full")
    counts = [n for n in range(1, devices + 1) if devices % n == 0]
    every = (
        Strategy(tp=tp, sp=sp, ulysses=ulysses, dp=devices // (tp * ulysses), zero=zero, replicas=replicas, remat=remat)
        for tp, ulysses in itertools.product(counts, counts)
        if devices % (tp * ulysses) == 0 and min(tp, ulysses) == 1
        for sp, zero, replicas, remat in itertools.product((False, True), range(4), counts, remats)
    )
    microbatch = skeleton.batch // skeleton.microbatches
    return [
        s
        for s in every
        if not strategy_violations(model.kind(kind), s, microbatch)
        and _stands(s, cluster, devices)
        and limits.allows(kind, s)
    ]


def _stands(strategy: Strategy, cluster: Cluster, devices: int) -> bool:
    """Whether a plan document accepts the strategy on so many devices."""
    model = ModelReference(name="m", structure="s", dtype="bfloat16", seq=1, layer_count=1, parameter_count=1)
    whole = Cluster(nodes=max(1, devices // cluster.gpus_per_node), gpus_per_node=min(devices, cluster.gpus_per_node))
    stage = Stage(devices=devices, runs=(PlanRun(kind="k", count=1, strategy=strategy),))
    try:
        check_plan(Plan(model=model, cluster=whole, global_batch=1, stages=(stage,)))
    except PlanError:
        return False
    return True
