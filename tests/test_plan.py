"""Plans: compact text, checks that report every violation, ZeRO's choice of dimension."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from galvatron_jax.cluster import Cluster
from galvatron_jax.errors import DeviceMismatchError, DocumentError, PlanError
from galvatron_jax.plan import (
    Plan,
    PlanRun,
    Stage,
    Strategy,
    check_devices,
    check_plan,
    load_plan,
    model_reference,
    save_plan,
    strategy_violations,
    zero_dim,
)
from galvatron_jax.profile import ModelProfile, Parameter
from tests.support.plans import small_plan
from tests.support.toy_models import llama_like_profile

replace = msgspec.structs.replace


@pytest.fixture
def model() -> ModelProfile:
    return llama_like_profile(layers=4, embed=32, heads=4, head_dim=8, mlp=96, vocab=64, seq=64)


@pytest.fixture
def plan(model: ModelProfile) -> Plan:
    return replace(small_plan(), model=model_reference(model))


def with_strategy(plan: Plan, run: int, strategy: Strategy) -> Plan:
    """``plan`` with the strategy of one run of its first stage replaced."""
    runs = list(plan.stages[0].runs)
    runs[run] = replace(runs[run], strategy=strategy)
    return replace(plan, stages=(replace(plan.stages[0], runs=tuple(runs)), *plan.stages[1:]))


def test_check_plan_good_plan_passes(plan: Plan, model: ModelProfile) -> None:
    check_plan(plan, model)
    assert plan.microbatch_size == 16
    assert [kind for kind, _ in plan.layers()] == ["embed", *["layers.*"] * 4, "head"]
    assert plan.stages[0].layer_count == 6


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (Strategy(), "one device"),
        (Strategy(tp=2, sp=True, dp=4, zero=3, remat="full"), "tp2+sp dp4 zero3 remat"),
        (Strategy(tp=8), "tp8"),
        (Strategy(dp=16, zero=1), "dp16 zero1"),
    ],
)
def test_strategy_text_is_compact(strategy: Strategy, text: str) -> None:
    assert str(strategy) == text


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        (Strategy(tp=8), "tp=8 does not divide heads=4"),
        (Strategy(tp=3), "tp=3 does not divide heads=4"),
        (Strategy(dp=3), "microbatch of 16 samples does not divide by dp=3"),
        (Strategy(zero=3), "zero=3 needs dp > 1"),
        (Strategy(sp=True, dp=2), "sp needs tp > 1"),
        (Strategy(tp=128, sp=True), "tp=128 does not divide seq=64"),
    ],
)
def test_strategy_violations_names_the_reason(model: ModelProfile, strategy: Strategy, told: str) -> None:
    assert any(told in text for text in strategy_violations(model.kind("layers.*"), strategy, 16))


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(tp=4, sp=True, dp=2, zero=2, remat="full"), Strategy(dp=16)])
def test_strategy_violations_legal_is_empty(model: ModelProfile, strategy: Strategy) -> None:
    assert strategy_violations(model.kind("layers.*"), strategy, 16) == []


def test_strategy_violations_kind_without_candidates_refuses_tp(model: ModelProfile) -> None:
    kind = replace(model.kind("layers.*"), candidates=())
    assert strategy_violations(kind, Strategy(tp=2), 16) == ["tp=2: no class of kind 'layers.*' may be sharded"]


def test_check_plan_reports_all_violations_at_once(plan: Plan, model: ModelProfile) -> None:
    """Case 4 of the fault list: degrees, layers, divisibility and an empty stage in one message."""
    bad = with_strategy(plan, 1, Strategy(tp=3, dp=2))
    bad = replace(bad, microbatches=3, stages=(*bad.stages, Stage(devices=4, runs=())))
    with pytest.raises(PlanError) as caught:
        check_plan(bad, model, where="plan.json")
    message = str(caught.value)
    for told in (
        "microbatches=3 does not divide global_batch=32",
        "stages use 8 devices, the cluster 1x4 has 4",
        "stages[1] has no layers",
        "stages[0].runs[1]: tp=3 * dp=2 is not 4 devices",
        "stages[0].runs[1]: tp=3 does not divide heads=4",
        "stages[0].runs[0]: microbatch of 10 samples does not divide by dp=4",
    ):
        assert told in message
    assert message.startswith("plan.json: ")
    assert "python -m galvatron_jax.search --mesh 1x4" in message
    assert caught.value.exit_code == 2


def test_check_plan_without_stages_raises(plan: Plan) -> None:
    with pytest.raises(PlanError, match="stages: the plan has none"):
        check_plan(replace(plan, stages=()))


def test_check_plan_unequal_stages_raises(plan: Plan) -> None:
    run = PlanRun(kind="embed", count=1, strategy=Strategy())
    stages = (Stage(devices=1, runs=(run,)), Stage(devices=3, runs=(replace(run, strategy=Strategy(dp=3)),)))
    with pytest.raises(PlanError, match="stages have 1, 3 devices, not equally many"):
        check_plan(replace(plan, stages=stages))


def test_check_plan_stage_that_cuts_nodes_unevenly_raises(plan: Plan) -> None:
    run = PlanRun(kind="embed", count=1, strategy=Strategy(dp=9))
    stages = (Stage(devices=9, runs=(run,)),) * 2
    with pytest.raises(PlanError, match="whole nodes, or an even part of one node"):
        check_plan(replace(plan, cluster=Cluster(nodes=3, gpus_per_node=6), stages=stages))


def test_check_plan_other_layer_count_shows_both(plan: Plan, model: ModelProfile) -> None:
    longer = replace(model, layers=tuple(replace(r, count=r.count + 1) for r in model.layers))
    with pytest.raises(PlanError, match=r"the plan has 1 embed, 4 layers\.\*, 1 head, the model 2 embed, 5 layers"):
        check_plan(plan, longer)


def test_check_plan_other_structure_names_both_models(plan: Plan, model: ModelProfile) -> None:
    other = replace(model, name="other", structure="ffff")
    with pytest.raises(PlanError, match=r"made for model 'toy' \(structure .*\), got 'other' \(structure ffff\)"):
        check_plan(plan, other)


def test_check_devices_other_number_raises_environment_error(plan: Plan) -> None:
    check_devices(plan, 4)
    with pytest.raises(DeviceMismatchError, match=r"1x4 \(4 devices\), 8 are visible") as caught:
        check_devices(plan, 8)
    assert "--mesh 1x8" in str(caught.value)
    assert caught.value.exit_code == 4


def test_save_plan_then_load_plan_gives_equal_plan(plan: Plan, model: ModelProfile, tmp_path: Path) -> None:
    path = save_plan(plan, tmp_path / "plan.json")
    assert load_plan(path) == plan
    assert load_plan(str(path), model=model) == plan


def test_save_plan_that_contradicts_itself_writes_nothing(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        save_plan(replace(plan, microbatches=5), tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_load_plan_edited_by_hand_names_file_and_violation(plan: Plan, tmp_path: Path) -> None:
    path = save_plan(plan, tmp_path / "plan.json")
    path.write_text(path.read_text().replace('"microbatches": 2', '"microbatches": 5'))
    with pytest.raises(PlanError, match=r"plan\.json: 1 violation:\n  - microbatches=5 does not divide"):
        load_plan(path)


def test_load_plan_of_another_document_raises(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text('{"schema_version": 1, "name": "cpu"}')
    with pytest.raises(DocumentError, match="expected a valid plan"):
        load_plan(path)


@pytest.mark.parametrize(
    ("dims", "tensor_shards", "dp", "chosen"),
    [
        ((("embed",), ("mlp",)), {}, 4, 0),
        ((("mlp",), ("embed",)), {"mlp": 4}, 4, 0),  # 96 / 4
        ((("mlp",), ("embed",)), {"mlp": 4}, 16, 1),  # 24 does not divide by 16
        ((("embed",), ("mlp",)), {}, 3, 1),  # 32 does not divide by 3
        ((("heads", "head_dim"), (3,)), {}, 8, 0),  # a product of classes
        (((5,), (7,)), {}, 2, None),
        ((), {}, 2, None),  # a scalar
        ((("embed",),), {}, 64, None),
    ],
)
def test_zero_dim_is_the_first_that_divides(
    dims: tuple[tuple[str | int, ...], ...], tensor_shards: dict[str, int], dp: int, chosen: int | None
) -> None:
    parameter = Parameter(path="w", dtype="float32", compute_dtype="bfloat16", dims=dims)
    sizes = {"embed": 32, "mlp": 96, "heads": 4, "head_dim": 8}
    assert zero_dim(parameter, sizes, tensor_shards, dp) == chosen


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        (Strategy(tp=2, ulysses=2, dp=2), "tp=2 and ulysses=2 exclude each other"),
        (Strategy(ulysses=2, dp=4), "ulysses is not legal"),
        (Strategy(dp=8, replicas=2), "replicas=2 needs zero > 0"),
        (Strategy(dp=8, zero=3, replicas=3), "replicas=3 does not divide dp=8"),
        (Strategy(dp=8, zero=3, replicas=8), "leaves nothing to shard over"),
        (Strategy(dp=8, remat="dots"), "remat=dots is not known"),
    ],
)
def test_strategy_violations_of_ulysses_hsdp_and_dots(model: ModelProfile, strategy: Strategy, problem: str) -> None:
    found = strategy_violations(model.kind("layers.*"), strategy, 16)
    assert any(problem in text for text in found), found


def test_zero_ranks_count_the_ranks_that_hold_the_same_weights() -> None:
    assert Strategy(dp=8, zero=3, replicas=2).zero_ranks == 4
    assert Strategy(dp=2, ulysses=4, zero=3).zero_ranks == 8
    assert str(Strategy(ulysses=4, dp=4, zero=3, replicas=2, remat="dots")) == "ulysses4 dp4 zero3 hsdp2 remat-dots"


def test_interleaved_plan_counts_each_slice_once(plan: Plan, model: ModelProfile) -> None:
    runs = [
        [
            PlanRun(kind="embed", count=1, strategy=Strategy(dp=4)),
            PlanRun(kind="layers.*", count=1, strategy=Strategy(dp=4)),
        ],
        [PlanRun(kind="layers.*", count=1, strategy=Strategy(dp=4))],
        [PlanRun(kind="layers.*", count=1, strategy=Strategy(dp=4))],
        [
            PlanRun(kind="layers.*", count=1, strategy=Strategy(dp=4)),
            PlanRun(kind="head", count=1, strategy=Strategy(dp=4)),
        ],
    ]
    stages = tuple(Stage(devices=4, runs=tuple(r)) for r in runs)
    cluster = Cluster(nodes=1, gpus_per_node=8, gpu="h100")
    good = replace(
        plan, cluster=cluster, global_batch=16, microbatches=4, schedule="interleaved-1f1b", chunks=2, stages=stages
    )
    check_plan(good, model)
    assert good.slices == 2
    with pytest.raises(PlanError, match="2 device slices do not divide microbatches=1"):
        check_plan(replace(good, microbatches=1))
    with pytest.raises(PlanError, match="chunks=2 needs schedule interleaved-1f1b"):
        check_plan(replace(good, schedule="1f1b"))
    with pytest.raises(PlanError, match="needs chunks > 1"):
        check_plan(replace(good, chunks=1))
