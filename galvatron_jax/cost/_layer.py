"""The price of one layer under one strategy on one device.

With f, b, r the seconds of computing forward, backward and (remat) forward again; T and D the collectives over the
trailing mesh axes and those of the batch of a phase, both exposed; G the zero-3 gather, R the gradient reduction; and
x(c, g) what communication g adds beside compute c (``_overlap``):

    forward_s  = f     + T_f       + D_f       + x(f, G)
    backward_s = b + r + T_b + T_r + D_b + D_r + x(b + r, G + R [zero >= 2])
    sync_s     = x(b + r, R) [zero <= 1]  +  gather of the updated parameters [zero 1, 2]
    update_s   = the optimizer update

The once-per-step reduction hides behind the last microbatch's backward pass. Each layer hides communication behind its
own compute only: exact for a stage of equal layers; an embedding (no compute) has everything exposed, which is right at
the end of backward and pessimistic elsewhere.

Nothing is below zero; nothing falls while the batch, a size or a latency rises, or a rate falls.
"""

from __future__ import annotations

import functools

from ..plan import Strategy
from ..profile import LayerKind
from ._compiled_memory import compiled_memory
from ._kind import weigh
from ._memory import STATE, layer_memory, local_bytes
from ._overlap import exposed_seconds
from ._straight import on_straight_stage, straight_bytes
from ._values import LayerBytes, LayerCost, Setting, Straight
from ._weights import Spread, borrows, weight_work
from ._work import layer_work, spread_of


def estimate_layer(kind: LayerKind, strategy: Strategy, setting: Setting) -> LayerCost:
    """Return what one layer of ``kind`` costs under a legal ``strategy`` (``plan.strategy_violations``).

    Args:
        kind: The layer kind, at the sequence length to price.
        strategy: The strategy; ``inner * dp`` equals the stage's devices.
        setting: Batch, stage and hardware.

    Raises:
        DocumentError: the hardware profile lacks the matmul rate of an operand dtype.
    """
    hardware, gpus, training = setting.hardware, setting.gpus_per_node, setting.training
    spread = spread_of(strategy)
    work = layer_work(kind, hardware, spread, setting.microbatch, setting.causal_attention, gpus)
    state, accumulates, pipelined = training.state_bytes_per_parameter, setting.microbatches > 1, setting.slices > 1
    weights = weight_work(kind, hardware, Spread.of(strategy), accumulates, state, gpus, pipelined)
    again = work.again[strategy.remat]
    again_s = again.compute_s + (weights.forward_s if strategy.remat == "full" else 0.0)
    forward_s = work.forward.compute_s + weights.forward_s
    backward_s = work.backward.compute_s + weights.backward_s
    slowdown, behind_s = hardware.overlap_slowdown, backward_s + again_s
    times = {
        "compute": forward_s + backward_s,
        "recompute": again_s,
        "tensor_communication": work.forward.tensor_s + work.backward.tensor_s + again.tensor_s,
    }
    data_f = work.forward.data_s + exposed_seconds(forward_s, weights.gather_s, slowdown)
    data_b = work.backward.data_s + again.data_s
    data_b += exposed_seconds(behind_s, weights.gather_s + weights.reduce_each_s, slowdown)
    times["data_communication"] = data_f + data_b
    memory, apart = _compiled(kind, strategy, setting), _apart(kind, strategy, setting)
    if setting.straight:
        memory = on_straight_stage(memory, apart, setting.straight)
    return LayerCost(
        forward_s=forward_s + work.forward.tensor_s + data_f,
        backward_s=behind_s + work.backward.tensor_s + again.tensor_s + data_b,
        sync_s=exposed_seconds(behind_s, weights.reduce_once_s, slowdown) + weights.gather_once_s,
        update_s=weights.update_s,
        state_bytes=sum(memory[name] for name in STATE),
        residual_bytes=memory["residuals"],
        live_bytes=memory["live"],
        times=times,
        memory=memory,
        straight=apart,
    )


def layer_bytes(kind: LayerKind, strategy: Strategy, setting: Setting) -> LayerBytes:
    """Return the bytes of ``estimate_layer`` alone, which know no cluster around the stage.

    Args:
        kind: The layer kind, at the sequence length to price.
        strategy: A legal strategy.
        setting: Batch, stage and hardware, of a stage with loops.
    """
    assert not setting.straight
    memory = _compiled(kind, strategy, setting)
    states = sum(memory[name] for name in STATE)
    return LayerBytes(states, memory["residuals"], memory["live"], _apart(kind, strategy, setting))


def _apart(kind: LayerKind, strategy: Strategy, setting: Setting) -> Straight:
    """What a stage without a loop changes; nothing in a plan of one stage."""
    if setting.slices == 1:
        return Straight()
    return straight_bytes(
        local_bytes(kind, setting.hardware, spread_of(strategy), setting.microbatch),
        weigh(kind, strategy.tp, strategy.zero_ranks),
        strategy,
        accumulates=setting.microbatches > 1,
    )


def _compiled(kind: LayerKind, strategy: Strategy, setting: Setting) -> dict[str, float]:
    return compiled_memory(kind, strategy, setting, functools.partial(_memory, kind))


def _memory(kind: LayerKind, strategy: Strategy, setting: Setting) -> dict[str, float]:
    """Bytes of one layer by category, by formula."""
    held = weigh(kind, strategy.tp, strategy.zero_ranks)
    return layer_memory(
        local_bytes(kind, setting.hardware, spread_of(strategy), setting.microbatch),
        held,
        strategy,
        setting.training,
        accumulates=setting.microbatches > 1,
        borrowing=borrows(held, setting.slices > 1),
        pipelined=setting.slices > 1,
    )
