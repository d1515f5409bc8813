"""The house: top-level links, one copy of every module, a wheel with the package and nothing else, small files."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import galvatron_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "galvatron_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
MAX_FUNCTION_LINES = 60


@pytest.mark.parametrize("name", ["profilers", "search"])
def test_top_level_link_is_relative_and_points_into_the_package(name: str) -> None:
    link = ROOT / name
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links (core.symlinks=false)")
    assert os.readlink(link) == f"galvatron_jax/{name}"
    assert link.resolve() == (PACKAGE / name).resolve()


def test_tests_run_on_this_checkout() -> None:
    assert Path(galvatron_jax.__file__ or "").parent == PACKAGE


@pytest.mark.parametrize("name", ["profilers", "search"])
def test_import_through_a_link_gives_no_second_copy(name: str) -> None:
    """Relative imports make ``import search`` in the root an error instead of a twin with other classes."""
    code = (
        f"import sys; sys.path.insert(0, '')\ntry: import {name} as twin\n"
        "except ImportError: print('refused')\nelse: print(sorted(n for n in dir(twin) if not n.startswith('_')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() in ("refused", "[]")  # an empty room has nothing to import


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_source_imports_its_own_package_relatively(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level or (node.module or "").split(".")[0] != "galvatron_jax", f"line {node.lineno}"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "galvatron_jax" for alias in node.names), f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_source_file_and_its_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}, line {node.lineno}"
    assert path.stem not in ("utils", "helpers", "misc")


@pytest.mark.slow
def test_wheel_holds_the_package_its_data_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: a build leaves files behind
    shutil.copytree(PACKAGE, source / "galvatron_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "search", "profilers"):
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)

    (wheel,) = tmp_path.glob("galvatron_jax-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    suffixes = (".py", ".json", ".txtpb", ".typed")
    files = {path for path in (source / "galvatron_jax").rglob("*") if path.suffix in suffixes}
    assert names == {str(path.relative_to(source)) for path in files}
