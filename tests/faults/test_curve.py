"""Case 16 at length: 200 steps on real text, killed twice, each time on under another plan, as on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from galvatron_jax.analysis import analyse_model, split_parameters
from galvatron_jax.cluster import Cluster
from galvatron_jax.models import Llama
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference, save_plan
from galvatron_jax.train import RunConfig, load_config
from galvatron_jax.train._build import build_optimizer, build_subject
from galvatron_jax.train.data import Loader, open_windows, split_windows
from tests.faults.conftest import Runs
from tests.faults.test_resume import other_plan

pytestmark = [pytest.mark.multidevice, pytest.mark.slow, pytest.mark.timeout(1600)]

STEPS = 200
LOSS_RTOL = 2e-5
"""Float32 sums in another order are 1e-7 apart; measured after 200 steps of Adam: at most 2e-6."""

PLANS: tuple[tuple[tuple[Strategy, ...], dict[str, int]], ...] = (
    ((Strategy(dp=8, zero=3), Strategy(tp=2, dp=4, zero=1), Strategy(tp=4, dp=2)), {}),
    ((Strategy(tp=2, dp=4), Strategy(dp=8, zero=3, remat="full"), Strategy(dp=8)), {"microbatches": 2}),
    ((Strategy(dp=4), Strategy(tp=2, dp=2, sp=True), Strategy(dp=4, zero=3)), {"stages": 2, "microbatches": 2}),
)
KILLS = (70, 145)


def test_loss_curve_over_kills_and_plans_is_that_of_one_device(runs: Runs, tmp_path: Path) -> None:
    run = runs.new(run={"steps": STEPS, "devices": 8}, checkpoint={"every": 20}, log={"every": 50})
    config = load_config(run.file)
    base = plain_plan(config)
    for number, (strategies, shape) in enumerate(PLANS):
        plan = save_plan(other_plan(base, *strategies, **shape), tmp_path / f"plan{number}.json")
        faults: list[dict[str, Any]] = [{"kind": "kill", "step": step} for step in KILLS[number : number + 1]]
        ended = run.apart("--plan", str(plan), faults=faults)
        assert ended.returncode == (-9 if faults else 0), ended.stderr
        assert ("goes on under 1x8 cpu" in ended.stdout) == (number > 0)
    expected = one_device(config)
    found = [run.losses[step] for step in range(1, STEPS + 1)]
    print(f"largest relative difference {np.max(np.abs(np.divide(found, expected) - 1)):.2g}")
    np.testing.assert_allclose(found, expected, rtol=LOSS_RTOL)
    assert expected[-1] < 0.6 * expected[0]  # it learnt something


def plain_plan(config: RunConfig) -> Plan:
    """A plan of the model with its layers, to lay strategies over."""
    subject = build_subject(config.model)
    spec = jax.ShapeDtypeStruct((config.data.global_batch or 0, config.data.seq or 0), np.int32)
    profile = analyse_model(subject.build, subject.loss, {"inputs": spec, "targets": spec}, name="curve").profile
    runs = tuple(PlanRun(kind=run.kind, count=run.count, strategy=Strategy(dp=8)) for run in profile.layers)
    return Plan(
        model=model_reference(profile),
        cluster=Cluster(nodes=1, gpus_per_node=8, gpu="cpu"),
        global_batch=config.data.global_batch or 0,
        stages=(Stage(devices=8, runs=runs),),
    )


def one_device(config: RunConfig) -> list[float]:
    """Losses of plain training on one device: no plan, no sharding, none of our runtime."""
    subject, batch = build_subject(config.model), config.data.global_batch or 0
    windows, _ = open_windows(config.data, seq=config.data.seq or 0, vocab=subject.vocab)
    batches = Loader(split_windows(windows, config.data.held_out)[0], global_batch=batch, rows=range(batch))
    rule, _ = build_optimizer(config.optimizer, STEPS)
    model = subject.build()
    assert isinstance(model, Llama)
    graph, parameters, rest = split_parameters(model)

    @jax.jit
    def step(parameters: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        loss, gradients = jax.value_and_grad(lambda p: subject.loss(nnx.merge(graph, p, rest), batch))(parameters)
        updates, state = rule.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    state, losses = rule.init(parameters), []
    for _ in range(STEPS):
        parameters, state, loss = step(parameters, state, next(batches))
        losses.append(float(loss))
    return losses
