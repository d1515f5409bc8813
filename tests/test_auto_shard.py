"""The door: a user's model goes in, trains under a plan as it would on one device, and comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax import auto_shard
from galvatron_jax.analysis import abstract_batch, analyse_model, split_parameters
from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import DeviceMismatchError, GalvatronError, PlanError
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference, save_plan
from tests.zoo import ZOO, Case

BATCH, SEQ = 16, 32
CONFIG = LlamaConfig(vocab=64, embed=32, mlp=64, layers=2, heads=4, kv_heads=2, seq=SEQ, dtype="float32")
CLUSTER = Cluster(nodes=1, gpus_per_node=8, gpu="cpu")
OPTIMIZER = optax.sgd(0.5)

LOSS_RTOL = 2e-5
"""Float32 sums in another order: 8 partial sums of about 100 terms each, three steps."""


def build() -> Llama:
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def batches(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab, (count, BATCH, SEQ + 1), dtype=np.int32)
    return [{"inputs": t[:, :-1], "targets": t[:, 1:]} for t in tokens]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A heterogeneous plan with two microbatches."""
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((BATCH // 2, *x.shape[1:]), x.dtype), batches(1)[0])
    profile = analyse_model(build, next_token_loss, spec, name="small").profile
    runs = (
        PlanRun(kind="embed", count=1, strategy=Strategy(dp=8, zero=3)),
        PlanRun(kind="layers.*", count=1, strategy=Strategy(tp=2, sp=True, dp=4, zero=1)),
        PlanRun(kind="layers.*", count=1, strategy=Strategy(dp=8, zero=3, remat="full")),
        PlanRun(kind="head", count=1, strategy=Strategy(tp=2, dp=4)),
    )
    return Plan(
        model=model_reference(profile),
        cluster=CLUSTER,
        global_batch=BATCH,
        microbatches=2,
        stages=(Stage(devices=8, runs=runs),),
    )


def single_device_losses(count: int) -> list[float]:
    """Losses of plain training on one device, before each update."""
    graph, parameters, rest = split_parameters(build())
    state, losses = OPTIMIZER.init(parameters), []
    step = jax.jit(jax.value_and_grad(lambda p, batch: next_token_loss(nnx.merge(graph, p, rest), batch)))
    for batch in batches(count):
        loss, gradients = step(parameters, batch)
        updates, state = OPTIMIZER.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        losses.append(float(loss))
    return losses


@pytest.mark.multidevice
def test_auto_shard_with_a_plan_trains_like_one_device(plan: Plan) -> None:
    trained = auto_shard(build, plan=plan, optimizer=OPTIMIZER)
    results = [trained.step(batch) for batch in batches(3)]
    np.testing.assert_allclose([float(r.loss) for r in results], single_device_losses(3), rtol=LOSS_RTOL)
    assert [r.step for r in results] == [1, 2, 3]


@pytest.mark.multidevice
def test_auto_shard_without_a_plan_searches_one_and_trains_like_one_device() -> None:
    model = build()
    before = jax.tree.map(np.asarray, nnx.state(model))
    trained = auto_shard(model, optimizer=OPTIMIZER)
    losses = [float(trained.step(batch).loss) for batch in batches(3)]
    np.testing.assert_allclose(losses, single_device_losses(3), rtol=LOSS_RTOL)
    assert trained.plan.certificate is not None
    assert trained.plan.cluster == CLUSTER
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)  # the user's own module is as it was


@pytest.mark.multidevice
def test_model_after_training_is_the_users_module_with_the_trained_parameters(plan: Plan) -> None:
    trained = auto_shard(build, plan=plan, optimizer=OPTIMIZER)
    first, second = batches(2)
    trained.step(first)
    model = trained.model
    assert type(model) is Llama
    whole = jax.tree.map(np.asarray, nnx.state(model))
    graph = nnx.graphdef(model)
    expected = float(trained.eval(second))
    np.testing.assert_allclose(float(next_token_loss(nnx.merge(graph, whole), second)), expected, rtol=LOSS_RTOL)
    trained.step(second)  # the copy does not share the donated state
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), whole)


