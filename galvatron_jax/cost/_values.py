"""What goes into the price of one layer, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..cluster import Cluster
from ..plan import Strategy, Training
from ..profile import HardwareProfile, LayerKind


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
    slices: int = 1
    """Slices of the device list; with one, every layer stands on the stage that holds its tied parameters."""
    straight: int = 0
    """Repeated layers of the stage, if it holds no loop (``_straight``); 0: layers are priced as those of a loop."""

    @property
    def gpus_per_node(self) -> int:
        """Devices of the stage that share a node."""
        return min(self.cluster.gpus_per_node, self.stage_devices)


Amount: TypeAlias = float | npt.NDArray[np.float64]
"""Of one layer, or of a layer under many strategies."""


class Straight(NamedTuple):
    """What a layer takes differently on a stage that holds no loop (``_straight``), in bytes."""

    gradients: Amount = 0.0
    """Less."""
    live: Amount = 0.0
    """Less."""
    left: Amount = 0.0
    """More gradients, if the layer is not the last of the backward pass."""

    def state_change(self, layers: int) -> Amount:
        """Return by how much the states of each of ``layers`` repeated layers differ, the last one's share taken."""
        return self.left * (layers - 1) / layers - self.gradients


class LayerBytes(NamedTuple):
    """Bytes of a layer on one device, as one of a loop (``LayerCost``)."""

    state: Amount
    residual: Amount
    live: Amount
    straight: Straight

    def on_stage(self, straight: int) -> tuple[Amount, Amount, Amount]:
        """Return (state, residual, live) on a stage with so many repeated layers and no loop; 0: on any other."""
        if not straight:
            return self.state, self.residual, self.live
        state = self.state + self.straight.state_change(straight)
        return state, self.residual, np.maximum(0.0, self.live - self.straight.live)


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
    straight: Straight
    """What of these bytes a stage without a loop changes; already done where ``Setting.straight`` says so."""


class Carried(NamedTuple):
    """Which dimensions of an array some strategy may shard over the trailing mesh axes."""

    tensor: tuple[str, ...]
    """Classes of the kind's best candidate, and those that they spill into."""
    sequence: bool
    """``seq``."""
    heads: bool
    """Heads of activations, which Ulysses shards inside attention."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How a strategy divides one microbatch of a layer kind: what every array size is multiplied by."""

    microbatch: int
    dp: int
    tp: int = 1
    sp: bool = False
    ulysses: int = 1
    shards: Mapping[str, int] = field(default_factory=dict)
    """Tensor shards of each class that has several."""

    @classmethod
    def of(cls, kind: LayerKind, strategy: Strategy, microbatch: int) -> Shares:
        """Return the shares of ``strategy`` for ``microbatch`` samples over all its devices."""
        candidate = kind.best_candidate
        shards = candidate.shards(strategy.tp, kind.classes) if candidate and strategy.tp > 1 else {}
        return cls(microbatch, strategy.dp, strategy.tp, strategy.sp, strategy.ulysses, shards)

    def share(self, carried: Carried) -> float:
        """Return the share of an array that one device holds, batch apart (a mesh axis shards one dimension only)."""
        if self.tp > 1 and carried.tensor:
            return 1 / min(self.tp, math.prod(self.shards.get(name, 1) for name in carried.tensor))
        if carried.sequence and self.sp:
            return 1 / self.tp
        if carried.sequence or carried.heads:
            return 1 / self.ulysses
        return 1.0
