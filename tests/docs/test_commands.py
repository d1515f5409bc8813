"""Every command that the documents for users show is run, in order, in a folder of its own; links lead somewhere.

A fenced block ``console`` holds commands behind ``$``; ``console slow`` those that train or trace; ``console setup``
what made this environment. ``# exit N`` behind a command is its exit code. A block ``toml NAME`` is the file NAME.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("getting_started", "how_it_decides", "troubleshooting")
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(document: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / f"{document}.md").read_text())


def commands(document: str, info: str) -> list[str]:
    return [
        line.removeprefix("$ ")
        for found, text in blocks(document)
        if found == info
        for line in text.splitlines()
        if line.startswith("$ ")
    ]


def run(document: str, folder: Path, info: str) -> None:
    for found, text in blocks(document):
        if found.startswith("toml "):
            (folder / found.removeprefix("toml ")).write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands(document, info):
        line, _, expected = command.partition("# exit ")
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == int(expected or 0), f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_do_what_the_document_says(document: str, tmp_path: Path) -> None:
    run(document, tmp_path, "console")


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("document", ["getting_started", "troubleshooting"])
def test_commands_that_train_do_what_the_document_says(document: str, tmp_path: Path) -> None:
    run(document, tmp_path, "console slow")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_stands_outside_the_blocks_that_are_run(document: str) -> None:
    found = {info for info, text in blocks(document) if text.startswith("$ ")}
    assert found <= {"console", "console slow", "console setup"}
    assert commands(document, "console")


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_index_names_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and p.name not in index] == []