@pytest.mark.multidevice
def test_tokens_in_one_array_train_like_inputs_and_targets() -> None:
    batch = batches(1)[0]
    tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    loss = auto_shard(build, optimizer=OPTIMIZER).step(tokens).loss
    np.testing.assert_allclose(float(loss), single_device_losses(1)[0], rtol=LOSS_RTOL)


def test_explain_names_every_strategy_of_the_plan(plan: Plan) -> None:
    text = auto_shard(build, plan=plan).explain()
    assert "1 stage of 8 GPUs" in text
    assert [line.split()[1] for line in text.splitlines()[2:6]] == ["embed", "layers.*", "layers.*", "head"]


def test_plan_given_as_a_file_is_the_plan_in_it(plan: Plan, tmp_path: Path) -> None:
    path = save_plan(plan, tmp_path / "plan.json")
    assert auto_shard(build, plan=path).plan == plan
    assert auto_shard(build, plan=str(path)).plan == plan


def pipelined(plan: Plan, microbatches: int = 4) -> Plan:
    """Two stages of unlike layers, in microbatches."""
    halves = ((("embed", Strategy(dp=4, zero=3)), ("layers.*", Strategy(tp=2, dp=2))),) + (
        (("layers.*", Strategy(dp=4, zero=1, remat="full")), ("head", Strategy(tp=4))),
    )
    stages = tuple(
        Stage(devices=4, runs=tuple(PlanRun(kind=kind, count=1, strategy=strategy) for kind, strategy in half))
        for half in halves
    )
    return Plan(model=plan.model, cluster=CLUSTER, global_batch=BATCH, microbatches=microbatches, stages=stages)


@pytest.mark.multidevice
def test_pipelined_plan_trains_evaluates_and_hands_everything_back(plan: Plan) -> None:
    trained = auto_shard(build, plan=pipelined(plan), optimizer=OPTIMIZER)
    first, second, third = batches(3)
    losses = [float(trained.step(batch).loss) for batch in (first, second)]
    kept, expected = trained.neutral_state(), float(trained.eval(third))
    np.testing.assert_allclose([*losses, expected], single_device_losses(3), rtol=LOSS_RTOL)
    assert trained.process_rows == tuple(range(BATCH))
    abstract = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), trained.abstract_state())
    assert jax.tree.leaves(abstract) == jax.tree.leaves(jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), kept))
    model = trained.model
    assert type(model) is Llama
    graph, state = nnx.split(model)
    loss = jax.jit(lambda state, batch: next_token_loss(nnx.merge(graph, state), batch))
    np.testing.assert_allclose(float(loss(state, third)), expected, rtol=LOSS_RTOL)
    result = trained.step(third)
    trained.restore_state(kept)
    np.testing.assert_array_equal(trained.eval(third), np.float32(expected))
    again = trained.step(third)
    assert (again.step, float(again.loss)) == (result.step, float(result.loss))
    assert result.step == 3
    assert float(result.loss) == pytest.approx(expected, rel=1e-6)


def test_plan_for_other_devices_is_refused_before_any_compile(plan: Plan) -> None:
    other = Cluster(nodes=1, gpus_per_node=4, gpu="cpu")
    strategy = Strategy(dp=4)
    stage = Stage(devices=4, runs=tuple(PlanRun(kind=k, count=1, strategy=strategy) for k, _ in plan.layers()))
    foreign = Plan(model=plan.model, cluster=other, global_batch=BATCH, stages=(stage,))
    with pytest.raises(DeviceMismatchError, match=r"4 devices\), 8 are visible.*--mesh 1x8"):
        auto_shard(build, plan=foreign)


def test_cluster_of_other_devices_is_refused() -> None:
    with pytest.raises(DeviceMismatchError, match="2x8 has 16 devices, 8 are visible"):
        auto_shard(build, cluster=Cluster(nodes=2, gpus_per_node=8))


def test_plan_of_another_model_is_refused_with_both_structures(plan: Plan) -> None:
    wider = LlamaConfig(vocab=64, embed=64, mlp=64, layers=2, heads=4, kv_heads=2, seq=SEQ, dtype="float32")
    trained = auto_shard(lambda: Llama(wider, rngs=nnx.Rngs(0)), plan=plan)
    with pytest.raises(PlanError, match="made for model 'small'"):
        trained.prepare(batches(1)[0])


