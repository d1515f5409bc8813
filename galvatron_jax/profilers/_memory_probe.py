"""Probes: small programs whose peak the compiler tells, and what the profiler and its compiling process say of them.

A probe is a whole training step of the user's own model with few layers: everything before and after them, ``layers``
of the probed kind under the probed strategy, one of each other repeated kind. Its plan has one stage over all devices
of the cluster, so the runtime compiles it as any other plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import msgspec

from .._document import Bytes, Count, Document, Value
from ..cluster import Cluster
from ..plan import Plan, PlanRun, Stage, Training, model_reference
from ..profile import LayerKind, LayerRun, ModelProfile
from ..strategy import Strategy, strategy_violations

WORKER = "verify._memory_worker"
"""The module, in this package, that compiles probes: a process of its own, above this room."""


class MemoryProbe(Value, frozen=True, kw_only=True, omit_defaults=True):
    """One program."""

    layer: str = ""
    """The probed kind; empty: none, the model without its repeated layers."""
    layers: Bytes
    """How many of it."""
    strategy: Strategy
    samples: Count
    """Of one microbatch, on one device."""
    microbatches: Count = 1

    @property
    def text(self) -> str:
        """In words."""
        what = f"{self.layers} of {self.layer}" if self.layers else "no layers"
        more = f", {self.microbatches} microbatches" * (self.microbatches > 1)
        return f"{what}, {self.strategy}, {self.samples} sample{'s' * (self.samples > 1)}{more}"


class MemoryReading(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What the compiler said of a probe."""

    probe: MemoryProbe
    peak_bytes: Bytes = 0
    rematerialised: Bytes = 0
    """Operations that the compiler runs twice on its own: then the peak is that of another plan."""
    problem: str = ""
    """Why there is no peak."""
    seconds: float = 0.0


class MemoryLog(Document, frozen=True, kw_only=True):
    """The partial file: every reading so far, with what they belong to."""

    DOCUMENT: ClassVar[str] = "file of partial memory readings"

    model: str
    """Name, structure, sequence length and dtype."""
    cluster: Cluster
    jax_version: str
    readings: tuple[MemoryReading, ...]


class ProbeSession(Value, frozen=True, kw_only=True):
    """What all probes of one process have in common."""

    model: str
    """A preset, or ``MODULE:FUNCTION``."""
    seq: Count | None = None
    dtype: str | None = None
    fused_attention: bool = False
    """A preset asks for cuDNN's attention, if cuDNN is installed."""
    cluster: Cluster
    state_bytes_per_parameter: Bytes


def repeated_kinds(model: ModelProfile) -> tuple[str, ...]:
    """Return the kinds whose layers stand in a row: those that a probe can have fewer of."""
    return tuple(dict.fromkeys(run.kind for run in model.layers if run.count > 1))


def kept_layers(model: ModelProfile, probe: MemoryProbe) -> dict[str, int]:
    """Return how many layers of each repeated kind a run of it has in a probe."""
    others = 1 if probe.layer else 0
    return {kind: probe.layers if kind == probe.layer else others for kind in repeated_kinds(model)}


def probe_layers(model: ModelProfile, probe: MemoryProbe) -> Iterator[tuple[LayerRun, Strategy]]:
    """Yield the layers of a probe, in order, and their strategies.

    All but the probed layers have the same spread, where it is legal for them, and nothing recomputed.
    """
    kept = kept_layers(model, probe)
    for run in model.layers:
        count = min(run.count, kept.get(run.kind, run.count))
        if count:
            strategy = probe.strategy if run.kind == probe.layer else _beside(model.kind(run.kind), probe)
            yield LayerRun(kind=run.kind, count=count), strategy


def short_profile(model: ModelProfile, probe: MemoryProbe) -> ModelProfile:
    """Return the profile of the model that a probe compiles."""
    return msgspec.structs.replace(model, layers=tuple(run for run, _ in probe_layers(model, probe)))


def without_remat(strategy: Strategy) -> Strategy:
    """Return the same spread with nothing recomputed."""
    return msgspec.structs.replace(strategy, remat="none")


def _beside(kind: LayerKind, probe: MemoryProbe) -> Strategy:
    """Return the strategy of a layer of ``kind`` that is not probed."""
    same = without_remat(probe.strategy)
    if not strategy_violations(kind, same, probe.samples * same.dp):
        return same
    return Strategy(dp=same.inner * same.dp, zero=same.zero)


def probe_plan(model: ModelProfile, probe: MemoryProbe, session: ProbeSession) -> Plan:
    """Return the plan of a probe of ``model``, the whole model's profile."""
    microbatch = probe.samples * probe.strategy.dp
    runs = [PlanRun(kind=run.kind, count=run.count, strategy=s) for run, s in probe_layers(model, probe)]
    return Plan(
        model=model_reference(model),
        cluster=session.cluster,
        training=Training(state_bytes_per_parameter=session.state_bytes_per_parameter),
        global_batch=microbatch * probe.microbatches,
        microbatches=probe.microbatches,
        stages=(Stage(devices=session.cluster.devices, runs=tuple(runs)),),
    )
