"""Pipelined plans that cannot run are refused before anything is compiled, with what to do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import optax
import pytest

from galvatron_jax import auto_shard
from galvatron_jax.errors import DeviceMismatchError, PlanError, UnsupportedError
from galvatron_jax.runtime import PipelinePrograms
from tests.runtime.pipeline.planned import BATCH, Case, analysis_of, model_of, plan_of

pytestmark = pytest.mark.multidevice


@pytest.fixture(autouse=True)
def _compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr("jax._src.compiler.backend_compile_and_load", refuse)


def test_interleaved_plan_needs_microbatches_by_the_slices() -> None:
    plan = plan_of(Case("d.3 t2 | s4 | d.1r | d t2", schedule="interleaved-1f1b", chunks=2))
    odd = msgspec.structs.replace(plan, global_batch=3, microbatches=3)
    with pytest.raises(PlanError, match="2 device slices do not divide microbatches=3"):
        auto_shard(model_of("llama").build, plan=odd)


def test_plan_for_other_devices_names_both_numbers() -> None:
    with pytest.raises(DeviceMismatchError, match=r"4 devices\), 8 are visible"):
        auto_shard(model_of("llama").build, plan=plan_of(Case("d d d | d d d"), devices=4))


def test_microbatch_that_data_parallelism_does_not_divide_is_named() -> None:
    plan = msgspec.structs.replace(plan_of(Case("d d d | d d d")), microbatches=8)
    with pytest.raises(PlanError, match="microbatch of 2 samples does not divide by dp=4"):
        auto_shard(model_of("llama").build, plan=plan).prepare(model_of("llama").batch)


def test_plan_of_another_model_is_refused() -> None:
    trained = auto_shard(model_of("t5").build, loss=model_of("t5").loss, plan=plan_of(Case("d d d | d d d")))
    with pytest.raises(PlanError, match="made for model 'llama'"):
        trained.prepare(model_of("t5").batch)


def test_optimizer_that_cannot_be_cut_is_refused_with_a_way_out() -> None:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        flat, unravel = jax.flatten_util.ravel_pytree(updates)
        return unravel(flat / jnp.linalg.norm(flat)), state

    mixing = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    with pytest.raises(UnsupportedError, match="mixes whole arrays of several parameters.*--no-pp"):
        PipelinePrograms(analysis_of("llama", BATCH // 4), plan_of(Case("d d d | d d d")), mixing, jax.devices())
