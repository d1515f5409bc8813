"""Nothing fits: by how much, and the smallest changes that would fit.

The least memory of a plan is found without any times: for a (batch, microbatches, stages) every layer takes the
option that lets the fullest stage be smallest (``_footprint``), over all boundaries (``_least_peak``). A candidate is
looked at no further than to see that it is no better than the best one, or does not fit.

Whatever ends the search ends this too: what was found until then is told.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from ..cluster import Cluster
from ..errors import GalvatronError, InfeasibleError
from ..schedule import ScheduleName
from ..units import format_gib
from ._engine import Candidate, Engine, Stop, all_candidates
from ._footprint import Footprints
from ._least_peak import Line
from ._pricing import Problem
from ._space import Limits

T = TypeVar("T")

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


@dataclass(frozen=True, slots=True)
class _Case:
    """A problem whose least memory is asked for."""

    problem: Problem
    global_batches: Sequence[int]
    footprints: Footprints

    @classmethod
    def of(cls, engine: Engine) -> _Case:
        """Return the case of an engine; asks it often whether to go on."""
        problem = engine.problem
        return cls(
            problem,
            engine.global_batches,
            Footprints(problem.model, problem.limits, lambda: engine.poll(None)),
        )

    def with_batches(self, *global_batches: int) -> _Case:
        """Return the case of other batches."""
        return replace(self, global_batches=global_batches)

    def on(self, cluster: Cluster) -> _Case:
        """Return the case of another cluster of the same GPUs, its batches rounded up to one sample for each."""
        batches = sorted({-(-b // cluster.devices) * cluster.devices for b in self.global_batches})
        return replace(self, problem=replace(self.problem, cluster=cluster), global_batches=tuple(batches))

    def of_problem(self, problem: Problem) -> _Case:
        """Return the case of another model or other limits."""
        return _Case(problem, self.global_batches, Footprints(problem.model, problem.limits, self.footprints.poll))

    def misses(self, below: float) -> Iterator[_Miss]:
        """Yield candidates that need less than ``below``, each less than the one before.

        Only small microbatches are tried, up to the first that all devices of a stage divide: a larger one allows no
        further strategy and holds more residuals. A single microbatch is a case of its own, because no gradients
        accumulate. Memory depends on a batch only through the microbatches that it allows.
        """
        tried: set[tuple[int, int, int]] = set()
        enough: dict[tuple[int, int, bool], int] = {}
        every = all_candidates(self.problem, self.global_batches)
        plain = [candidate for candidate in every if candidate.schedule == SCHEDULE]
        for candidate in sorted(plain or every, key=lambda c: c.global_batch // c.microbatches):
            microbatch = candidate.global_batch // candidate.microbatches
            group = (candidate.global_batch, candidate.slices, candidate.microbatches > 1)
            key = (candidate.slices, microbatch, min(candidate.microbatches, candidate.slices + 1))
            if key in tried or microbatch > enough.get(group, microbatch):
                continue
            tried.add(key)
            if microbatch * candidate.slices % self.problem.cluster.devices == 0:
                enough[group] = microbatch
            found = self._least_peak(candidate, below)
            if found is not None:
                below, stage = found
                yield _Miss(below, candidate, stage)

    def fits(self) -> bool:
        """Return whether anything fits; a division of all states by all devices decides most cases at once."""
        problem, devices = self.problem, self.problem.cluster.devices
        states = problem.model.parameter_count * problem.training.state_bytes_per_parameter
        if states > devices * problem.budget_bytes:
            return False
        return next(self.misses(math.nextafter(problem.budget_bytes, math.inf)), None) is not None

    def _least_peak(self, candidate: Candidate, below: float) -> tuple[float, int] | None:
        """Least peak of the fullest stage over all boundaries, and that stage."""
        self.footprints.poll()
        microbatch = candidate.global_batch // candidate.microbatches
        footprint = self.footprints.at(self.problem, candidate.slices, microbatch, candidate.microbatches)
        return None if footprint is None else Line.of(footprint, candidate, self.footprints.poll).least_peak(below)


def explain_infeasible(engine: Engine) -> InfeasibleError:
    """Return the error for a problem in which nothing fits: the nearest miss, and the smallest changes that would.

    When the engine's poll ends it, the error tells what was known then.
    """
    problem, case = engine.problem, _Case.of(engine)
    if not all_candidates(problem, engine.global_batches):
        return InfeasibleError(
            f"none of the microbatch counts {list(problem.limits.microbatches or ())} divides a global batch of"
            f" {list(engine.global_batches)}",
            expected="a divisor",
            where="--microbatches",
            action="allow other counts, or choose another --global-batch",
        )
    misses, ended = _until_stopped(case.misses(math.inf))
    if misses:
        return _does_not_fit(case, misses[-1], ended)
    if ended:
        return InfeasibleError(
            f"{problem.model.name} does not fit {problem.cluster.mesh} {problem.hardware.name} within"
            f" {format_gib(problem.budget_bytes)}",
            action="stopped before the nearest miss was known: give it more time",
        )
    changes, _ = _until_stopped(_legal_changes(case))
    return InfeasibleError(
        f"no strategy is legal for global batches {list(engine.global_batches)} on {problem.cluster.mesh}"
        f" within the limits given" + _rules_text(problem),
        expected="a microbatch that the data-parallel ranks divide, or a tensor degree that divides the layers",
        action=_changes_text(changes) or "allow other microbatch counts, tensor degrees or stages",
    )


def _does_not_fit(case: _Case, miss: _Miss, ended: bool) -> InfeasibleError:
    """Return the error with the nearest miss; ``ended``: there was no time to find the nearest one of all."""
    problem = case.problem
    batch, microbatches, stages = miss.candidate.global_batch, miss.candidate.microbatches, miss.candidate.slices
    where = f" on stage {miss.stage + 1} of {stages}" if stages > 1 else ""
    tried = itertools.chain(_fewer_limits(case), _smaller_batch(case), _more_gpus(case))
    found, stopped = _until_stopped(itertools.islice(tried, 0 if ended else CHANGES))
    changes = [*found, _more_memory(miss)]
    if len(changes) < CHANGES and not (ended or stopped):
        shorter, stopped = _until_stopped(_shorter_seq(case))
        changes += shorter
    cut = "; stopped before all changes were tried" * (ended or stopped)
    return InfeasibleError(
        f"{problem.model.name} does not fit {problem.cluster.mesh} {problem.hardware.name}: the nearest miss needs"
        f" {format_gib(miss.peak_bytes)}{where}, budget {format_gib(problem.budget_bytes)} (global batch {batch},"
        f" {microbatches} microbatch{'es' * (microbatches > 1)}, {stages} stage{'s' * (stages > 1)})",
        action=_changes_text(changes[:CHANGES]) + cut,
    )


def _until_stopped(items: Iterator[T]) -> tuple[list[T], bool]:
    """Return the items that came before the search was to end, and whether it was."""
    found: list[T] = []
    try:
        found.extend(items)
    except Stop:
        return found, True
    return found, False


def least_peak_bytes(engine: Engine) -> float | None:
    """Return the least memory per device of any plan in the engine's space; None when none is legal."""
    misses = list(_Case.of(engine).misses(math.inf))
    return misses[-1].peak_bytes if misses else None


