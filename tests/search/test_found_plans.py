"""Every plan found runs: searched on paper, trained on virtual devices, equal to the unmodified model on one device.

Each setting searches the whole space left by its limits, on a made-up GPU whose numbers make the wanted family win or
at least stand; the plan found goes through the runtime unchanged. Clusters use all their devices, powers of two or not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.analysis import Analysis, analyse_model
from galvatron_jax.cluster import parse_cluster
from galvatron_jax.plan import Plan, ScheduleName, Training, check_plan
from galvatron_jax.profile import Link
from galvatron_jax.runtime import PipelinePrograms, StagePrograms, plan_model, stage_mesh
from galvatron_jax.search._engine import Engine
from galvatron_jax.search._find import search
from galvatron_jax.search._plan_building import peak_bytes
from galvatron_jax.search._pricing import Problem
from galvatron_jax.search._rules import Rule, forbid, pin
from galvatron_jax.search._space import Limits
from galvatron_jax.search._split import split_layers
from tests.support.small_models import SmallModel, small_llama
from tests.support.toy_models import toy_hardware
from tests.zoo import ZOO
from tests.zoo._case import language_model, tokens
from tests.zoo.gpt2 import GPT2

pytestmark = [pytest.mark.multidevice, pytest.mark.slow]

BATCH, STEPS = 24, 3
"""Samples, so that 2, 3, 4, 6 and 8 ranks share them evenly."""
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))
LOSS_TOLERANCE = 3e-6
"""Relative. Float32 has 1.2e-7; means over some hundred positions, taken in another order, after up to two updates."""
PARAMETER_TOLERANCE = 1e-6
"""Absolute, of values below 2 that moved by up to 1e-2: roundings of each (1.2e-7), and of sums in another order that
the clipped gradient carries over three steps."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One search."""

    model: str
    mesh: str
    pins: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    stages: tuple[int, ...] | None = None
    schedules: tuple[ScheduleName, ...] | None = None
    microbatches: tuple[int, ...] | None = None
    memory: float = 1.0
    """Share of what the plan without a budget needs."""


SETTINGS = {
    "llama, free": Setting("llama", "2x4", microbatches=(2,)),
    "llama, two thirds of the memory": Setting("llama", "2x4", memory=0.66),
    "llama, tp with sp on three nodes of two": Setting("llama", "3x2", pins=("layers.*: tp=2, sp",)),
    "llama, tp 3": Setting("llama", "2x3", pins=("layers.*: tp=3",), microbatches=(2,), stages=(1,)),
    "llama, tp 6, zero 3 at the ends": Setting("llama", "1x6", pins=("layers.*: tp=6", "head: zero=3")),
    "llama, ulysses": Setting("llama", "2x4", pins=("layers.*: ulysses=2, zero=3, remat=full",), stages=(1,)),
    "llama, hsdp": Setting("llama", "3x2", pins=("replicas=3, zero=2|3",), stages=(1,), microbatches=(2,)),
    "llama, each layer its own": Setting(
        "llama", "1x6", pins=("layer 1: tp=6", "layer 2: tp=2, sp, zero=1", "layer 3: zero=3, remat=dots"), stages=(1,)
    ),
    "llama, two stages": Setting("llama", "2x4", stages=(2,), schedules=("1f1b",), microbatches=(4,), memory=0.8),
    "llama, three stages of two": Setting("llama", "3x2", stages=(3,), microbatches=(6,), schedules=("1f1b",)),
    "llama, interleaved": Setting("llama", "1x6", stages=(2,), schedules=("interleaved-1f1b",), microbatches=(4,)),
    "gpt2, free": Setting("gpt2", "1x6", microbatches=(1, 2)),
    "gpt2, gpipe": Setting("gpt2", "2x3", stages=(2,), schedules=("gpipe",), microbatches=(4,)),
    "moe, tight": Setting("moe", "2x4", memory=0.7),
    "moe, stages": Setting("moe", "2x3", stages=(2,), microbatches=(4,), schedules=("1f1b",)),
    "t5, tight": Setting("t5", "3x2", memory=0.75, stages=(1,)),
    "t5, tp": Setting("t5", "2x4", pins=("decoder.*: tp=2",), forbids=("zero=0, dp>1",), stages=(1,)),
}


