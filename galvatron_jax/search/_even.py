"""Lower bounds on the step time of interleaved stages, for all their boundaries (``_space.even_cuts``) at once.

The bottleneck path of slice ``s`` (``_paths``) takes at least

    fill[s] + m G[s]      fill[s] = sum over k < s of (fastest seconds of stage k) + sum over k of x[s, k] transfer[k]

with ``x[s, k]`` messages over boundary ``k`` on that path. ``G[s]``, the seconds of one microbatch's passes through the
slice's stages, is at least that of the fastest strategies, and by Lagrangian duality with ``N`` layers of a kind of
which ``H`` microbatches in all are in flight

    G[s] >= max over p of  sum over kinds of  N A(p, H / N)  -  p room                (``A``: ``_whole``)

Boundaries whose bound has reached the limit are looked at no further.

Complexity: O(boundaries * (stages + distinct slices * prices * options)).
"""

from __future__ import annotations

import numpy as np

from ._assignment import Assigner
from ._knapsack import Floats, Ints
from ._paths import path_messages
from ._pricing import Prices
from ._space import Shape
from ._whole import Layers, fastest_seconds, held_in_flight

EVERY_RUNG = 3
"""Of the ladder of byte prices one in so many is tried."""


def even_bounds(
    prices: Prices, assigner: Assigner, shape: Shape, microbatches: int, cuts_NK: Ints, limit: float
) -> Floats:
    """Return a lower bound in seconds by row of ``cuts_NK``; those below ``limit`` are the best of these bounds."""
    slices, spent = shape.slices, np.diff(np.array(fastest_seconds(prices))[cuts_NK], axis=1)
    inner = range(shape.stages - 1)
    wires = np.stack(
        [each_BJ[k % slices, cuts_NK[:, k + 1]] for k in inner for each_BJ in (prices.transfer_BJ, prices.sender_BJ)],
        axis=1,
    )
    messages = [[path_messages(microbatches, s, prices.meets_B, k) for s in range(slices)] for k in inner]
    fills = wires @ np.array([[message[side] for message in row] for row in messages for side in (0, 1)], float)
    fills[:, 1:] += np.cumsum(spent[:, : slices - 1], axis=1)
    own = np.stack([spent[:, s::slices].T.sum(axis=0) for s in range(slices)], axis=1)
    bounds = (fills + microbatches * own).max(axis=1, initial=0.0)
    layers, held_SC = Layers.of(prices, assigner), held_in_flight(shape, microbatches)
    ladder = layers.ladder(float(held_SC.mean()))[::EVERY_RUNG]
    ahead_LK = np.zeros((len(prices.order) + 1, len(prices.kinds)))
    ahead_LK[1:] = np.cumsum(prices.order[:, None] == np.arange(len(prices.kinds)), axis=0)
    for s in range(slices):
        left = np.flatnonzero(bounds < limit)
        if not len(left):
            break
        cuts = cuts_NK[left]
        counts = ahead_LK[cuts[:, s + 1 :: slices]] - ahead_LK[cuts[:, s:-1:slices]]
        least = _least_seconds(layers, counts, held_SC[s], ladder)
        bounds[left] = np.maximum(bounds[left], fills[left, s] + microbatches * least)
    return np.asarray(bounds)


def _least_seconds(layers: Layers, counts_NCK: Floats, held_C: Floats, ladder: Floats) -> Floats:
    """``G`` of one slice by boundaries."""
    total = counts_NCK.transpose(1, 0, 2).sum(axis=0)
    in_flight = (held_C[:, None, None] * counts_NCK.transpose(1, 0, 2)).sum(axis=0)
    contents, of_row = np.unique(np.concatenate([total, in_flight], axis=1), axis=0, return_inverse=True)
    total, in_flight = np.split(contents, 2, axis=1)
    least = np.tile(-ladder * layers.room, (len(contents), 1))
    for kind in range(total.shape[1]):
        some = np.flatnonzero(total[:, kind])
        held = np.repeat(in_flight[some, kind] / total[some, kind], len(ladder))
        each = layers.least(kind, np.tile(ladder, len(some)), held).reshape(len(some), len(ladder))
        least[some] += total[some, kind, None] * each
    return np.asarray(least.max(axis=1, initial=0.0)[of_row.reshape(-1)])
