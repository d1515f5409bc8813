"""Bytes of one layer on one device.

State (persistent; w elements after tensor parallelism; / z, the strategy's zero ranks, where zero shards and a
dimension divides, plan.zero_dim; tied parameters that a layer before keeps on the same stage not at all)

    parameters   w * storage itemsize                        / z from zero 3
    gradients    w * storage itemsize                        / z from zero 2; from zero 1 without accumulation
    optimizer    w * training.state_bytes_per_parameter      / z from zero 1

Gradients live in the storage dtype, with or without accumulation: the compiled step allocates them for all layers at
once (the output of the scan over layers, or the accumulator of the scan over microbatches). With one microbatch there
is no accumulator, and under zero 1 each device keeps of a reduced gradient only what it updates: programs of zero 1 and
zero 2 have the same peak (benchmarks/memory_h100_aot_2026-11-22.md).

Residuals (per in-flight microbatch): the stream input; without remat all that forward keeps for backward, under remat
``dots`` the results of products with weights.

Live (only while the layer's backward pass runs, so a stage needs the largest of its layers)

    workspace
    + what sp gathers in the backward pass      stream and cotangents, whole along the sequence: operands of weight
                                                gradients, which the compiler computes last, so all of them are alive
    + residuals that remat did not keep         they are computed again just before
    + copies of the weights in the compute dtype: zero 3 (and a layer that borrows tied parameters): gathered, twice
      (this layer's and the prefetched next one's); otherwise once, of those whose compute dtype is not their storage
      dtype
    + the layer's whole gradient in the compute dtype, before it is reduced or added to the accumulator

Checked in tests/cost/test_memory.py against peaks of XLA:GPU programs for 16 H100 (12 plans). Not included: what no
array sees (CUDA context, NCCL, allocator; ``HardwareProfile.reserved_bytes``).

States, residuals and the live part are added although they do not peak at one instant: gradients grow while residuals
go. Programs that scan over layers allocate both for the whole backward pass, so the sum is what they need.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil
from typing import NamedTuple

from ..plan import Strategy, Training
from ..profile import HardwareProfile, LayerKind
from ._kind import Weights, is_fused, summarise
from ._memo import remembered
from ._values import LayerCost, Shares

STATE = ("parameters", "gradients", "optimizer")
"""Categories that make up ``LayerCost.state_bytes``."""


class LocalBytes(NamedTuple):
    """Bytes of one layer's activations on one device, whatever zero and remat do."""

    stream_input: float
    residuals: float
    """Without remat."""
    residuals_dots: float
    """Under remat ``dots``."""
    workspace: float
    gathered: float
    """What sequence parallelism gathers along the sequence."""


@remembered
def local_bytes(kind: LayerKind, hardware: HardwareProfile, spread: Strategy, microbatch: int) -> LocalBytes:
    """Return the bytes of activations under a spread (``_work.spread_of``) for one microbatch of the stage."""
    sums, shares = summarise(kind, is_fused(kind, hardware)), Shares.of(kind, spread, microbatch)
    return LocalBytes(
        sums.stream_input.at(shares),
        sums.residuals.at(shares),
        sums.residuals_dots.at(shares),
        sums.workspace.at(shares),
        sums.gathered.at(shares) if spread.sp else 0.0,
    )


def layer_memory(
    local: LocalBytes,
    weights: Weights,
    strategy: Strategy,
    training: Training,
    *,
    accumulates: bool,
    borrowing: bool,
) -> dict[str, float]:
    """Return the bytes of one layer by category (residuals: of one microbatch).

    Args:
        local: Its activations under the strategy's spread.
        weights: Its parameters under the strategy's (tp, zero ranks).
        strategy: The strategy.
        training: What the optimizer keeps.
        accumulates: More than one microbatch per step.
        borrowing: A layer before it on the same stage keeps its tied parameters.
    """
    zero, remat = strategy.zero, strategy.remat
    held = weights.own if borrowing else weights.held
    kept = {"none": local.residuals, "dots": local.residuals_dots, "full": 0.0}[remat]
    live = local.workspace + _weight_copies(weights, 3 if borrowing else zero) + weights.replicated.computed
    live += local.gathered
    return {
        "parameters": held(zero >= 3).stored,
        "gradients": held(zero >= (2 if accumulates else 1)).stored,
        "optimizer": held(zero >= 1).elements * training.state_bytes_per_parameter,
        "residuals": local.stream_input + kept,
        "live": live + max(0.0, local.residuals - kept),
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
    return slice_memory([layers], [(in_flight,)], boundary_bytes)


def slice_memory(
    chunks: Sequence[Sequence[tuple[LayerCost, int]]], moments: Collection[Sequence[int]], boundary_bytes: float
) -> dict[str, int]:
    """Return the peak bytes of one device slice by category, each rounded up; the peak is their sum.

    Args:
        chunks: (cost, count) of the layers of each of its stages.
        moments: The fullest moments, each as microbatches in flight by chunk (``schedule.in_flight_units``).
        boundary_bytes: Buffers of messages to and from the neighbouring stages, all chunks together.
    """
    layers = [item for chunk in chunks for item in chunk]
    memory = {name: sum(count * cost.memory[name] for cost, count in layers) for name in STATE}
    residuals = [sum(count * cost.residual_bytes for cost, count in chunk) for chunk in chunks]
    memory["residuals"] = max(sum(n * size for n, size in zip(held, residuals, strict=True)) for held in moments)
    memory["live"] = max((cost.live_bytes for cost, _ in layers), default=0.0)
    memory["boundary"] = boundary_bytes
    return {name: ceil(value) for name, value in memory.items()}


def _weight_copies(weights: Weights, zero: int) -> float:
    if zero < 3:
        return weights.replicated.cast
    return weights.whole.cast + 2 * weights.divided.computed