@functools.cache
def model_of(name: str) -> SmallModel:
    """A model with a batch of ``BATCH`` samples; heads, widths and vocabulary divide by 2, 3 and mostly 4."""
    if name == "llama":
        sizes = {"layers": 4, "vocab": 96, "embed": 96, "mlp": 96, "heads": 12, "kv_heads": 6}
        return small_llama(batch=BATCH, seq=12, **sizes)
    if name == "gpt2":
        return SmallModel(
            lambda: GPT2(layers=3, embed=48, heads=6, dropout=0.0, rngs=nnx.Rngs(0)), language_model, tokens(BATCH)
        )
    case = ZOO[{"moe": "moe alternating", "t5": "t5"}[name]]()
    batch = jax.tree.map(lambda x: np.concatenate([np.roll(x, k, axis=-1) for k in range(BATCH // len(x))]), case.batch)
    return SmallModel(case.build, case.loss, batch)


@functools.cache
def analysed(name: str, samples: int) -> Analysis:
    model = model_of(name)
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct((samples, *x.shape[1:]), x.dtype), model.batch)
    return analyse_model(model.build, model.loss, spec, name=name)


HARDWARE = toy_hardware(
    matmul_flops_per_s={"bfloat16": 1e10, "float32": 1e10},
    intra_node=Link(bandwidth_bytes_per_s=1e11, latency_s=1e-6),
    inter_node=Link(bandwidth_bytes_per_s=2.5e10, latency_s=1e-5),
)
"""Compute so slow that toy models are worth spreading."""


@functools.cache
def found(name: str) -> Plan:
    """The optimum of a setting."""
    setting = SETTINGS[name]
    plan = optimum(setting, 1e18)
    return plan if setting.memory == 1 else optimum(setting, int(setting.memory * peak_bytes(plan)))


def optimum(setting: Setting, budget_bytes: float) -> Plan:
    rules: tuple[Rule, ...] = (*map(pin, setting.pins), *map(forbid, setting.forbids))
    limits = Limits(microbatches=setting.microbatches, stages=setting.stages, schedules=setting.schedules, rules=rules)
    split = split_layers(
        Problem(
            model=analysed(setting.model, BATCH).profile,
            cluster=parse_cluster(setting.mesh),
            hardware=HARDWARE,
            training=Training(),
            budget_bytes=budget_bytes,
            limits=limits,
        )
    )
    outcome, plan = search(Engine(split.problem, (BATCH,)))
    assert plan is not None
    assert not outcome.stopped
    return split.restore(plan)


FAMILIES: dict[str, Callable[[Plan], bool]] = {
    "one stage": lambda plan: len(plan.stages) == 1,
    "1f1b": lambda plan: len(plan.stages) > 1 and plan.schedule == "1f1b",
    "gpipe": lambda plan: len(plan.stages) > 1 and plan.schedule == "gpipe",
    "interleaved": lambda plan: plan.chunks > 1,
    "uneven stages": lambda plan: len({sum(run.count for run in stage.runs) for stage in plan.stages}) > 1,
    "accumulation": lambda plan: plan.microbatches > 1,
    "tp": lambda plan: any(s.tp > 1 and not s.sp for _, s in plan.layers()),
    "tp 3": lambda plan: any(s.tp == 3 for _, s in plan.layers()),
    "sp": lambda plan: any(s.sp for _, s in plan.layers()),
    "ulysses": lambda plan: any(s.ulysses > 1 for _, s in plan.layers()),
    "hsdp": lambda plan: any(s.replicas > 1 for _, s in plan.layers()),
    "mixed degrees": lambda plan: len({s.tp for _, s in plan.layers()}) > 2,
    **{f"zero {z}": lambda plan, z=z: any(s.zero == z for _, s in plan.layers()) for z in range(4)},  # type: ignore[misc]
    **{f"remat {r}": lambda plan, r=r: any(s.remat == r for _, s in plan.layers()) for r in ("none", "dots", "full")},  # type: ignore[misc]
}


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_find_plans_of_every_family(family: str) -> None:
    assert any(FAMILIES[family](found(name)) for name in SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_plan_found_trains_like_one_device(name: str) -> None:
    setting, plan = SETTINGS[name], found(name)
    analysis = analysed(setting.model, plan.microbatch_size)
    check_plan(plan, analysis.profile)
    devices = jax.devices()[: plan.cluster.devices]
    programs: Any = (
        PipelinePrograms(analysis, plan, OPTIMIZER, devices)
        if len(plan.stages) > 1
        else StagePrograms(plan_model(analysis, plan, stage_mesh(plan.cluster, devices)), OPTIMIZER, plan.microbatches)
    )
    state, losses = programs.adopt(*analysis.trace.model.build()), []
    for batch in batches(model_of(setting.model)):
        state, metrics = programs.train(state, programs.place_batch(jax.tree.leaves(batch)))
        losses.append(float(metrics.loss))
    expected_losses, expected = on_one_device(setting.model)
    np.testing.assert_allclose(losses, expected_losses, rtol=LOSS_TOLERANCE)
    parameters = by_path(programs.to_user(state).parameters)
    assert parameters.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(parameters[path], value, rtol=0, atol=PARAMETER_TOLERANCE, err_msg=path)


def batches(model: SmallModel) -> list[Any]:
    """The model's samples in three orders."""
    orders = [np.random.default_rng(k).permutation(BATCH) for k in range(STEPS)]
    return [jax.tree.map(lambda x, o=order: np.roll(np.asarray(x)[o], o[0], axis=-1), model.batch) for order in orders]


@functools.cache
def on_one_device(name: str) -> tuple[list[float], dict[str, np.ndarray[Any, Any]]]:
    """Losses and parameters of plain training with the model as it is."""
    user = analysed(name, BATCH).trace.model
    parameters, rest = user.build()

    @jax.jit
    def step(parameters: Any, state: Any, batch: Any) -> Any:
        loss, gradients = jax.value_and_grad(lambda p: user.run(p, rest, batch)[0])(parameters)
        updates, state = OPTIMIZER.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    state, losses = OPTIMIZER.init(parameters), []
    for batch in batches(model_of(name)):
        parameters, state, loss = step(parameters, state, batch)
        losses.append(float(loss))
    return losses, by_path(parameters)


def by_path(tree: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
