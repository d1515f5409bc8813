"""Nothing here runs code that comes in a file: no pickle, no eval, no shell (notes: security rules 1 and 7)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FORBIDDEN = re.compile(
    r"(?<!\.)\bpickle\b|cloudpickle|\bdill\b|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\b|allow_pickle=True|shell=True"
    r"|os\.system|\bmarshal\b|serialize_executable|trust_remote_code=True|joblib"
)
ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("galvatron_jax", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh")) + sorted((ROOT / "examples").rglob("*.sbatch"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_package_and_beside_it_runs_code_from_a_file(path: Path) -> None:
    code = re.sub(r'"""(?:.|\n)*?"""|#.*', "", path.read_text())
    found = [line.strip() for line in code.splitlines() if FORBIDDEN.search(line)]
    # Methods called eval are ours (evaluation), and so is their name in a ``def``.
    assert [line for line in found if not re.match(r"def eval\(self", line)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_evaluate_no_text(path: Path) -> None:
    assert not re.search(r"\beval\b|\bbash -c\b|\bsh -c\b", path.read_text())


def test_the_search_would_find_what_it_looks_for() -> None:
    for line in (
        "import pickle",
        "pickle.load(f)",
        "x = eval(text)",
        "run(c, shell=True)",
        "np.load(f, allow_pickle=True)",
        "exec(code)",
    ):
        assert FORBIDDEN.search(line)
    for line in (
        'REFUSED = (".pickle", ".pt")',
        "self.sharded.eval(batch)",
        "jax.eval_shape(f)",
        "np.load(f, allow_pickle=False)",
    ):
        assert not FORBIDDEN.search(line)