@pytest.mark.parametrize("samples", [8, 17])
def test_batch_of_another_size_than_the_plans_is_refused(plan: Plan, samples: int) -> None:
    batch = {name: np.zeros((samples, SEQ), np.int32) for name in ("inputs", "targets")}
    with pytest.raises(PlanError, match=f"got a batch of {samples} samples; expected 16"):
        auto_shard(build, plan=plan).step(batch)


def test_batch_whose_leaves_disagree_is_refused(plan: Plan) -> None:
    batch = {"inputs": np.zeros((16, SEQ), np.int32), "targets": np.zeros((8, SEQ), np.int32)}
    with pytest.raises(PlanError, match=r"\[8, 16\] samples"):
        auto_shard(build, plan=plan).step(batch)


def test_plan_and_state_before_the_first_batch_say_what_to_do() -> None:
    trained = auto_shard(build)
    for attribute in ("plan", "state", "model"):
        with pytest.raises(GalvatronError, match=r"prepare\(batch\)"):
            getattr(trained, attribute)


# ------------------------------------------------------------------------------------------------------------ any model
def one_stage(case: Case, strategy: Strategy, microbatches: int = 1) -> Plan:
    """Return the plan of one strategy for all layers of a model of the zoo."""
    samples = jax.tree.leaves(case.spec)[0].shape[0]
    analysis = analyse_model(case.build, case.loss, abstract_batch(case.batch, samples // microbatches))
    runs = tuple(PlanRun(kind=s.kind, count=1, strategy=strategy) for s in analysis.cut.segments)
    return Plan(
        model=model_reference(analysis.profile),
        cluster=Cluster(nodes=1, gpus_per_node=8, gpu="cpu"),
        global_batch=samples,
        microbatches=microbatches,
        stages=(Stage(devices=8, runs=runs),),
    )


@pytest.mark.parametrize(
    "name",
    ["gpt2 linen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2 scanned", "auxiliary results"))],
)
def test_one_step_of_any_model_is_the_step_of_one_device(name: str) -> None:
    case = ZOO[name]()
    trained = auto_shard(
        case.build, loss=case.loss, optimizer=optax.sgd(0.1), plan=one_stage(case, Strategy(dp=8, zero=3))
    )
    loss = trained.step(case.batch).loss
    model = analyse_model(case.build, case.loss, case.spec).trace.model
    parameters, state = jax.jit(model.build)()

    def objective(parameters: Any) -> tuple[jax.Array, Any]:
        value, after = model.run(parameters, state, case.batch)
        return value[0] if isinstance(value, tuple) else value, after

    (expected, after), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(parameters)
    np.testing.assert_allclose(loss, expected, rtol=case.tolerance)
    updated = model.restore(jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), after)
    assert type(trained.model) is type(updated)
    pairs = [nnx.state(m) if isinstance(m, nnx.Module) else m for m in (trained.model, updated)]
    for got, wanted in zip(*map(jax.tree.leaves, pairs), strict=True):
        if not jax.numpy.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(got, wanted, rtol=case.tolerance, atol=case.tolerance)


def test_statistics_of_several_microbatches_are_warned_of() -> None:
    case = ZOO["convnet linen"]()
    batch = jax.tree.map(lambda x: np.concatenate([x, x]), case.batch)
    doubled = dataclasses.replace(case, batch=batch)
    trained = auto_shard(case.build, loss=case.loss, plan=one_stage(doubled, Strategy(dp=8), microbatches=2))
    with pytest.warns(UserWarning, match=r"batch_stats.*statistics of each of 2 microbatches of 8 samples"):
        trained.prepare(batch)


def test_explain_says_plan_and_analysis_after_the_first_batch() -> None:
    case = ZOO["pure"]()
    trained = auto_shard(case.build, loss=case.loss, plan=one_stage(case, Strategy(dp=8)))
    assert "repeated equations" not in trained.explain()
    trained.prepare(case.batch)
    assert "layers   found as repeated equations" in trained.explain()
