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

Gradients that every microbatch reduces (zero 2 and 3, several microbatches) are there twice: the sums, and the stack
that a microbatch's backward loop makes. Under zero 0 and 1 they are added up in place (runtime/_sums.py), and a layer
outside the loop makes no stack. The end of a step reduces them layer by layer (runtime/_scatter.py), so that it needs
no more than the passes did. The programs of a pipeline do all this alike (docs/design/0084). There a head's gradients
wait until the pass ends, to be reduced or added up: whole, in the compute dtype, or as their operands where these are
less; not in a pass without collectives, which XLA does not reschedule (docs/design/0094).

Without accumulation the gradient of a layer outside the loop (embedding, head) counts as live: it is computed after the
loop, which is the fuller moment. (Not in a pipeline, where all gradients have their memory from the first pass on.)

Residuals (per in-flight microbatch): the stream input; without remat all that forward keeps for backward, under remat
``dots`` the results of products with weights; of a layer that stands alone also what its weights' gradients wait for
(``profile.Live.waiting``: cotangents of logits stay until the loops before are done; not of the embedding, with which
the backward pass ends, and not in a pipeline, where nothing lies between programs but residuals). Where tensor
parallelism shards the vocabulary, the collectives of the loss hurry it: what was kept for it (the logits) is gone when
the cotangent is there, which may take its place. So there it counts at the head's own moment, as live, in place of the
cotangent, and no longer (read in four programs; without tensor parallelism both are there).

