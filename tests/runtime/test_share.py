"""A program shared out over stages: what crosses, what is remade, and the numbers of the whole."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, check_plan, model_reference
from galvatron_jax.runtime import StageModel, plan_stages, stage_mesh
from galvatron_jax.runtime._slots import to_stored, to_user
from tests.runtime.planned import llama
from tests.zoo import ZOO

pytestmark = pytest.mark.multidevice

STRATEGY = Strategy(tp=2, dp=2)
GRADIENT_TOLERANCE = 1e-4
"""Largest error over largest value: float32 sums in another order; T5 does not scale its scores. Measured 4e-5."""


@functools.cache
def analysed(name: str) -> tuple[Any, Analysis]:
    """Analyse a case of the zoo, or the four-layer Llama."""
    model: Any = llama() if name == "llama" else ZOO[name]()
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.batch)
    return model, analyse_model(model.build, model.loss, batch)


def stages_of(analysis: Analysis, *counts: int, strategy: Strategy = STRATEGY) -> tuple[StageModel, ...]:
    """Cut into stages of so many layers, all on meshes of four devices."""
    kinds = [segment.kind for segment in analysis.cut.segments]
    stops = np.cumsum(counts)
    stages = tuple(
        Stage(devices=4, runs=tuple(PlanRun(kind=k, count=1, strategy=strategy) for k in kinds[stop - n : stop]))
        for stop, n in zip(stops, counts, strict=True)
    )
    cluster = Cluster(nodes=len(counts), gpus_per_node=4, gpu="cpu")
    plan = Plan(model=model_reference(analysis.profile), cluster=cluster, global_batch=8, stages=stages)
    check_plan(plan)
    mesh = stage_mesh(cluster, jax.devices()[:4])
    return plan_stages(analysis, plan, [mesh] * len(counts))


def crossing_shapes(stage: StageModel) -> list[tuple[tuple[int, ...], bool]]:
    return [(c.variable.aval.shape, c.gradient) for c in stage.share.arriving]


def test_what_leaves_a_stage_is_what_arrives_at_the_next() -> None:
    _, analysis = analysed("t5")
    stages = stages_of(analysis, 2, 2, 3)
    for before, after in zip(stages, stages[1:], strict=False):
        assert before.share.leaving == after.share.arriving
        assert before.leaving_shardings == after.arriving_shardings
    assert stages[0].share.arriving == ()
    assert stages[-1].share.leaving == ()
    assert [stage.share.makes_loss for stage in stages] == [False, False, True]


def test_a_decoder_takes_stream_memory_and_bias_and_makes_masks_itself() -> None:
    _, analysis = analysed("t5")
    *_, head = stages_of(analysis, 5, 1, 1)
    assert crossing_shapes(head) == [((8, 12, 32), True)]  # the stream; the head needs nothing else
    _, decoder = stages_of(analysis, 5, 2)
    stream, memory, bias = ((8, 12, 32), True), ((8, 16, 32), True), ((1, 4, 12, 12), True)
    assert sorted(crossing_shapes(decoder)) == sorted([stream, memory, bias])


def test_rotary_tables_and_targets_do_not_cross() -> None:
    _, analysis = analysed("llama")
    first, second = stages_of(analysis, 3, 3)
    assert crossing_shapes(second) == [((16, 32, 64), True)]
    assert first.share.batch == (0,)
    assert second.share.batch == (1,)


def test_a_tied_table_is_held_by_both_ends_and_every_leaf_by_somebody() -> None:
    _, analysis = analysed("t5")
    stages = stages_of(analysis, 2, 2, 3)
    held = [set(stage.share.parameters) for stage in stages]
    assert set.union(*held) == set(range(len(analysis.trace.paths)))
    shared = {analysis.trace.paths[i] for i in held[0] & held[2]}
    assert shared == {"shared.embedding"}


@pytest.mark.parametrize(("name", "counts"), [("t5", (2, 2, 3)), ("llama", (1, 4, 1))])
def test_stages_in_turn_give_loss_and_gradients_of_the_whole(name: str, counts: tuple[int, ...]) -> None:
    model, analysis = analysed(name)
    stages = stages_of(analysis, *counts)
    user = analysis.trace.model
    parameters, rest = user.build()
    expected = jax.jit(jax.value_and_grad(lambda p: user.run(p, rest, model.batch)[0]))(parameters)
    whole = jax.jit(functools.partial(in_turn, stages))
    loss, gradients = whole(jax.tree.leaves(parameters), jax.tree.leaves(model.batch))
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    for index, gradient in enumerate(jax.tree.leaves(expected[1])):
        error = np.abs(gradients[index] - gradient).max() / np.abs(gradient).max()
        assert error < GRADIENT_TOLERANCE, analysis.trace.paths[index]


def in_turn(stages: tuple[StageModel, ...], leaves: list[Any], batch: list[Any]) -> tuple[Any, dict[int, Any]]:
    """Run forward and backward pass of every stage by itself; gradients of tied leaves are summed."""
    arriving: list[Any] = []
    pullbacks = []
    results: Any = None
    for stage in stages:
        results, pullback = forward(stage, leaves, batch, arriving)
        arriving = results.leaving
        pullbacks.append(pullback)
    gradients: dict[int, Any] = {}
    cotangents: list[Any] = []
    for stage, pullback in zip(stages[::-1], pullbacks[::-1], strict=True):
        own, cotangents = pullback((cotangents, jnp.ones_like(results.loss) if stage.share.makes_loss else None))
        for leaf, gradient in to_user(stage.slots, own).items():
            gradients[leaf] = gradients[leaf] + gradient if leaf in gradients else gradient
    return results.loss, gradients


def forward(stage: StageModel, leaves: list[Any], batch: list[Any], arriving: list[Any]) -> Any:
    assert all(crossing.gradient for crossing in stage.share.arriving)
    parameters = jax.lax.with_sharding_constraint(
        to_stored(stage.slots, dict(enumerate(leaves))), stage.parameter_shardings("parameter")
    )
    fed = jax.lax.with_sharding_constraint([batch[i] for i in stage.share.batch], stage.batch_shardings())

    def run(parameters: list[Any], arriving: list[Any]) -> Any:
        results = stage.run(parameters, [], fed, arriving)
        return (results.leaving, results.loss), results

    arriving = jax.lax.with_sharding_constraint(arriving, stage.arriving_shardings)
    _, pullback, results = jax.vjp(run, parameters, arriving, has_aux=True)
    return results, pullback
