from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from galvatron_jax.plan import Plan, save_plan
from galvatron_jax.verify import _compile
from galvatron_jax.verify._cli import main

ROOT = Path(__file__).parents[2]
WRITE_PLAN = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference, save_plan
from tests.verify.user_model import llama

profile = analyse_model(*llama(), name="mine").profile
runs = tuple(PlanRun(kind=r.kind, count=r.count, strategy=Strategy(dp=8, zero=2)) for r in profile.layers)
plan = Plan(
    model=model_reference(profile), cluster=Cluster(nodes=2, gpus_per_node=4, gpu="a100-80g"),
    memory_budget_bytes=2**16, global_batch=8, stages=(Stage(devices=8, runs=runs),),
)
save_plan(plan, sys.argv[1])
"""


def test_help_answers_without_jax() -> None:
    code = (
        "import sys\nfrom galvatron_jax.verify._cli import main\n"
        "try: main(['--help'])\nfinally: print('jax' in sys.modules or 'numpy.random' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "exit status: 0 fits, 3 does not fit" in done.stdout
    assert done.stdout.rstrip().endswith("False")


def test_absent_plan_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-plan.json"]) == 2
    assert "no-such-plan.json: cannot read the plan" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["plan.json", "--no-such-flag"], ["plan.json", "--time-limit", "-3"]])
def test_wrong_arguments_are_bad_input_in_one_message(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("galvatron_jax.verify: error: ")
    assert error.count("\n") == 1


def test_missing_compiler_is_the_environments_fault(
    tmp_path: Path, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_compile, "_PLUGINS", {})
    assert main([str(save_plan(tiny_plan, tmp_path / "plan.json")), "--quiet"]) == 4
    assert "pip install --no-deps jax-cuda12-plugin==" in capsys.readouterr().err


@pytest.mark.slow
def test_own_model_that_does_not_fit_ends_with_status_3_and_json(gpu_compiler: None, tmp_path: Path) -> None:
    """The whole command, on a model of the user's own, with a budget of 64 KiB."""
    file = tmp_path / "plan.json"
    writing = [sys.executable, "-c", WRITE_PLAN, str(file)]
    subprocess.run(writing, cwd=ROOT, check=True, capture_output=True, timeout=120)
    command = [sys.executable, "-m", "galvatron_jax.verify", str(file)]
    command += ["--model", "tests.verify.user_model:llama", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 3, done.stderr
    data = json.loads(done.stdout)
    assert data["fits"] is False
    assert "more than the budget" in data["stages"][0]["problems"][0]