def _changes_text(changes: list[str]) -> str:
    return "smallest changes that would fit: " + "; ".join(changes) if changes else ""


def _fewer_limits(case: _Case) -> Iterator[str]:
    limits = case.problem.limits
    if limits != Limits() and case.of_problem(replace(case.problem, limits=Limits())).fits():
        yield f"leave out {_given_limits(limits)}"


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


def _shorter_seq(case: _Case) -> Iterator[str]:
    model = case.problem.model

    def fits(seq: int) -> bool:
        return case.of_problem(replace(case.problem, model=model.at_seq(seq))).fits()

    if model.seq > 1 and fits(1):
        shorter = next(model.seq >> n for n in range(1, model.seq.bit_length()) if fits(model.seq >> n))
        yield f"--seq {model.seq} -> {shorter}"


def _smaller_batch(case: _Case) -> Iterator[str]:
    """The largest batch below all given ones that fits: halves of the smallest, then one sample per device."""
    least = min(case.global_batches)
    smaller = (least >> n for n in range(1, least.bit_length()))
    batch = next((batch for batch in smaller if case.with_batches(batch).fits()), None)
    if batch is not None:
        yield f"global batch {least} -> {batch}"


def _legal_changes(case: _Case) -> Iterator[str]:
    """Batches near the given ones for which some strategy is legal and fits."""
    devices, most = case.problem.cluster.devices, max(case.global_batches)
    batch = -(-most // devices) * devices
    if batch not in case.global_batches and case.with_batches(batch).fits():
        yield f"global batch {most} -> {batch}"


def _more_gpus(case: _Case) -> Iterator[str]:
    """The smallest cluster that fits: more GPUs in the only node up to 8, then more nodes."""
    cluster = case.problem.cluster
    gpus = cluster.gpus_per_node
    nodes = [cluster.nodes * factor for factor in range(2, MAX_MORE_GPUS + 1) if factor & (factor - 1) == 0]
    meshes = [(1, g) for g in (2, 4, 8) if cluster.nodes == 1 and g > gpus] + [(n, max(gpus, 8)) for n in nodes]
    for mesh in meshes:
        try:
            larger = Cluster(nodes=mesh[0], gpus_per_node=mesh[1], gpu=cluster.gpu)
            if not case.on(larger).fits():
                continue
        except GalvatronError:
            continue
        yield f"more GPUs: --mesh {larger.mesh} instead of {cluster.mesh}"
        return


def _more_memory(miss: _Miss) -> str:
    return f"more memory: a budget of {format_gib(miss.peak_bytes + 0.05 * 2**30)} per GPU"
