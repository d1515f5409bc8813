"""Commands of the documents that are not written for ``tests/docs/test_commands.py``: the READMEs, profiling.md, ...

Every ``python -m`` command among them is given to its own parser, so that no flag is wrong. Those in ``RUN`` are run;
the others need GPUs, minutes, or files that such a command measures: ``ELSEWHERE`` says why, and where they run.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/profiling.md", "examples/llama/README.md", "CONTRIBUTING.md")

RUN = (
    "python -m galvatron_jax.search --mesh 2x8 --model llama2-7b --gpu h100",
    "python -m galvatron_jax.search --mesh 1x8 --gpu cpu --model llama-tiny --seq 128 --global-batch 32"
    " --out configs/llama_tiny.json",
)
ELSEWHERE = {
    "python -m galvatron_jax.profilers": "minutes on GPUs; on virtual devices in tests/examples/test_llama_workflow.py",
    "python -m galvatron_jax.search": "its files come from the profilers; in tests/examples/test_llama_workflow.py",
    "python -m galvatron_jax.cost": "runs the plan on its GPUs; in tests/examples/test_llama_workflow.py",
    "python -m galvatron_jax.verify": "compiles for minutes; in tests/verify",
    "python examples/llama/train.py": "in tests/examples/test_llama_train.py",
    "bash examples/llama/scripts/": "in tests/examples/test_llama_workflow.py",
    "sbatch examples/llama/scripts/": "needs SLURM; its text is parsed in tests/examples/test_llama_workflow.py",
    "make": "makes the environment that the tests run in; .ci/run does the same",
}


def commands(document: str) -> list[str]:
    """Return the commands in the blocks of a document, without comments; a line that goes on is one command."""
    text = (ROOT / document).read_text()
    fenced = re.findall(r"^```(?:|console|sh|bash)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\S.*\n)+", text, re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", "\n".join([*fenced, *indented])).splitlines()
    found = [line.partition("  #")[0].strip().removeprefix("$ ").replace(".venv/bin/", "") for line in lines]
    return [line for line in found if re.match(r"(python|bash|make|sbatch|pip)\b", line)]


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]
MODULES = [pair for pair in COMMANDS if pair[1].startswith("python -m galvatron_jax")]


def test_documents_show_commands() -> None:
    assert {document for document, _ in MODULES} >= {"README.md", "docs/profiling.md", "examples/llama/README.md"}
    assert set(RUN) <= {command for _, command in COMMANDS}


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_command_is_run_or_it_is_said_where(document: str, command: str) -> None:
    assert command in RUN or any(command.startswith(start) for start in ELSEWHERE)


class Parsed(BaseException):
    """The command line is right; no command catches this."""


@pytest.mark.parametrize(("document", "command"), MODULES)
def test_command_has_these_flags(document: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        parse(parser, *given, **named)
        raise Parsed

    module, *words = shlex.split(command)[2:]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("command", RUN)
def test_command_runs(command: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("configs/*.json"))
