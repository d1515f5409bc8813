"""Bytes of one layer on one device.

State (persistent; w elements after tensor parallelism; /dp where zero shards and a dimension divides, plan.zero_dim)

    parameters   w * storage itemsize                        / dp from zero 3
    gradients    w * storage itemsize                        / dp from zero 2; from zero 1 without accumulation
    optimizer    w * training.state_bytes_per_parameter      / dp from zero 1

Gradients live in the storage dtype, with or without accumulation: the compiled step allocates them for all layers at
once (the output of the scan over layers, or the accumulator of the scan over microbatches). With one microbatch there
is no accumulator, and under zero 1 each device keeps of a reduced gradient only what it updates: programs of zero 1 and
zero 2 have the same peak (benchmarks/memory_h100_aot_2026-11-22.md).

Residuals (per in-flight microbatch): the stream input, and without remat all that forward keeps for backward.

Live (only while the layer's backward pass runs, so a stage needs the largest of its layers)

    workspace
    + what sp gathers in the backward pass      stream and cotangents, whole along the sequence: operands of weight
                                                gradients, which the compiler computes last, so all of them are alive
    + residuals                                 with full remat: they are computed again just before
    + copies of the weights in the compute dtype: zero 3: gathered, twice (this layer's and the prefetched next one's);
      otherwise once, of those whose compute dtype is not their storage dtype
    + the layer's whole gradient in the compute dtype, before it is reduced or added to the accumulator

Checked in tests/cost/test_memory.py against peaks of XLA:GPU programs for 16 H100 (12 plans). Not included: what no
array sees (CUDA context, NCCL, allocator; ``HardwareProfile.reserved_bytes``).

States, residuals and the live part are added although they do not peak at one instant: gradients grow while residuals
go. Programs that scan over layers allocate both for the whole backward pass, so the sum is what they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from ..plan import Strategy, Training
from ..profile import HardwareProfile
from ._kind import KindSums, Weights
from ._values import LayerCost, Shares

STATE = ("parameters", "gradients", "optimizer")
"""Categories that make up ``LayerCost.state_bytes``."""


def layer_memory(
    sums: KindSums, weights: Weights, strategy: Strategy, shares: Shares, training: Training, *, accumulates: bool
) -> dict[str, float]:
    """Return the bytes of one layer by category (residuals: of one microbatch).

    Args:
        sums: The layer kind.
        weights: Its parameters under the strategy's (tp, dp).
        strategy: The strategy.
        shares: What the strategy leaves on one device.
        training: What the optimizer keeps.
        accumulates: More than one microbatch per step.
    """
    zero = strategy.zero
    residuals = sums.residuals.at(shares)
    live = sums.workspace.at(shares) + _weight_copies(weights, zero) + weights.replicated.computed
    live += sums.gathered.at(shares) if strategy.sp else 0.0
    return {
        "parameters": weights.held(zero >= 3).stored,
        "gradients": weights.held(zero >= (2 if accumulates else 1)).stored,
        "optimizer": weights.held(zero >= 1).elements * training.state_bytes_per_parameter,
        "residuals": sums.stream_input.at(shares) + (residuals if strategy.remat == "none" else 0.0),
        "live": live + (residuals if strategy.remat == "full" else 0.0),
    }


def memory_budget(hardware: HardwareProfile) -> int:
    """Return the bytes that arrays may use on one device: its memory less what driver, NCCL and allocator take."""
    return hardware.memory_bytes - hardware.reserved_bytes


def stage_memory(layers: Sequence[tuple[LayerCost, int]], in_flight: int, boundary_bytes: float) -> dict[str, int]:
    """Return the peak bytes of one stage by category, each rounded up; the peak is their sum.

    Args:
        layers: (cost, count) of the stage's layers.
        in_flight: Microbatches whose residuals are held at once.
        boundary_bytes: Buffers of messages to and from the neighbouring stages.
    """
    memory = {name: sum(count * cost.memory[name] for cost, count in layers) for name in STATE}
    memory["residuals"] = in_flight * sum(count * cost.residual_bytes for cost, count in layers)
    memory["live"] = max((cost.live_bytes for cost, _ in layers), default=0.0)
    memory["boundary"] = boundary_bytes
    return {name: ceil(value) for name, value in memory.items()}


def _weight_copies(weights: Weights, zero: int) -> float:
    if zero < 3:
        return weights.replicated.cast
    return weights.whole.cast + 2 * weights.divided.computed
