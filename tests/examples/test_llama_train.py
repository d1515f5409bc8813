"""The Llama example from end to end, as a user starts it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str, timeout_s: float = 500) -> str:
    """Return stdout of ``python arguments``, run in the root of the repository."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def table(output: str) -> dict[int, float]:
    """Return loss by step from the printed table."""
    return {int(step): float(loss) for step, loss in re.findall(r"^ +(\d+) +(\d+\.\d{4}) ", output, re.MULTILINE)}


@pytest.mark.parametrize("start", [("examples/llama/train.py",), ("-m", "examples.llama.train")])
def test_train_starts_by_path_and_as_module(start: tuple[str, ...]) -> None:
    assert "--global-batch" in run_python(*start, "--help")


@pytest.mark.slow
@pytest.mark.multidevice
def test_train_tiny_llama_on_8_virtual_devices_lowers_the_loss() -> None:
    output = run_python("examples/llama/train.py", "--steps", "30", "--devices", "8")
    losses = table(output)
    held_out = re.search(r"held out +loss (\d+\.\d+)", output)
    assert held_out
    # Untrained, all 256 bytes are equally likely: log 256 = 5.55.
    assert losses[1] == pytest.approx(5.55, abs=0.1)
    assert losses[30] < 3.6
    assert float(held_out[1]) < 3.6
    assert "8 x virtual CPU devices" in output
    assert re.search(r"speed +\S+ m?s per step measured, \S+ m?s predicted", output)


@pytest.mark.slow
@pytest.mark.multidevice
def test_train_with_a_searched_plan_follows_it(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    search = ["--mesh", "1x8", "--gpu", "cpu", "--model", "llama-tiny", "--seq", "128", "--global-batch", "32"]
    run_python("-m", "galvatron_jax.search", *search, "--no-pp", "--out", str(plan))
    output = run_python("examples/llama/train.py", "--plan", str(plan), "--steps", "10", "--devices", "8")
    losses = table(output)
    assert f"read from {plan}" in output
    assert "8 devices (1x8), 1 stage, batch 32" in output
    assert losses[10] < losses[1] - 0.5
