"""Estimates: what a layer, a stage and a plan cost in seconds and bytes. Never imports jax; no clock runs here."""

from ._collectives import Group as Group
from ._collectives import collective_seconds as collective_seconds
from ._collectives import device_group as device_group
from ._kind import is_fused as is_fused
from ._layer import estimate_layer as estimate_layer
from ._memory import memory_budget as memory_budget
from ._memory import stage_memory as stage_memory
from ._pipeline import StageTime as StageTime
from ._pipeline import Timeline as Timeline
from ._pipeline import simulate as simulate
from ._plan_collectives import PlannedCollective as PlannedCollective
from ._plan_collectives import plan_collectives as plan_collectives
from ._plan_cost import boundary_bytes as boundary_bytes
from ._plan_cost import estimate_plan as estimate_plan
from ._plan_cost import sample_flops as sample_flops
from ._plan_cost import stage_setting as stage_setting
from ._step_collectives import step_collectives as step_collectives
from ._stream import estimate_relayout as estimate_relayout
from ._stream import estimate_transfer as estimate_transfer
from ._stream import relayout_steps as relayout_steps
from ._stream import stream_arrays as stream_arrays
from ._stream import stream_sizes as stream_sizes
from ._stream import wire_strategy as wire_strategy
from ._values import LayerCost as LayerCost
from ._values import Setting as Setting
