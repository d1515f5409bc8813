"""The door: analysis, search and runtime for a user's model, in one page.

trainer = auto_shard(lambda: Llama(config, rngs=nnx.Rngs(0)))
for batch in data:
    loss = trainer.step(batch).loss
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax

from ._sharded_model import ShardedModel
from ._weights import Weights
from .analysis import Loss
from .cluster import Cluster
from .distributed import processes_per_node
from .errors import DeviceMismatchError
from .hardware import load_hardware
from .plan import Plan, check_devices, check_plan, load_plan
from .profile import HardwareProfile
from .runtime import LinkName


def auto_shard(
    model: Any,
    *,
    loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    plan: Plan | str | Path | None = None,
    cluster: Cluster | None = None,
    hardware: HardwareProfile | None = None,
    link: LinkName = "union",
    layers: str | None = None,
    float32_reductions: bool = False,
    weights: Weights | None = None,
) -> ShardedModel:
    """Spread a model over the visible devices and train it.

    Args:
        model: An unmodified ``flax.nnx.Module``; a ``flax.linen.Module`` (``module.bind(variables)`` brings values,
            ``module.bind({}, rngs=...)`` seeds); a pytree of parameters; or a function without arguments that builds
            one of them, which runs under ``jax.jit`` with sharded results: no device ever holds the whole model.
        loss: ``loss(model, batch)``, the mean over the batch, or a tuple that begins with it (the rest is left out);
            a Linen module arrives bound, a pytree as it is. Next-token cross-entropy by default
            (``models.next_token_loss``).
        optimizer: Any optax transformation; ``optax.adamw(3e-4)`` by default.
        plan: How to spread it, or the file that says so; searched for when the first batch comes by default.
        cluster: The devices as nodes and GPUs; what JAX sees by default.
        hardware: What the search prices with; the bundled profile of the cluster's GPU by default.
        link: What carries values between pipeline stages in different processes: ``"union"``, a collective permute over
            both stages' devices (CPU and GPU); or ``"device_put"``, JAX's own transfers (GPU; not tried yet).
        layers: The repeated blocks as a path, where the analysis should not look for them: ``"model.layers.*"``.
        float32_reductions: Reduce gradients over data-parallel ranks in the dtype of the parameters, not in the dtype
            in which the model computes them: twice the bytes for bf16, and no rounding of sums over many ranks.
        weights: First values of the parameters by dotted path (``models.huggingface.read_llama``): arrays, or
            anything with a shape that gives a part for ``[slice, ...]``. Each device is given its own part; what the
            model would begin with is not made.

    Raises:
        DocumentError: the plan's file is not a valid plan.
        DeviceMismatchError: the plan or the cluster needs another number of devices than JAX sees.

    In several processes (join them first: ``galvatron_jax.distributed``) all call everything together, with the same
    arguments; each gives ``step`` the global batch or only its own rows of it (``ShardedModel.process_rows``).

    Under zero 0 and 1 gradients of several microbatches are reduced once a step, of a pipelined plan too.
    """
    from .models import next_token_loss  # the default loss alone needs it

    if isinstance(plan, (str, Path)):
        plan = load_plan(plan)
    cluster = cluster or (plan.cluster if plan else visible_cluster())
    if plan is not None:
        check_plan(plan)
        check_devices(plan, jax.device_count())
    _check_cluster(cluster)
    return ShardedModel(
        model,
        loss=loss or next_token_loss,
        optimizer=optimizer or optax.adamw(3e-4),
        plan=plan,
        cluster=cluster,
        hardware=hardware,
        link=link,
        layers=layers,
        float32_reductions=float32_reductions,
        weights=weights,
    )


def visible_cluster() -> Cluster:
    """Return what JAX sees as a cluster: its nodes, their devices, and the bundled kind that these are.

    A process is a node, unless ``distributed.initialize`` found several on each.

    Raises:
        DocumentNotFoundError: no bundled hardware is of this kind; pass ``cluster`` and ``hardware``.
    """
    kind = load_hardware(jax.devices()[0].device_kind).name
    nodes = jax.process_count() // processes_per_node()
    return Cluster(nodes=nodes, gpus_per_node=jax.device_count() // nodes, gpu=kind)


def _check_cluster(cluster: Cluster) -> None:
    if cluster.devices != jax.device_count():
        raise DeviceMismatchError(
            f"the cluster {cluster.mesh} has {cluster.devices} devices, {jax.device_count()} are visible",
            expected="equal numbers",
            where="cluster",
            action="leave it out to use all visible devices",
        )
