"""The command line: every case in which a user can go wrong, and the few in which they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from galvatron_jax import _document
from galvatron_jax.plan import HardwareReference, load_plan
from galvatron_jax.profile import Link
from galvatron_jax.search._cli import main
from tests.support.toy_models import llama_like_profile, toy_hardware

FULL_WIDTH = "\uff12x8"
SMALL = ["--mesh", "1x2", "--gpu", "h100", "--model", "llama-tiny", "--global-batch", "8"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "galvatron_jax.search", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit status and message of a command that must fail without output."""
    status = main(list(words))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("galvatron_jax.search: error: ")
    assert "Traceback" not in captured.err
    return status, captured.err


def test_command_prints_the_plan_and_writes_it() -> None:
    done = run(*SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("llama-tiny", "predicted", "peak", "megatron 3d", "optimal in the stated space", "MFU"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout  # no colour in a pipe
    assert load_plan("configs/optimal_solution.json").certificate


def test_command_with_json_prints_the_document_only() -> None:
    first, second = run(*SMALL, "--json"), run(*SMALL, "--json")
    assert first.returncode == 0
    assert json.loads(first.stdout)["global_batch"] == 8
    assert first.stdout == second.stdout
    assert not Path("configs").exists()


def test_command_never_imports_jax() -> None:
    code = (
        "import sys; from galvatron_jax.search._cli import main; "
        f"status = main({[*SMALL, '--quiet']!r}); assert status == 0; "
        "assert not {'jax', 'flax', 'rich'} & set(sys.modules), 'imported'"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    "mesh", ["2x", "0x8", "-1x8", "2x8x4", FULL_WIDTH, "1e9x8", "", "x", "2*8", "99999999x8", "2x8\x1b[31m"]
)
def test_mesh_that_cannot_be_read_is_refused_with_the_grammar(mesh: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, message = failure(capsys, "--mesh", mesh)
    assert status == 2
    assert "expected NODESxGPUS" in message
    assert "2x8: two nodes with eight GPUs each" in message
    assert len(message.splitlines()) == 1
    assert "\x1b" not in message


def test_mesh_with_a_capital_x_is_accepted() -> None:
    assert main(["--mesh", "1X2", *SMALL[2:], "--quiet"]) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--mesh"),
        (["--mesh"], "--mesh"),
        (["--mesh", "1x2", "--bogus"], "--bogus"),
        (["--mesh", "1x2", "--model", "lama2-7b"], "did you mean 'llama2-7b'"),
        (["--mesh", "1x2", "--gpu", "h101"], "did you mean h100"),
        (["--mesh", "1x2", "--gpu", "h100", "--hardware", "x.json"], "both --gpu and --hardware"),
        (["--mesh", "1x2", "--model", "llama-tiny", "--profile", "x.json"], "both --model and --profile"),
        (["--mesh", "1x2", "--profile", "absent.json"], "absent.json"),
        (["--mesh", "1x2", "--hardware", "absent.json"], "absent.json"),
        (["--mesh", "1x2", "--model", "../x.json"], "use --profile"),
        (["--mesh", "1x2", "--memory", "lots"], "--memory"),
        (["--mesh", "1x2", "--memory", "-5GiB"], "--memory"),
        (["--mesh", "1x2", "--seq", "0"], "--seq"),
        (["--mesh", "1x2", "--seq", "2.5"], "--seq"),
        (["--mesh", "1x2", "--dtype", "int8"], "--dtype"),
        (["--mesh", "1x2", "--global-batch", "8,,9"], "--global-batch"),
        (["--mesh", "1x2", "--global-batch", "-8"], "--global-batch"),
        (["--mesh", "1x2", "--global-batch", "100000000"], "--global-batch"),
        (["--mesh", "1x2", "--max-pp", "0"], "--max-pp"),
        (["--mesh", "1x2", "--max-tp", "two"], "--max-tp"),
        (["--mesh", "1x2", "--microbatches", "0"], "--microbatches"),
        (["--mesh", "1x2", "--time-limit", "nan"], "--time-limit"),
        (["--mesh", "1x2", "--out", "."], "is a folder"),
        (["--mesh", "1x2", "--report", "."], "is a folder"),
        (["--mesh", "1x2", "--report", "/proc/nowhere/report.html"], "cannot write"),
        (["--mesh", "1x2", "--space", "fdsp"], "did you mean fsdp"),
        (["--mesh", "1x2", "--schedule", "1f1b,gpip"], "did you mean gpipe"),
        (["--mesh", "1x2", "--pin", "tp=x"], "tp to be a whole number"),
        (["--mesh", "1x2", "--forbid", "layers 0-99: tp=2"], "layer numbers from 0 to"),
        (["--mesh", "1x2", "--pin", "hed: tp=1"], "did you mean 'head'"),
        (["--mesh", "1x2", "--top", "0"], "--top"),
        (["--mesh", "1x2", "--price", "2 EUR"], "for example --price 2.50"),
        (["--mesh", "1x2", "--profile-from", "megatron", "x"], "--profile-from"),
        (["--mesh", "1x2", "--profile-from", "galvatron", "absent"], "absent"),
        (["--mesh", "1x2,2x"], "NODESxGPUS"),
        (["--mesh", "1x2,2x2", "--out", "plan.json"], "one mesh"),
        (["explan", "plan.json"], "did you mean explain"),
        (["explain"], "PLAN"),
        (["explain", "absent.json"], "absent.json"),
        (["diff", "absent.json", "b.json"], "absent.json"),
        (["--mesh", "1x2", "--out", "/proc/nowhere/plan.json"], "cannot write"),
    ],
)
def test_bad_arguments_end_with_status_2_and_one_message(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, message = failure(capsys, *words)
    assert status == 2
    assert expected in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b'{"schema_version": 1, "name"', "truncated"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ""),
        (b"[1, 2]", ""),
        (b'{"schema_version": 99}', "schema_version 99"),
        (b'{"schema_version": 1, "surprise": 1}', ""),
        (b"[" * 100_000, ""),
        (b" " * (9 * 2**20), "bytes"),
    ],
)
@pytest.mark.parametrize("flag", ["--profile", "--hardware"])
def test_damaged_file_is_refused_by_name(
    flag: str, content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.json").write_bytes(content)
    status, message = failure(capsys, "--mesh", "1x2", flag, "damaged.json")
    assert status == 2
    assert "damaged.json" in message
    assert reason in message


def test_profile_that_contradicts_itself_is_refused_with_every_violation(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_like_profile(layers=2, embed=64, heads=4, head_dim=16, mlp=64, vocab=64, seq=8)
    text = _document.encode(model).replace('{"kind": "head", "count": 1}', '{"kind": "tail", "count": 1}')
    Path("model.json").write_text(text.replace('"mlp": 64', '"mpl": 64'))
    status, message = failure(capsys, "--mesh", "1x2", "--profile", "model.json")
    assert status == 2
    assert "unknown kind 'tail'" in message
    assert "unknown class 'mlp'" in message


def test_profiles_from_files_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_like_profile(layers=7, embed=64, heads=4, head_dim=16, mlp=64, vocab=61, seq=8, name="\x1b[31m[bold]")
    _document.save(model, "model.json")
    _document.save(toy_hardware(), "hardware.json")
    words = ["--mesh", "1x3", "--global-batch", "3", "--profile", "model.json", "--hardware", "hardware.json"]
    assert main([*words, "--out", "plan.json"]) == 0
    out = capsys.readouterr().out
    assert "[31m[bold]" in out  # neither a control sequence nor markup
    assert "\x1b" not in out
    assert load_plan("plan.json", model=model).hardware is not None


def test_infeasible_budget_ends_with_status_3_in_time() -> None:
    start = time.monotonic()
    done = run("--mesh", "1x1", "--gpu", "h100", "--model", "llama2-7b", "--memory", "8GiB")
    assert done.returncode == 3
    assert time.monotonic() - start < 10
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "nearest miss needs" in done.stderr
    assert "budget 8.0 GiB" in done.stderr
    assert not Path("configs").exists()


def test_out_keeps_what_is_not_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("mine")
    status, message = failure(capsys, *SMALL, "--out", "notes.txt")
    assert (status, Path("notes.txt").read_text()) == (2, "mine")
    assert "--force" in message
    assert main([*SMALL, "--quiet", "--out", "notes.txt", "--force"]) == 0
    assert main([*SMALL, "--quiet", "--out", "notes.txt"]) == 0  # a plan is overwritten without asking
    assert load_plan("notes.txt")


def test_out_through_a_symbolic_link_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("link.json").symlink_to("elsewhere.json")
    status, message = failure(capsys, *SMALL, "--out", "link.json")
    assert status == 2
    assert "symbolic link" in message
    assert not Path("elsewhere.json").exists()


def test_help_names_every_flag_and_version_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    flags = "mesh gpu hardware memory model profile seq dtype global-batch microbatches max-pp no-pp max-tp time-limit"
    flags += " space pin forbid schedule explain top frontier price report profile-from"
    for flag in (*flags.split(), "out", "force", "json", "quiet", "debug", "version"):
        assert f"--{flag}" in text
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("galvatron_jax ")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mesh", "2x", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_time_limit_ends_with_status_0_and_an_honest_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mesh", "2x8", "--gpu", "h100", "--model", "llama2-7b", "--time-limit", "0", "--out", "plan.json"]
    assert main(words) == 0
    certificate = load_plan("plan.json").certificate
    assert certificate is not None
    assert certificate.optimal or certificate.gap > 0
    assert ("optimal in the stated space" in capsys.readouterr().out) == certificate.optimal


def test_attention_in_memory_needs_more_than_a_fused_kernel_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {}
    for attention in ("fused", "xla"):
        out = tmp_path / f"{attention}.json"
        arguments = ["--mesh", "1x8", "--gpu", "h100", "--global-batch", "8", "--no-pp", "--attention", attention]
        assert main([*arguments, "--memory", "500GiB", "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert ("--attention xla" in printed) == (attention == "fused")
        predicted = load_plan(out).predicted
        assert predicted is not None
        peaks[attention] = predicted.stages[0].peak_bytes
    assert peaks["xla"] > 2 * peaks["fused"]


def test_unknown_attention_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mesh", "1x8", "--attention", "flash"]) == 2
    assert "--attention: got 'flash'; expected fused or xla" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- questions and plans
ASKED = ["--explain", "--top", "3", "--frontier", "--price", "2.5"]


def test_questions_are_answered_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *ASKED, "--report", "report.html"]) == 0
    shown = capsys.readouterr().out
    for words in ("binds", "why", "with 10% more memory", "top  family", "tokens/unit", "wrote report.html"):
        assert words in shown
    assert Path("report.html").read_text().startswith("<!doctype html>")


def test_questions_with_json_are_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *ASKED, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["plan", "reasons", "what_ifs", "top", "frontier", "scaling"]
    assert found["plan"]["predicted"]["step_time_s"] == found["top"][0]["plan"]["predicted"]["step_time_s"]


def test_several_meshes_are_compared_and_no_plan_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mesh", "1x1,1x2,2x2", *SMALL[2:], "--price", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("1x1", "1x2", "2x2")] == ["1x1", "1x2", "2x2"]
    assert list(Path().iterdir()) == []
    assert main(["--mesh", "1x1,2x2", *SMALL[2:], "--json"]) == 0
    assert [row["mesh"] for row in json.loads(capsys.readouterr().out)["scaling"]] == ["1x1", "2x2"]


def test_plan_commands_explain_compare_and_draw(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--quiet", "--out", "a.json"]) == 0
    assert main([*SMALL, "--quiet", "--out", "b.json", "--no-pp", "--pin", "layers 1-2: remat=full"]) == 0
    capsys.readouterr()
    assert main(["explain", "a.json"]) == 0
    assert "what if" in capsys.readouterr().out
    assert main(["explain", "b.json", "layer", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("layer 1")
    assert "not the optimum" in shown  # in the whole space, which the pin did not leave
    assert main(["explain", "a.json", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] == 2
    assert {"strategy", "layer", "run"} == set(found["alternatives"][0])
    assert main(["diff", "a.json", "b.json"]) == 0
    assert "layers 1-2 layers.*" in capsys.readouterr().out
    assert main(["report", "a.json", "--out", "page.html"]) == 0
    assert "<svg" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["explain", "a.json", "layer", "99"], "N from 0 to"),
        (["explain", "a.json", "layer", "x"], "N from 0 to"),
        (["explain", "a.json", "--hardware", "absent.json"], "absent.json"),
        (["explain", "a.json", "--profile", "absent.json"], "absent.json"),
        (["report", "a.json", "--out", "a.json"], "is not a page"),
        (["report", "a.json", "--out", "."], "is a folder"),
        (["diff", "a.json", "damaged.json"], "damaged.json"),
        (["diff", "a.json"], "B"),
    ],
)
def test_plan_commands_refuse_bad_input_with_one_message(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--quiet", "--out", "a.json"]) == 0
    Path("damaged.json").write_text("{")
    status, message = failure(capsys, *words)
    assert status == 2
    assert expected in message
    assert len(message.splitlines()) == 1


def test_plan_of_a_model_that_is_no_preset_needs_its_profile(capsys: pytest.CaptureFixture[str]) -> None:
    model = llama_like_profile(layers=3, embed=64, heads=4, head_dim=16, mlp=64, vocab=64, seq=8)
    _document.save(model, "model.json")
    _document.save(toy_hardware(), "hardware.json")
    given = ["--profile", "model.json", "--hardware", "hardware.json"]
    assert main(["--mesh", "1x2", "--global-batch", "4", *given, "--quiet", "--out", "a.json"]) == 0
    assert main(["explain", "a.json"]) == 2
    assert "add --profile FILE" in capsys.readouterr().err
    assert main(["explain", "a.json", *given]) == 0
    assert "another fingerprint" not in capsys.readouterr().out
    other = llama_like_profile(layers=4, embed=64, heads=4, head_dim=16, mlp=64, vocab=64, seq=8)
    _document.save(other, "model.json")
    assert main(["explain", "a.json", *given]) == 2
    assert "structure" in capsys.readouterr().err


def test_help_answers_at_once() -> None:
    """Below 0.3 s on an idle machine; here only what would break that is looked for: heavy imports."""
    code = "import sys; from galvatron_jax.search import _cli\ntry: _cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'numpy', 'jax', 'rich'} & set(sys.modules), 'imported'"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------- odd but possible input
@pytest.mark.parametrize(
    "words",
    [
        ["--mesh", "1x1"],
        ["--mesh", "1x3"],
        ["--mesh", "3x1", "--global-batch", "3"],
        ["--mesh", "5x2", "--global-batch", "1"],
        ["--mesh", "1x7", "--global-batch", "7", "--seq", "1"],
        ["--mesh", "1x2", "--global-batch", "1", "--seq", "1"],
        ["--mesh", "2x2", "--global-batch", "13", "--microbatches", "13"],
        ["--mesh", "64x1", "--global-batch", "64"],
        ["--mesh", "1x4", "--pin", "all: tp=4", "--forbid", "sp"],
    ],
    ids=" ".join,
)
def test_degenerate_search_gives_a_plan_or_says_clearly_why_not(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status = main([*words, "--gpu", "h100", "--model", "llama-tiny", "--out", "plan.json"])
    shown = capsys.readouterr()
    assert status in (0, 3)
    assert "Traceback" not in shown.err
    if status == 0:
        assert load_plan("plan.json").certificate is not None
    else:
        assert "expected" in shown.err or "nearest miss" in shown.err


def test_absurd_hardware_profile_is_used_with_a_caution(capsys: pytest.CaptureFixture[str]) -> None:
    absurd = toy_hardware(
        matmul_flops_per_s={"bfloat16": 1e20, "float32": 1e14},
        intra_node=Link(bandwidth_bytes_per_s=1e9, latency_s=0.0),
        inter_node=Link(bandwidth_bytes_per_s=1e10, latency_s=1.0),
    )
    _document.save(absurd, "hardware.json")
    words = ["--mesh", "2x1", "--model", "llama-tiny", "--global-batch", "8", "--hardware", "hardware.json"]
    assert main([*words, "--out", "plan.json"]) == 0
    shown = capsys.readouterr().out
    for caution in ("1e+20 FLOP/s;", "faster than inside one;", "latency of 1 s;"):
        assert caution in shown
    assert load_plan("plan.json").hardware == HardwareReference(
        name=absurd.name, fingerprint=absurd.fingerprint, measured=False
    )
