"""The door: analysis, search and runtime for a user's model, in one page.

trainer = auto_shard(lambda: Llama(config, rngs=nnx.Rngs(0)))
for batch in data:
    loss = trainer.step(batch).loss
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import optax
from flax import nnx

from ._sharded_model import ShardedModel
from .analysis import Loss
from .cluster import Cluster
from .errors import DeviceMismatchError, UnsupportedError
from .hardware import load_hardware
from .plan import Plan, check_devices, check_plan, load_plan
from .profile import HardwareProfile


def auto_shard(
    model: nnx.Module | Callable[[], nnx.Module],
    *,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    plan: Plan | str | Path | None = None,
    cluster: Cluster | None = None,
    hardware: HardwareProfile | None = None,
) -> ShardedModel:
    """Spread a model over the visible devices and train it.

    Args:
        model: An unmodified ``flax.nnx.Module``; or a function that builds one, which runs under ``jax.jit`` with
            sharded results, so that no device ever holds the whole model.
        loss: ``loss(model, batch)``, the mean over the batch; next-token cross-entropy by default
            (``models.next_token_loss``).
        optimizer: Any optax transformation; ``optax.adamw(3e-4)`` by default.
        plan: How to spread it, or the file that says so; searched for when the first batch comes by default.
        cluster: The devices as nodes and GPUs; what JAX sees by default.
        hardware: What the search prices with; the bundled profile of the cluster's GPU by default.

    Raises:
        DocumentError: the plan's file is not a valid plan.
        DeviceMismatchError: the plan or the cluster needs another number of devices than JAX sees.
        UnsupportedError: the plan has several stages, or JAX runs in several processes (both come in a later version).

    Gradients of several microbatches are reduced in every microbatch by this version's step, not once at the end as the
    estimate assumes for zero 0 and 1: with slow links between data-parallel ranks such a step is slower than predicted.
    """
    from .models import next_token_loss  # the default loss alone needs it

    if isinstance(plan, (str, Path)):
        plan = load_plan(plan)
    cluster = cluster or (plan.cluster if plan else visible_cluster())
    if plan is not None:
        check_plan(plan)
        check_devices(plan, jax.device_count())
    _check_runnable(cluster, plan)
    return ShardedModel(
        model,
        loss=loss or next_token_loss,
        optimizer=optimizer or optax.adamw(3e-4),
        plan=plan,
        cluster=cluster,
        hardware=hardware,
    )


def visible_cluster() -> Cluster:
    """Return what JAX sees as a cluster: one node per process, its devices, and the bundled kind that they are.

    Raises:
        DocumentNotFoundError: no bundled hardware is of this kind; pass ``cluster`` and ``hardware``.
    """
    kind = load_hardware(jax.devices()[0].device_kind).name
    return Cluster(nodes=jax.process_count(), gpus_per_node=jax.local_device_count(), gpu=kind)


def _check_runnable(cluster: Cluster, plan: Plan | None) -> None:
    if cluster.devices != jax.device_count():
        raise DeviceMismatchError(
            f"the cluster {cluster.mesh} has {cluster.devices} devices, {jax.device_count()} are visible",
            expected="equal numbers",
            where="cluster",
            action="leave it out to use all visible devices",
        )
    if jax.process_count() > 1:
        raise UnsupportedError(
            f"JAX runs in {jax.process_count()} processes",
            expected="one process in this version",
            where="auto_shard",
            action="run on the GPUs of one machine; several processes come in a later version",
        )
    if plan is not None and len(plan.stages) > 1:
        raise UnsupportedError(
            f"the plan has {len(plan.stages)} pipeline stages",
            expected="one stage in this version",
            where="plan",
            action="search with --no-pp; pipelined execution comes in a later version",
        )
