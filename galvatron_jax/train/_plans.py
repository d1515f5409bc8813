"""Which plan a run goes by: the given one, the one it had, or a new one; and what changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from .._auto_shard import visible_cluster
from .._document import load
from ..cluster import Cluster, parse_cluster
from ..errors import DeviceMismatchError, DocumentNotFoundError
from ..hardware import load_hardware
from ..plan import Plan, load_plan
from ..profile import HardwareProfile
from ._config import RunSettings

PLAN_NAME = "plan.json"
HARDWARE_NAME = "hardware.json"
"""Written after an out-of-memory error: what the search must leave free."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What a run goes by."""

    plan: Plan | None
    """None: search one."""
    cluster: Cluster
    notes: tuple[str, ...] = ()
    """What the user should know about how it came."""


def choose_plan(
    settings: RunSettings,
    folder: Path,
    *,
    given: Plan | None,
    global_batch: int | None,
    allow_mismatch: bool = False,
) -> Choice:
    """Return the plan to run on the visible devices.

    The given plan (or ``settings.plan``) must be for this cluster, unless ``settings.mesh`` says that the cluster
    changed: then the run plans again. Without one, a resumed run keeps the plan in its folder while the cluster and the
    batch are the same.

    Args:
        settings: The [run] section.
        folder: The run's folder.
        given: A plan given in Python.
        global_batch: Samples per step, when it is decided.
        allow_mismatch: Run a plan for another mesh or kind of GPU all the same, on equally many devices.

    Raises:
        DocumentError: a plan file is damaged.
        DeviceMismatchError: the plan is for other devices.
    """
    cluster = _cluster(settings)
    if cluster.devices != jax.device_count():
        raise DeviceMismatchError(
            f"got {cluster.mesh} ({cluster.devices} devices), {jax.device_count()} are visible",
            expected="equal numbers",
            where="--mesh",
            action="leave it out to use all visible devices",
        )
    where = settings.plan or "plan"
    plan = given or (load_plan(settings.plan) if settings.plan else None)
    if plan is not None:
        differences = _differences(plan.cluster, cluster)
        if not differences or (allow_mismatch and plan.cluster.devices == cluster.devices):
            return Choice(plan, plan.cluster)
        if settings.mesh is None:
            raise _mismatch(plan, cluster, differences, where)
        return Choice(
            None, cluster, (f"{where} is for {_text(plan.cluster)}, this is {_text(cluster)}: planning again",)
        )
    return _kept(folder, cluster, global_batch)


def learnt_hardware(folder: Path, gpu: str) -> HardwareProfile:
    """Return what the run learnt about the devices' memory, else the bundled or named profile."""
    path = folder / HARDWARE_NAME
    return load(path, HardwareProfile) if path.exists() else load_hardware(gpu)


def _kept(folder: Path, cluster: Cluster, global_batch: int | None) -> Choice:
    try:
        plan = load_plan(folder / PLAN_NAME)
    except DocumentNotFoundError:
        return Choice(None, cluster)
    changes = _differences(plan.cluster, cluster)
    if global_batch is not None and plan.global_batch != global_batch:
        changes.append(f"global batch {plan.global_batch}, now {global_batch}")
    if not changes:
        return Choice(plan, cluster)
    return Choice(None, cluster, (f"the run's plan was for {'; '.join(changes)}: planning again",))


def describe_change(before: Plan, after: Plan) -> str:
    """Say in one line what differs between the plan that a checkpoint was made under and the present one."""
    if before == after:
        return ""
    old, new = plan_text(before), plan_text(after)
    return f"checkpoint made under {old}; goes on under {new}" if old != new else "goes on under another plan"


def plan_text(plan: Plan) -> str:
    """Say in one line what a plan is."""
    runs = [f"{run.count} {run.kind} {run.strategy}" for stage in plan.stages for run in stage.runs]
    batches = f"{plan.microbatches} microbatch{'es' * (plan.microbatches > 1)}"
    stages = f"{len(plan.stages)} stage{'s' * (len(plan.stages) > 1)}"
    return f"{plan.cluster.mesh} {plan.cluster.gpu}, {stages}, {batches} [{'; '.join(runs)}]"


def _cluster(settings: RunSettings) -> Cluster:
    if settings.mesh is None and settings.gpu is None:
        return visible_cluster()
    kind = settings.gpu or load_hardware(jax.devices()[0].device_kind).name
    if settings.mesh is None:
        return Cluster(nodes=jax.process_count(), gpus_per_node=jax.local_device_count(), gpu=kind)
    return parse_cluster(settings.mesh, gpu=kind)


def _differences(plan: Cluster, visible: Cluster) -> list[str]:
    found = [f"mesh {plan.mesh}, now {visible.mesh}"] if plan.mesh != visible.mesh else []
    return found + ([f"GPU {plan.gpu}, now {visible.gpu}"] if plan.gpu != visible.gpu else [])


def _mismatch(plan: Plan, cluster: Cluster, differences: list[str], where: str) -> DeviceMismatchError:
    same = plan.cluster.devices == cluster.devices
    return DeviceMismatchError(
        f"the plan is for {_text(plan.cluster)}, the devices are {_text(cluster)} ({'; '.join(differences)})",
        expected="the same mesh and kind of GPU",
        where=where,
        action=(
            f"search again: python -m galvatron_jax.search --mesh {cluster.mesh} --gpu {cluster.gpu} --model"
            f" {plan.model.name}; or let the run plan again: --mesh {cluster.mesh}" + "; or add --allow-mismatch" * same
        ),
    )


def _text(cluster: Cluster) -> str:
    return f"{cluster.mesh} {cluster.gpu} ({cluster.devices} devices)"
