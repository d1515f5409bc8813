"""What goes into the price of one layer, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..cluster import Cluster
from ..plan import Strategy, Training
from ..profile import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything besides the layer and its strategy that decides what the layer costs."""

    hardware: HardwareProfile
    cluster: Cluster
    stage_devices: int
    """Devices of the stage that the layer lives on."""
    microbatch: int
    """Samples of one microbatch over the whole stage."""
    microbatches: int
    """Microbatches per step; above 1 gradients are accumulated."""
    training: Training
    causal_attention: bool

    @property
    def gpus_per_node(self) -> int:
        """Devices of the stage that share a node."""
        return min(self.cluster.gpus_per_node, self.stage_devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one layer under one strategy costs one device: seconds and bytes."""

    forward_s: float
    """One microbatch, exposed collectives included."""
    backward_s: float
    """One microbatch, recomputation and exposed collectives included."""
    sync_s: float
    """Once per step: gradient reduction that backward compute does not hide, parameter gather of zero 1 and 2."""
    update_s: float
    """Once per step: the optimizer update."""
    state_bytes: float
    """Parameters, gradients and optimizer state: persistent, adds up over the layers of a stage."""
    residual_bytes: float
    """Per in-flight microbatch; adds up over the layers of a stage."""
    live_bytes: float
    """Only while this layer's backward pass runs: a stage needs the largest of its layers."""
    times: Mapping[str, float]
    """``forward_s + backward_s`` by category: compute, recompute, tensor_communication, data_communication."""
    memory: Mapping[str, float]
    """All bytes by category: parameters, gradients, optimizer (the state), residuals, live."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How a strategy divides one microbatch: what every array size is multiplied by."""

    microbatch: int
    dp: int
    tensor: float
    """Share of an array that carries a tensor-parallel class: 1 / tp."""
    sequence: float
    """Share of an array of the stream: 1 / tp with sequence parallelism, else 1."""

    @classmethod
    def of(cls, strategy: Strategy, microbatch: int) -> Shares:
        """Return the shares of ``strategy`` for ``microbatch`` samples over all its devices."""
        return cls(microbatch, strategy.dp, 1 / strategy.tp, 1 / strategy.tp if strategy.sp else 1.0)
