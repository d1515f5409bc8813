"""The compiling subprocess and what is read from it."""

from __future__ import annotations

import msgspec
import pytest

from galvatron_jax.errors import ModelError, PlanError, ToolchainError
from galvatron_jax.plan import Plan
from galvatron_jax.verify import _compile, check_toolchain
from galvatron_jax.verify._compile import compile_plan
from galvatron_jax.verify._exchange import CompiledMemory, Failure


def test_missing_compiler_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compile, "_PLUGINS", {"jax_plugins.of_another_vendor": "12"})
    with pytest.raises(
        ToolchainError, match=r"pip install --no-deps jax-cuda12-plugin==([\d.]+) jax-cuda12-pjrt==\1$"
    ) as caught:
        check_toolchain()
    assert caught.value.exit_code == 4


def test_allocated_counts_gaps_and_is_never_below_the_peak() -> None:
    memory = CompiledMemory(arguments=100, outputs=90, aliased=80, temporaries=50, peak=155)
    assert memory.allocated == 160
    assert msgspec.structs.replace(memory, peak=170).allocated == 170


def test_warnings_are_those_about_memory_once_each() -> None:
    cannot = (
        "hlo_rematerialization.cc:3231] Can't reduce memory use below 5.74GiB (6160485373 bytes) by rematerialization;"
        " only reduced to 6.94GiB (7453143096 bytes), down from 7.01GiB (7523381356 bytes) originally"
    )
    involuntary = "spmd_partitioner.cc:652] [SPMD] Involuntary full rematerialization. The compiler cannot go from ..."
    lines = [f"W1122 21:05:10.838532   24119 {cannot}", "I0000 cudart_stub.cc:31] no drivers"]
    lines += [f"W1122 {involuntary}", f"W1123 {involuntary}"]
    first, second = _compile._warnings("\n".join(lines))
    assert first.startswith("Can't reduce memory use below 5.74GiB")
    assert "Involuntary full rematerialization" in second


def test_clones_of_xla_are_counted_and_those_of_jax_are_not() -> None:
    text = """\
  %fusion.7.remat = f32[8]{0} fusion(%a), metadata={op_name="jit(_train)/jvp(layers.0)/mul"}
  ROOT %fusion.7.remat2 = f32[8]{0} fusion(%a)
  %remat_thing = f32[8]{0} fusion(%fusion.7.remat), metadata={op_name="jit(_train)/rematted_computation/mul"}
"""
    assert len(_compile.CLONE.findall(text)) == 2


def test_own_error_of_the_subprocess_is_raised_as_what_it_was() -> None:
    error = _compile._raised_again(
        Failure(kind="PlanError", problem="bad", expected="good", where="plan", action="fix")
    )
    assert isinstance(error, PlanError)
    assert error.message == "plan: bad; expected good; fix"


@pytest.mark.parametrize("kind", ["", "errors", "OSError"])
def test_any_other_error_of_the_subprocess_is_the_compilers(kind: str) -> None:
    error = _compile._raised_again(Failure(kind=kind, problem="XlaRuntimeError: no", details="Traceback ..."))
    assert isinstance(error, ToolchainError)
    assert error.__notes__ == ["Traceback ..."]


def test_too_little_time_ends_the_subprocess(gpu_compiler: None, tiny_plan: Plan) -> None:
    plan = msgspec.structs.replace(tiny_plan, cluster=msgspec.structs.replace(tiny_plan.cluster, gpu="h100"))
    with pytest.raises(ToolchainError, match=r"took longer than 0.01 s; .*--time-limit"):
        compile_plan(plan, time_limit_s=0.01)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("tests.verify.user_model:absent", "has no attribute 'absent'"),
        ("tests.verify.user_model:not_three_things", "cannot unpack"),
    ],
)
def test_wrong_model_function_is_a_model_error(gpu_compiler: None, tiny_plan: Plan, model: str, problem: str) -> None:
    plan = msgspec.structs.replace(tiny_plan, cluster=msgspec.structs.replace(tiny_plan.cluster, gpu="h100"))
    with pytest.raises(ModelError, match=problem):
        compile_plan(plan, model=model)


def test_plan_of_another_model_is_refused_before_compiling(gpu_compiler: None, tiny_plan: Plan) -> None:
    plan = msgspec.structs.replace(tiny_plan, cluster=msgspec.structs.replace(tiny_plan.cluster, gpu="h100"))
    with pytest.raises(PlanError, match="made for model 'llama-tiny'"):
        compile_plan(plan, model="tests.verify.user_model:llama")
