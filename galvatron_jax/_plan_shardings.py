"""A plan as shardings for the user's own ``jax.jit``: where each parameter lives, without the rest of the runtime."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from .analysis import Analysis, Loss, abstract_batch, analyse_model
from .plan import Plan, check_devices, check_plan, load_plan
from .runtime import Role, StageModel, copies_grouped_samples, plan_stages, stage_mesh


def plan_shardings(
    plan: Plan | str | Path,
    model: Any,
    batch: Any,
    *,
    loss: Loss | None = None,
    devices: Sequence[jax.Device] | None = None,
    role: Role = "parameter",
) -> Any:
    """Return a ``NamedSharding`` for every parameter, in the structure of the user's own parameters.

    For ``in_shardings`` of a hand-written step, ``jax.device_put`` or a checkpoint. Of an NNX module the structure is
    that of ``nnx.split(model, nnx.Param, ...)``; of a stack of layers (``nnx.scan``) whose rows the plan spreads
    differently, the sharding is that of the first row. Parameters of a pipelined plan live on the mesh of the first
    stage that reads them.

    A fused projection ``[embed, 3 * heads * head_dim]`` under tensor parallelism is stored ``[embed, 3, heads *
    head_dim]`` by the runtime, heads over the tensor axes; a sharding of the user's shape cannot say that. Those axes
    are on another dimension here (as many bytes on each device, but XLA gathers the array in your step), with a
    warning that names the parameters.

    XLA's partitioner (jax 0.10.2) makes wrong gradients of grouped and depthwise convolutions whose samples tensor
    ranks copy (docs/design/0099). The runtime goes around it; a step of your own does not, so there is a warning.

    Args:
        plan: The plan or its file.
        model: As for ``auto_shard``; only shapes are needed.
        batch: A pytree of arrays or ``jax.ShapeDtypeStruct`` whose dimension 0 is the batch, of any size.
        loss: As for ``auto_shard``.
        devices: All devices, node-major; those that JAX sees by default.
        role: Of the parameters, their gradients, or their optimizer moments (the plan's zero level tells them apart).

    Raises:
        DocumentError: the plan's file is not a valid plan.
        DeviceMismatchError: the plan needs another number of devices.
        PlanError: the plan does not belong to the model.
        AnalysisError: the model or loss cannot be traced.
    """
    from .models import next_token_loss  # the default loss alone needs it

    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    devices = jax.devices() if devices is None else devices
    check_devices(plan, len(devices))
    spec = abstract_batch(batch, plan.microbatch_size)
    analysis = analyse_model(model, loss or next_token_loss, spec, name=plan.model.name)
    check_plan(plan, analysis.profile)
    stages = _stages(analysis, plan, devices)
    for text in (*_moved(analysis, stages, role), *_grouped(stages)):
        warnings.warn(text, UserWarning, stacklevel=2)
    return _as_parameters(analysis, _places(stages, role))


def _stages(analysis: Analysis, plan: Plan, devices: Sequence[jax.Device]) -> tuple[StageModel, ...]:
    size = plan.stages[0].devices
    meshes = [stage_mesh(plan.cluster, devices[k * size : (k + 1) * size]) for k in range(plan.slices)]
    return plan_stages(analysis, plan, [meshes[k % plan.slices] for k in range(len(plan.stages))])


def _places(stages: Sequence[StageModel], role: Role) -> dict[int, NamedSharding]:
    """Return the sharding of each row of the trace."""
    places: dict[int, NamedSharding] = {}
    for slot in (slot for stage in stages for slot in stage.slots):
        for leaf in slot.leaves:
            places.setdefault(leaf, slot.user_sharding(role))
    return places


def _moved(analysis: Analysis, stages: Sequence[StageModel], role: Role) -> Iterator[str]:
    """Yield a warning where the runtime stores parameters in a shape of its own."""
    slots = [slot for stage in stages for slot in stage.slots if slot.is_moved(role)]
    paths = sorted({analysis.trace.paths[leaf] for slot in slots for leaf in slot.leaves})
    if paths:
        yield (
            f"{', '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}: {len(paths)} fused parameters are sharded by"
            " class in the runtime, in a shape of its own; a sharding of your shape cannot say that, so a step under"
            " these gathers them (ShardedModel.step does not)"
        )


def _grouped(stages: Sequence[StageModel]) -> Iterator[str]:
    """Yield a warning for each kind of layer of which XLA makes wrong gradients."""
    layouts = [slot.layout for stage in stages for slot in stage.slots if slot.layout]
    for name in sorted({layout.kind.profile.name for layout in layouts if copies_grouped_samples(layout)}):
        yield (
            f"{name}: grouped convolutions under tensor and data parallelism; in a step of your own XLA makes wrong"
            " gradients of their kernels (docs/design/0099). Use ShardedModel.step, or tp 1 for these layers"
        )


def _as_parameters(analysis: Analysis, places: dict[int, NamedSharding]) -> Any:
    """Return shardings of rows in the structure of the user's parameters, of a stack that of its first row."""
    trace = analysis.trace
    by_row = jax.tree.unflatten(jax.tree.structure(trace.parameters), [places[i] for i in range(len(places))])
    structure: Any = jax.tree.structure(trace.model.parameters)
    stacks = trace.rows.stacks
    parts = enumerate(structure.flatten_up_to(by_row))
    return jax.tree.unflatten(
        structure, [_of_stack(part, stacks[i].axis) if i in stacks else part for i, part in parts]
    )


def _of_stack(rows: Sequence[NamedSharding], axis: int) -> NamedSharding:
    """Return the sharding of a stack of layers from those of its rows: the layers' dimension is whole."""
    entries = list(rows[0].spec)
    entries += [None] * (axis - len(entries))
    entries.insert(axis, None)
    return NamedSharding(rows[0].mesh, PartitionSpec(*entries))
