"""A plan as shardings for a hand-written step: in the user's structure, and equal to where the runtime keeps things."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from flax import nnx

from galvatron_jax import plan_shardings
from galvatron_jax.analysis import analyse_model
from galvatron_jax.errors import DeviceMismatchError
from galvatron_jax.plan import Strategy
from tests.runtime.planned import dp, planned, tp
from tests.runtime.test_grouped import Network
from tests.runtime.test_grouped import loss as mean_of_sines
from tests.runtime.zoo_plans import first_legal, plan_for
from tests.support.small_models import small_llama
from tests.zoo import ZOO

pytestmark = pytest.mark.multidevice


def test_a_hand_written_step_runs_under_the_exported_shardings() -> None:
    model = small_llama(batch=16)
    sharded = planned((dp(3), tp(2, zero=3), tp(2), dp(1)), model=model)
    places = plan_shardings(sharded.plan, model.build, model.batch, loss=model.loss)
    graph, parameters, *rest = nnx.split(model.build(), nnx.Param, ...)
    assert str(jax.tree.structure(places)) == str(jax.tree.structure(parameters))
    placed = jax.device_put(parameters, places)
    loss = jax.jit(lambda p: model.loss(nnx.merge(graph, p, *rest), model.batch), in_shardings=(places,))
    assert float(loss(placed)) == pytest.approx(float(model.loss(model.build(), model.batch)), rel=1e-5)
    kept = sharded.programs.abstract_neutral_state.parameters
    assert jax.tree.leaves(places) == [leaf.sharding for leaf in jax.tree.leaves(kept)]


def test_a_stack_of_layers_is_sharded_as_its_rows_and_whole_along_the_layers() -> None:
    model: Any = ZOO["pure scanned"]()
    kinds = _segments(model)
    sharded = planned((dp(3),) * kinds, model=model)
    places = plan_shardings(sharded.plan, model.build, model.batch, loss=model.loss)
    shapes = sharded.analysis.trace.model.parameters
    stacks = sharded.analysis.trace.rows.stacks
    assert stacks
    for index, (place, leaf) in enumerate(zip(jax.tree.leaves(places), jax.tree.leaves(shapes), strict=True)):
        place.shard_shape(leaf.shape)
        if index in stacks:
            assert place.spec[stacks[index].axis] is None


def test_grouped_convolutions_that_tensor_ranks_copy_are_warned_of() -> None:
    batch = jax.ShapeDtypeStruct((8, 16, 16), "float32")
    analysis = analyse_model(Network(16), mean_of_sines, batch)
    plan = plan_for(analysis, first_legal(Strategy(tp=2, dp=4)))
    with pytest.warns(UserWarning, match="layer.*grouped convolutions"):
        plan_shardings(plan, Network(16), batch, loss=mean_of_sines)


def test_another_number_of_devices_is_refused_before_the_model_is_traced() -> None:
    model = small_llama(batch=16)
    sharded = planned((dp(),) * 4, model=model)
    with pytest.raises(DeviceMismatchError):
        plan_shardings(sharded.plan, _never, model.batch, devices=jax.devices()[:4])


def _never() -> None:
    raise AssertionError("the model must not be built")


def _segments(model: Any) -> int:
    return len(analyse_model(model.build, model.loss, model.spec).cut.segments)
