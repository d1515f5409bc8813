"""Nothing fits: by how much, and the smallest changes that would fit.

The least memory of a plan is found without any times: for a (batch, microbatches, stages) every layer takes the
option that lets the fullest stage be smallest. For one stage that is ``min over t of (sum over layers of least bytes
with at most t live bytes) + t``; over the boundaries, the least maximum by dynamic programming.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..cluster import Cluster
from ..errors import GalvatronError, InfeasibleError
from ..schedule import ScheduleName, in_flight_microbatches
from ..units import format_gib
from ._engine import Candidate, Engine
from ._knapsack import Floats
from ._pricing import Prices, Problem, message_buffers
from ._relaxation import weighted_sum
from ._space import Limits

SCHEDULE: ScheduleName = "1f1b"
"""No schedule holds less: gpipe holds all microbatches, interleaving fills more of them before the first backward."""
CHANGES = 3
MAX_MORE_GPUS = 64
"""Clusters up to so many times the size are tried."""


class _Miss(NamedTuple):
    """The least memory that a candidate needs."""

    peak_bytes: float
    candidate: Candidate
    stage: int
    """The fullest stage."""


def explain_infeasible(engine: Engine) -> InfeasibleError:
    """Return the error for a problem in which nothing fits: the nearest miss, and the smallest changes that would."""
    problem = engine.problem
    if not engine.candidates():
        return InfeasibleError(
            f"none of the microbatch counts {list(problem.limits.microbatches or ())} divides a global batch of"
            f" {list(engine.global_batches)}",
            expected="a divisor",
            where="--microbatches",
            action="allow other counts, or choose another --global-batch",
        )
    miss = _nearest_miss(engine)
    if miss is None:
        return InfeasibleError(
            f"no strategy is legal for global batches {list(engine.global_batches)} on {problem.cluster.mesh}"
            f" within the limits given" + _rules_text(problem),
            expected="a microbatch that the data-parallel ranks divide, or a tensor degree that divides the layers",
            action=_changes_text(list(_legal_changes(engine)))
            or "allow other microbatch counts, tensor degrees or stages",
        )
    batch, microbatches, stages = miss.candidate.global_batch, miss.candidate.microbatches, miss.candidate.slices
    where = f" on stage {miss.stage + 1} of {stages}" if stages > 1 else ""
    changes = itertools.islice(
        itertools.chain(
            _fewer_limits(engine), _smaller_batch(engine), _more_gpus(engine), _more_memory(miss), _shorter_seq(engine)
        ),
        CHANGES,
    )
    return InfeasibleError(
        f"{problem.model.name} does not fit {problem.cluster.mesh} {problem.hardware.name}: the nearest miss needs"
        f" {format_gib(miss.peak_bytes)}{where}, budget {format_gib(problem.budget_bytes)} (global batch {batch},"
        f" {microbatches} microbatch{'es' * (microbatches > 1)}, {stages} stage{'s' * (stages > 1)})",
        action=_changes_text(list(changes)),
    )


def least_peak_bytes(engine: Engine) -> float | None:
    """Return the least memory per device of any plan in the engine's space; None when none is legal."""
    miss = _nearest_miss(engine)
    return None if miss is None else miss.peak_bytes


def _changes_text(changes: list[str]) -> str:
    return "smallest changes that would fit: " + "; ".join(changes) if changes else ""


