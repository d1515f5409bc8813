"""docs/faults.md tells the truth: all 25 cases are there, their tests exist and ask for the exit codes it names."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = 25
TABLE = (TESTS.parent / "docs" / "faults.md").read_text()
ROWS = {
    int(number): (behaviour, re.findall(r"`([\w/]+\.py)::(\w+)`", tests))
    for number, behaviour, tests in re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", TABLE, re.MULTILINE)
}


@functools.cache
def functions(file: str) -> dict[str, str]:
    """Source of each test of a file, decorators included."""
    text = (TESTS / file).read_text()
    lines = text.splitlines()
    return {
        node.name: "\n".join(lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


def test_every_case_has_a_row() -> None:
    assert sorted(ROWS) == list(range(1, CASES + 1))


@pytest.mark.parametrize("case", range(1, CASES + 1))
def test_case_is_held_by_tests_that_ask_for_its_exit_code(case: int) -> None:
    behaviour, tests = ROWS[case]
    assert tests, "no test is named"
    assert [f"{file}::{name}" for file, name in tests if name not in functions(file)] == []
    sources = [functions(file)[name] for file, name in tests]
    codes = re.findall(r"(?<=\()\d+(?=[) ])", behaviour)
    codes += re.findall(r"(?<=, )0(?= by)", behaviour)
    for code in codes:
        asked = re.compile(rf"(== |, |\(){code}\b|(status|code|with)_{code}(_|\b)")
        assert any(asked.search(source) for source in sources), f"no test asks for exit code {code}"
