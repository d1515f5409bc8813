"""What a layer takes on a stage that holds no loop.

XLA runs two layers straight on (``runtime/_runs.py``: three are a loop), so a pipeline stage with at most two repeated
layers is a program without any loop, whatever strategies they take. Every layer is priced as one of a loop
(``_memory``); there it takes differently:

    gradients   one copy: no loop makes a stack of them beside the sums
    live        no weights gathered for a next turn; and of the layer's own gradient nothing: a product that makes the
                gradient of a weight takes the place of its operands, which the moments count until the end
    gradients + of every layer that is not the last of the backward pass what it left: its whole gradients in the
                compute dtype, or their operands where these are less. They wait for the reduction, or for the addition
                to the sums, which a scheduler that hides collectives puts off. A backward pass without collectives is
                not rescheduled: XLA keeps the order that needs least memory, and adds gradients up as they are made.

With ``n`` repeated layers (1 or 2) the first of them is the last of the pass, so each leaves ``(n - 1) / n`` of its
gradients. Heads leave theirs in loops too (``_memory``).

All of this is less than the price of a loop (what a layer leaves is less than its own gradient, which the loop's price
counts as live), so a stage needs more with every layer that it holds. Read in compiled programs: docs/design/0094.

Limits: whole-model programs (one stage) and interleaved stages keep the loop's price. So do stages of two kinds of
layers with more than two in all. The products of the values' gradients may come before or after softmax's backward
pass, as the scheduler breaks ties: the probabilities count as alive.
"""

from __future__ import annotations

from ..plan import Strategy
from ._kind import Weights
from ._memory import STACKS, LocalBytes, left_bytes
from ._values import Straight

MOST_STRAIGHT_LAYERS = 2
"""Repeated layers of a stage without a loop; three run as one."""


def straight_layers(repeated: int, slices: int, chunks: int) -> int:
    """Return the layers of a stage without a loop (at least 1); 0 where layers are priced as those of a loop.

    Args:
        repeated: Layers on the stage whose kind stands in a row.
        slices: Device slices of the pipeline.
        chunks: Stages of each slice.
    """
    return max(1, repeated) if slices > 1 and chunks == 1 and repeated <= MOST_STRAIGHT_LAYERS else 0


def straight_bytes(local: LocalBytes, weights: Weights, strategy: Strategy, *, accumulates: bool) -> Straight:
    """Return what a layer of a pipeline takes differently on a stage without a loop."""
    if not local.repeated:
        return Straight()
    live = local.live.get(strategy.remat)
    prefetched = live.prefetched if live else weights.divided.computed
    return Straight(
        gradients=(STACKS - 1) * weights.sharded.stored if accumulates and strategy.zero >= 2 else 0.0,
        live=(strategy.zero >= 3) * prefetched + weights.replicated.computed,
        left=left_bytes(local, weights, strategy, accumulates=accumulates),
    )


def on_straight_stage(memory: dict[str, float], apart: Straight, layers: int) -> dict[str, float]:
    """Return a layer's bytes by category on a stage that holds ``layers`` repeated layers and no loop."""
    gradients, live = memory["gradients"] + apart.state_change(layers), memory["live"] - apart.live
    return memory | {"gradients": float(gradients), "live": max(0.0, float(live))}