def _nearest_miss(engine: Engine) -> _Miss | None:
    """The candidate whose fullest stage is smallest.

    Only small microbatches are tried, up to the first that all devices of a stage divide: a larger one allows no
    further strategy and holds more residuals. Memory depends on a batch only through the microbatches that it allows.
    """
    best: _Miss | None = None
    tried: set[tuple[int, int, int]] = set()
    enough: dict[tuple[int, int], int] = {}
    plain = [candidate for candidate in engine.candidates() if candidate.schedule == SCHEDULE]
    for candidate in sorted(plain or engine.candidates(), key=lambda c: c.global_batch // c.microbatches):
        microbatch = candidate.global_batch // candidate.microbatches
        group = (candidate.global_batch, candidate.slices)
        key = (candidate.slices, microbatch, min(candidate.microbatches, candidate.slices + 1))
        if key in tried or microbatch > enough.get(group, microbatch):
            continue
        tried.add(key)
        if microbatch * candidate.slices % engine.problem.cluster.devices == 0:
            enough[group] = microbatch
        prices = engine.prices_of(candidate)
        if prices is not None:
            peak, stage = _least_peak(prices, candidate)
            if best is None or peak < best.peak_bytes:
                best = _Miss(peak, candidate, stage)
    return best


def _least_peak(prices: Prices, candidate: Candidate) -> tuple[float, int]:
    """Least peak of the fullest stage over all boundaries, and that stage."""
    stages, layers = candidate.slices, len(prices.order)
    rest = np.full(layers + 1, np.inf)
    rest[layers] = 0.0
    tables: list[tuple[Floats, Floats]] = []
    for s in range(stages - 1, -1, -1):
        table = _stage_peaks(prices, candidate, s)
        tables.insert(0, (table, rest))
        rest = np.maximum(table, rest).min(axis=1)
    start, peaks = 0, []
    for table, after in tables:
        stop = int(np.maximum(table[start], after).argmin())
        peaks.append(float(table[start, stop]))
        start = stop
    return max(peaks), int(np.argmax(peaks))


def _stage_peaks(prices: Prices, candidate: Candidate, s: int) -> Floats:
    """Least peak of stage ``s`` by (first layer, end)."""
    in_flight = in_flight_microbatches(candidate.schedule, s, candidate.slices, candidate.microbatches)
    thresholds = np.array(sorted({live for kind in prices.kinds for live in kind.live_bytes.tolist()}))
    smallest = np.full((len(prices.kinds), len(thresholds)), np.inf)
    for k, kind in enumerate(prices.kinds):
        if len(kind.strategies):
            size = kind.state_bytes + in_flight * kind.residual_bytes
            smallest[k] = np.where(kind.live_bytes[:, None] <= thresholds, size[:, None], np.inf).min(axis=0)
    counts = prices.contents.counts_SK
    finite = np.where(np.isinf(smallest), 0.0, smallest)
    peaks = weighted_sum(counts, finite) + thresholds
    peaks[weighted_sum(counts, np.isinf(smallest).astype(np.float64)) > 0] = np.inf
    wires = [message_buffers(prices, candidate.slices, s, (j, j)) for j in range(len(prices.order) + 1)]
    buffers = np.array(wires)[:, None] if s else np.array(wires)[None, :]
    return np.asarray(np.append(peaks.min(axis=1), np.inf)[prices.contents.of_interval] + buffers)


def _fits(engine: Engine) -> bool:
    """Return whether anything fits; a division of all states by all devices decides most cases at once."""
    model, devices = engine.problem.model, engine.problem.cluster.devices
    if (
        model.parameter_count * engine.problem.training.state_bytes_per_parameter
        > devices * engine.problem.budget_bytes
    ):
        return False
    least = least_peak_bytes(engine)
    return least is not None and least <= engine.problem.budget_bytes


def _fewer_limits(engine: Engine) -> Iterator[str]:
    if engine.problem.limits != Limits() and _fits(
        Engine(replace(engine.problem, limits=Limits()), engine.global_batches)
    ):
        yield f"leave out {_given_limits(engine.problem.limits)}"


def _given_limits(limits: Limits) -> str:
    given = {
        "--max-pp or --no-pp": limits.max_stages or limits.stages,
        "--max-tp": limits.max_tp,
        "--microbatches": limits.microbatches,
        "--schedule": limits.schedules,
        "--space, --pin or --forbid": limits.rules,
    }
    return " and ".join(name for name, value in given.items() if value)


def _rules_text(problem: Problem) -> str:
    """Name the rules, when there are some."""
    rules = ", ".join(f"{'forbid' if rule.forbids else 'pin'} {str(rule)!r}" for rule in problem.limits.rules)
    return f" ({rules})" if rules else ""


def _shorter_seq(engine: Engine) -> Iterator[str]:
    def fits(seq: int) -> bool:
        return _fits(Engine(replace(engine.problem, model=engine.problem.model.at_seq(seq)), engine.global_batches))

    seq = engine.problem.model.seq
    if seq > 1 and fits(1):
        shorter = next(seq >> halvings for halvings in range(1, seq.bit_length()) if fits(seq >> halvings))
        yield f"--seq {seq} -> {shorter}"


def _smaller_batch(engine: Engine) -> Iterator[str]:
    """The largest batch below all given ones that fits: halves of the smallest, then one sample per device."""
    batch = min(engine.global_batches) // 2
    while batch >= 1:
        smaller = Engine(engine.problem, (batch,))
        smaller.prices = engine.prices  # the same model on the same devices
        if _fits(smaller):
            yield f"global batch {min(engine.global_batches)} -> {batch}"
            return
        batch //= 2


def _legal_changes(engine: Engine) -> Iterator[str]:
    """Batches near the given ones for which some strategy is legal and fits."""
    devices = engine.problem.cluster.devices
    batch = -(-max(engine.global_batches) // devices) * devices
    if batch not in engine.global_batches and _fits(Engine(engine.problem, (batch,))):
        yield f"global batch {max(engine.global_batches)} -> {batch}"


def _more_gpus(engine: Engine) -> Iterator[str]:
    """The smallest cluster that fits: more GPUs in the only node up to 8, then more nodes."""
    cluster, found = engine.problem.cluster, None
    gpus = cluster.gpus_per_node
    nodes = [cluster.nodes * factor for factor in range(2, MAX_MORE_GPUS + 1) if factor & (factor - 1) == 0]
    meshes = [(1, g) for g in (2, 4, 8) if cluster.nodes == 1 and g > gpus] + [(n, max(gpus, 8)) for n in nodes]
    for mesh in meshes:
        larger = Cluster(nodes=mesh[0], gpus_per_node=mesh[1], gpu=cluster.gpu)
        batches = tuple(sorted({-(-b // larger.devices) * larger.devices for b in engine.global_batches}))
        try:
            if _fits(Engine(replace(engine.problem, cluster=larger), batches)):
                found = larger
                break
        except GalvatronError:
            continue
    if found is not None:
        yield f"more GPUs: --mesh {found.mesh} instead of {cluster.mesh}"


def _more_memory(miss: _Miss) -> Iterator[str]:
    yield f"more memory: a budget of {format_gib(miss.peak_bytes + 0.05 * 2**30)} per GPU"
