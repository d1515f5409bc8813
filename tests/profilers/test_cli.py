from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from galvatron_jax.cost import collective_seconds, device_group
from galvatron_jax.hardware import load_hardware
from galvatron_jax.profilers._agenda import KINDS
from galvatron_jax.profilers._cli import main

ROOT = Path(__file__).parents[2]


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "galvatron_jax.profilers", "hardware", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("mesh", ["8", "0x8", "1x", "-1x8", "axb"])
def test_bad_mesh_ends_with_code_2(mesh: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", f"--mesh={mesh}"]) == 2
    captured = capsys.readouterr()
    assert "NODESxGPUS" in captured.err
    assert captured.out == ""


@pytest.mark.multidevice
def test_mesh_with_too_many_devices_ends_with_code_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", "--mesh", "2x8", "--out", str(tmp_path / "hw.json")]) == 4
    message = capsys.readouterr().err
    assert "16 devices, jax sees 8" in message
    assert "--devices" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.multidevice
def test_unknown_base_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", "--mesh", "1x2", "--base", "h1000", "--out", str(tmp_path / "hw.json")]) == 2
    assert "did you mean h100" in capsys.readouterr().err


@pytest.mark.multidevice
def test_output_that_cannot_be_written_is_known_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main(["hardware", "--mesh", "1x2", "--out", str(tmp_path / "file" / "hw.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.multidevice
def test_corrupt_partial_file_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hw.partial.json").write_text('{"schema_version": 1, "machine": ')
    assert main(["hardware", "--mesh", "1x2", "--resume", "--out", str(tmp_path / "hw.json")]) == 2
    assert "without --resume" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--budget-s", "0"], ["--budget-s", "nan"], ["--devices", "0"], ["--mesh"]])
def test_bad_option_ends_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["hardware", "--mesh", "1x2", *arguments])
    assert caught.value.code == 2


def test_help_does_not_import_jax() -> None:
    code = "import sys, galvatron_jax.profilers._cli; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.multidevice
def test_quick_run_writes_a_profile_that_prices_and_resumes(tmp_path: Path) -> None:
    """The whole path on 8 virtual CPU devices; the budget is cut so that there is something left to resume."""
    out, partial = tmp_path / "hw.json", tmp_path / "hw.partial.json"
    order = ("--mesh", "1x8", "--devices", "8", "--quick", "--out", str(out))
    first = run_command(*order, "--budget-s", "12")
    assert first.returncode == 0, first.stderr
    assert "left out" in first.stderr
    before = json.loads(partial.read_text())["readings"]

    second = run_command(*order, "--budget-s", "30", "--resume")
    assert second.returncode == 0, second.stderr
    profile = load_hardware(out)
    assert profile.measured
    assert "all-reduce, 8 devices in a node" in second.stdout
    if partial.exists():  # a busy machine may not finish in the second budget either
        assert json.loads(partial.read_text())["readings"][: len(before)] == before

    assert {table.kind for table in profile.collectives} >= {"all-reduce", "all-gather", "reduce-scatter"}
    for table in profile.collectives:
        assert all(low <= high for low, high in pairwise(table.times_s))
        group = device_group(table.group, 1, 8)
        prices = [collective_seconds(table.kind, size, group, profile) for size in (1e3, 1e5, 1e6, 1e9)]
        assert prices == sorted(prices)
        assert 0 < prices[0] < prices[-1]
    assert {"float32", "bfloat16"} <= set(profile.matmul_flops_per_s)
    assert {table.kind for table in profile.collectives} <= set(KINDS)
