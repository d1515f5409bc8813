"""The peer's reference plans as plans of ours, and its settings as problems of ours."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from galvatron_jax.cluster import Cluster, parse_cluster
from galvatron_jax.cost import estimate_plan
from galvatron_jax.models import load_model_profile
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import HardwareProfile, LayerRun, ModelProfile
from galvatron_jax.search._galvatron import import_galvatron
from galvatron_jax.search._rules import Rule, forbid, pin

FOLDER = Path(__file__).parent / "galvatron"
GIB = 2**30
SET_ASIDE_ABOVE_GB, SET_ASIDE = 20, 0.2
"""The peer cuts a limit above 20 GB by 20 % (README.md of the folder)."""


class Reference(msgspec.Struct, frozen=True):
    """One row of the peer's reference results."""

    setting: str
    mesh: str
    memory_gb: int
    global_batch: int
    microbatches: int | None
    """None: all counts were searched."""
    layers: int
    pipeline: bool
    search_cpu_s: float
    samples_per_s: float
    """By the peer's own cost model."""
    plan: str

    @property
    def cluster(self) -> Cluster:
        """The cluster."""
        return parse_cluster(self.mesh)

    @property
    def usable_bytes(self) -> int:
        """What the peer's search may use of a GPU."""
        share = 1 - SET_ASIDE if self.memory_gb > SET_ASIDE_ABOVE_GB else 1.0
        return int(share * self.memory_gb * GIB)


def references() -> list[Reference]:
    """Return all rows."""
    return msgspec.json.decode((FOLDER / "reference_plans.json").read_bytes(), type=list[Reference])


def like_for_like() -> list[Rule]:
    """Return the rules that leave about the peer's space: sharded data parallelism, tp with sp or Ulysses up to 8.

    With several microbatches its ZeRO-2 keeps whole gradients and reduces them once, which is our ZeRO-1.
    """
    return [
        forbid("dp>1, zero=0"),
        forbid("tp>1, sp=no"),
        forbid("hsdp"),
        forbid("remat=dots"),
        pin("tp<=8, ulysses<=8"),
    ]


def peer_problem(row: Reference) -> tuple[ModelProfile, HardwareProfile]:
    """Return the model and hardware of a row, from the peer's tables."""
    found = import_galvatron(FOLDER, row.cluster)
    model = found.apply(load_model_profile("llama2-7b"))
    runs = tuple(LayerRun(kind=run.kind, count=row.layers if run.count > 1 else run.count) for run in model.layers)
    return msgspec.structs.replace(model, layers=runs), found.hardware


def peer_plan(row: Reference, model: ModelProfile, hardware: HardwareProfile) -> Plan:
    """Return the peer's plan, priced by our cost model."""
    match = re.fullmatch(r"pp(\d+)(?: m(\d+))? vtp(\d+)(U?)( z3)?: (.*)", row.plan)
    assert match is not None
    stages, cluster = int(match[1]), row.cluster
    devices = cluster.devices // stages
    microbatches = int(match[2] or row.microbatches or 0)
    degree, ulysses = int(match[3]), bool(match[4])
    default = 2 if microbatches == 1 else 1
    ends = _strategy(devices, degree, ulysses=ulysses, zero=3 if match[5] else default, remat=False)
    block = max(model.layers, key=lambda run: run.count).kind
    layers = [
        PlanRun(
            kind=block,
            count=1,
            strategy=_strategy(devices, int(tp), zero=3 if "z3" in words else default, remat="ckpt" in words),
        )
        for count, tp, words in re.findall(r"(\d+)x\(tp(\d+)([a-z0-9 ]*)\)", match[6])
        for _ in range(int(count))
    ]
    assert len(layers) == row.layers
    share = row.layers // stages
    held = [layers[s * share : (s + 1) * share] for s in range(stages)]
    held[0].insert(0, PlanRun(kind=model.layers[0].kind, count=1, strategy=ends))
    held[-1].append(PlanRun(kind=model.layers[-1].kind, count=1, strategy=ends))
    plan = Plan(
        model=model_reference(model),
        cluster=cluster,
        global_batch=row.global_batch,
        microbatches=microbatches,
        stages=tuple(Stage(devices=devices, runs=tuple(runs)) for runs in held),
    )
    return msgspec.structs.replace(plan, predicted=estimate_plan(plan, model, hardware))


def _strategy(devices: int, degree: int, *, zero: int, remat: bool, ulysses: bool = False) -> Strategy:
    dp = devices // degree
    ranks = dp * (degree if ulysses else 1)
    return Strategy(
        tp=1 if ulysses else degree,
        sp=degree > 1 and not ulysses,
        ulysses=degree if ulysses else 1,
        dp=dp,
        zero=zero if ranks > 1 else 0,
        remat="full" if remat else "none",
    )
