"""A plan's stages as models on their meshes: the analysed program shared out, every layer with its strategy's layout.

Layers of equal kind and strategy on one stage share one ``LayerLayout``: by that, runs of equal layers are found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from ..analysis import Analysis
from ..plan import Plan, Strategy
from ._layout import LayerLayout, Role
from ._mesh import StageMesh
from ._model import StageModel
from ._share import StageShare, share_out


def plan_stages(
    analysis: Analysis, plan: Plan, meshes: Sequence[StageMesh], *, reduces_in_float32: bool = False
) -> tuple[StageModel, ...]:
    """Give every stage of ``plan`` its share of the analysed program and its layouts.

    Args:
        analysis: The model, analysed at the shape of one microbatch.
        plan: Checked against the analysis (``check_plan``).
        meshes: Of each stage, in layer order; stages on one slice of devices (chunks) share a mesh.
        reduces_in_float32: See ``StageModel``.

    Raises:
        UnsupportedError: the model's state cannot be shared out so.
    """
    shares = share_out(analysis, [stage.layer_count for stage in plan.stages])
    role: Role = "gradient" if plan.microbatches > 1 else "optimizer"
    return tuple(
        StageModel(
            share,
            mesh,
            _layouts(analysis, share, stage.layers(), mesh),
            gradient_role=role,
            reduces_in_float32=reduces_in_float32,
        )
        for share, stage, mesh in zip(shares, plan.stages, meshes, strict=True)
    )


def plan_model(analysis: Analysis, plan: Plan, mesh: StageMesh, *, reduces_in_float32: bool = False) -> StageModel:
    """Return the only stage of a one-stage plan, whose step updates as soon as it has its gradients."""
    (stage,) = plan_stages(analysis, plan, [mesh], reduces_in_float32=reduces_in_float32)
    return dataclasses.replace(stage, gradient_role="optimizer")


def _layouts(
    analysis: Analysis, share: StageShare, layers: Iterable[tuple[str, Strategy]], mesh: StageMesh
) -> tuple[LayerLayout, ...]:
    known: dict[tuple[str, Strategy], LayerLayout] = {}
    layouts = []
    for segment, (_, strategy) in zip(share.segments, layers, strict=True):
        key = (segment.kind, strategy)
        known.setdefault(key, LayerLayout(analysis.kinds[segment.kind], strategy, mesh))
        layouts.append(known[key])
    return tuple(layouts)
