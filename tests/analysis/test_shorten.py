"""A shortened model is the model that its author would have written with fewer layers."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from flax import nnx

from galvatron_jax.analysis import Analysis, analyse_model, shorten
from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import UnsupportedError
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.runtime import StagePrograms, plan_model, stage_mesh
from galvatron_jax.verify._subject import stand_in_optimizer
from tests.support.small_models import mean_square, regression, small_llama

pytestmark = pytest.mark.multidevice


def llama(layers: int) -> Analysis:
    case = small_llama(layers=layers)
    return analyse_model(case.build, case.loss, case.abstract_batch, name="llama")


def program_text(analysis: Analysis) -> str:
    """The training step under fully sharded data parallelism on two devices."""
    runs = [PlanRun(kind=run.kind, count=run.count, strategy=Strategy(dp=2, zero=3)) for run in analysis.profile.layers]
    plan = Plan(
        model=model_reference(analysis.profile),
        cluster=Cluster(nodes=1, gpus_per_node=2),
        global_batch=4,
        microbatches=1,
        stages=(Stage(devices=2, runs=tuple(runs)),),
    )
    planned = plan_model(analysis, plan, stage_mesh(plan.cluster, jax.devices()[:2]))
    programs = StagePrograms(planned, stand_in_optimizer(plan), 1)
    train: Any = programs.train
    text: str = train.lower(programs.abstract_state, jax.tree.leaves(analysis.trace.batch)).as_text()
    return text


@pytest.mark.parametrize("layers", [3, 4])
def test_shortened_program_is_that_of_the_shorter_model(layers: int) -> None:
    shorter, written = shorten(llama(6), {"layers.*": layers}), llama(layers)
    assert shorter.profile == written.profile.__class__(
        **{f: getattr(written.profile, f) for f in written.profile.__struct_fields__ if f != "structure"},
        structure=shorter.profile.structure,
    )
    assert program_text(shorter) == program_text(written)


def test_without_layers_the_head_reads_the_embedding() -> None:
    whole = llama(4)
    bare = shorten(whole, {"layers.*": 0})
    embed, head = bare.cut.segments
    assert set(embed.outputs) & set(head.inputs)
    assert not any("layers" in path for path in bare.trace.paths)
    assert program_text(bare)
    assert len(whole.cut.segments) == 6, "the whole model is left as it was"


class Balanced(nnx.Module):
    """A layer that hands on the stream and a loss of its own."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.nn.relu(self.linear(x))
        return x, (x * x).mean()


class Stack(nnx.Module):
    """Every layer's own loss is read at the end."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Balanced(rngs=rngs) for _ in range(4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        losses = []
        for block in self.blocks:
            x, loss = block(x)
            losses.append(loss)
        return x * sum(losses)


def test_layers_that_others_read_cannot_all_be_left_out() -> None:
    case = regression(lambda: Stack(rngs=nnx.Rngs(0)))
    analysis = analyse_model(case.build, mean_square, case.abstract_batch)
    kind = max(analysis.profile.layers, key=lambda run: run.count).kind
    assert len(shorten(analysis, {kind: 1}).cut.segments) < len(analysis.cut.segments)
    with pytest.raises(UnsupportedError, match="read elsewhere"):
        shorten(analysis, {kind: 0})