Live (only while the layer's backward pass runs, so a stage needs the largest of its layers)

    the largest of the moments of ``profile.Live`` under the remat policy: temporaries, and under zero 3 (or where the
      layer borrows tied parameters) the gathered weights that are still to be read
    - what waits after it, which counts as residuals already
    + under zero 3 the weights that are gathered meanwhile for the next layer of the loop
    + what sp gathers in the backward pass      stream and cotangents, whole along the sequence: operands of weight
                                                gradients, which the compiler computes last, so all of them are alive
    + the layer's whole gradient in the compute dtype, before it is reduced or added to the accumulator

Casts of weights that are not gathered are taken into the products that read them. A profile without ``live`` (written
by hand) has in place of the moments: workspace + residuals that remat did not keep + copies of the weights in the
compute dtype (zero 3: this layer's and the next one's; otherwise those that are cast).

Compared with XLA:GPU in docs/accuracy.md and, by component, docs/design/0055. Not included: what no array sees (CUDA
context, NCCL, allocator; ``HardwareProfile.reserved_bytes``).

States, residuals and the live part are added although they do not peak at one instant: gradients grow while residuals
go. Programs that scan over layers allocate both for the whole backward pass, so the sum is what they need.

Every layer is priced as one of a loop; what stages of a pipeline without any loop take differently is in ``_straight``.

Limit: a run of one or two layers on any other stage is no loop either: what it kept is freed piece by piece, nothing is
gathered ahead and gradients come late. It mostly needs less than its price (docs/design/0085).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil
from typing import NamedTuple

from ..plan import Strategy, Training
from ..profile import HardwareProfile, LayerKind
from ..strategy import Remat
from ._kind import Weights, is_fused, summarise
from ._memo import remembered
from ._values import LayerCost, Shares

STACKS = 2
"""Copies of the gradients of a loop over layers that every microbatch reduces."""

LONG_SCATTER_S = 1e-3
"""What takes longer than the reductions beside it does not wait for them: of scatters into tables of 0.2 to 0.6
milliseconds the zeros were made last, of one of 1.3 before the layers' peak (16 H100; docs/design/0094)."""

STATE = ("parameters", "gradients", "optimizer")
"""Categories that make up ``LayerCost.state_bytes``."""


class LocalBytes(NamedTuple):
    """Bytes of one layer's activations on one device, whatever zero and remat do."""

    stream_input: float
    kept: dict[Remat, float]
    """Residuals besides the stream input."""
    workspace: float
    gathered: float
    """What sequence parallelism gathers along the sequence."""
    live: dict[Remat, LiveBytes]
    repeated: bool
    """It runs in a loop over layers."""
    scatter_s_per_byte: float
    """Seconds to read and write a byte of a gradient that lookups scatter; 0: it looks nothing up."""

    @property
    def waits(self) -> bool:
        """Whether the layers before it run while its weights' gradients wait; with an embedding the pass ends."""
        return self.stream_input > 0 and not self.repeated


class LiveBytes(NamedTuple):
    """Bytes alive in a layer's backward pass (``profile.Live``)."""

    moments: tuple[tuple[float, float], ...]
    """(temporaries, gathered weights) of each."""
    prefetched: float
    """0 outside a loop."""
    waiting: float
    """Operands of the weights' gradients."""

    def most(self, *, gathers: bool) -> float:
        """Return the bytes of the fullest moment, with the weights where zero 3 gathers them."""
        fullest = max((arrays + gathers * weights for arrays, weights in self.moments), default=0.0)
        return fullest + gathers * self.prefetched


@remembered
def local_bytes(kind: LayerKind, hardware: HardwareProfile, spread: Strategy, microbatch: int) -> LocalBytes:
    """Return the bytes of activations under a spread (``_work.spread_of``) for one microbatch of the stage."""
    sums, shares = summarise(kind, is_fused(kind, hardware)), Shares.of(kind, spread, microbatch)
    return LocalBytes(
        stream_input=sums.stream_input.at(shares),
        kept={"none": sums.residuals.at(shares), "dots": sums.residuals_dots.at(shares), "full": 0.0},
        workspace=sums.workspace.at(shares),
        gathered=sums.gathered.at(shares) if spread.sp else 0.0,
        live={
            remat: LiveBytes(
                moments=tuple((arrays.at(shares), weights.at(shares)) for arrays, weights in live.moments),
                prefetched=live.prefetched.at(shares) if kind.repeated else 0.0,
                waiting=live.waiting.at(shares),
            )
            for remat, live in sums.live.items()
        },
        repeated=kind.repeated,
        scatter_s_per_byte=2 / hardware.memory_bandwidth_bytes_per_s
        if any(p.lookups for p in kind.parameters)
        else 0.0,
    )


@remembered
def depends_on_samples(kind: LayerKind, hardware: HardwareProfile) -> bool:
    """Return whether a microbatch decides memory by its samples on one device alone: no array has the batch twice."""
    sums = summarise(kind, is_fused(kind, hardware))
    every = [sums.stream_input, sums.residuals, sums.residuals_dots, sums.workspace, sums.gathered]
    for live in sums.live.values():
        every += [live.prefetched, live.waiting, *(part for moment in live.moments for part in moment)]
    return all(power <= 1 for total in every for _, power, _ in total.terms)


def layer_memory(
    local: LocalBytes,
    weights: Weights,
    strategy: Strategy,
    training: Training,
    *,
    accumulates: bool,
    borrowing: bool,
    pipelined: bool = False,
) -> dict[str, float]:
    """Return the bytes of one layer by category (residuals: of one microbatch).

    Args:
        local: Its activations under the strategy's spread.
        weights: Its parameters under the strategy's (tp, zero ranks).
        strategy: The strategy.
        training: What the optimizer keeps.
        accumulates: More than one microbatch per step.
        borrowing: A layer before it on the same stage keeps its tied parameters.
        pipelined: The step is several programs: between them there are sums of gradients and residuals, nothing else.
    """
    zero, remat = strategy.zero, strategy.remat
    held = weights.own if borrowing else weights.held
    gradient = held(zero >= (2 if accumulates else 1)).stored
    lasts = accumulates or local.repeated or pipelined
    live = local.live.get(remat)
    temporaries = (
        live.most(gathers=zero >= 3 or borrowing) if live else _workspace(local, weights, remat, zero, borrowing)
    )
    stacks = STACKS if accumulates and zero >= 2 and local.repeated else 1
    waiting = live.waiting if live and local.waits and not pipelined else 0.0
    read = local.kept[remat] if waiting and strategy.tp > 1 else 0.0
    edge = pipelined and not local.repeated
    left = left_bytes(local, weights, strategy, accumulates=accumulates) if edge else 0.0
    # What is read for the cotangent is gone when the cotangent is there: never both (``read`` is 0 otherwise).
    fullest = max(temporaries, temporaries - waiting + read)
    own = max(0.0, fullest - waiting) + local.gathered + weights.replicated.computed
    return {
        "parameters": held(zero >= 3).stored,
        "gradients": (gradient * stacks if lasts else 0.0) + left,
        "optimizer": held(zero >= 1).elements * training.state_bytes_per_parameter,
        "residuals": local.stream_input + local.kept[remat] - read + waiting,
        "live": max(0.0, own + (0.0 if lasts else gradient) - left),  # at its own moment nothing is left yet
    }


def left_bytes(local: LocalBytes, weights: Weights, strategy: Strategy, *, accumulates: bool) -> float:
    """Return what of a layer's gradients is there while other layers' backward passes run, in a pass with collectives.

    Gradients to be reduced or added up when the pass ends, or their operands; of an embedding, with which it ends, the
    zeros into which a large table's gradient is scattered: they depend on nothing, and are made long before. Nothing
    where the pass has no collectives: then XLA keeps the order that needs least memory.
    """
    reduces = strategy.zero_ranks > 1 and strategy.zero >= (2 if accumulates else 1)
    if not (reduces or strategy.inner > 1):
        return 0.0
    gradient, live = weights.replicated.computed, local.live.get(strategy.remat)
    if not local.stream_input:
        return gradient if local.scatter_s_per_byte * gradient > LONG_SCATTER_S else 0.0
    return min(gradient, live.waiting) if live else gradient


def _workspace(local: LocalBytes, weights: Weights, remat: Remat, zero: int, borrowing: bool) -> float:
    """Bytes alive in the backward pass of a layer of which no moments are known."""
    again = max(0.0, local.kept["none"] - local.kept[remat])
    return local.workspace + again + _weight_copies(weights, 3 if borrowing else zero)


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
