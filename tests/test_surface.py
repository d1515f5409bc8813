"""The public surface, frozen: a change here is a change that users meet, and belongs in CHANGELOG.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import galvatron_jax
from galvatron_jax import _document, cluster, plan, profile

PUBLIC = [
    "AutoTrainer",
    "Cluster",
    "HardwareProfile",
    "ModelProfile",
    "Plan",
    "Stage",
    "Strategy",
    "__version__",
    "auto_shard",
    "errors",
    "find_plan",
    "load_plan",
    "plan_shardings",
]
NEEDS_JAX = {"AutoTrainer", "auto_shard", "plan_shardings"}


def test_public_names_are_these() -> None:
    assert dir(galvatron_jax) == PUBLIC


def test_public_names_have_the_homes_that_type_checkers_see() -> None:
    tree = ast.parse(Path(galvatron_jax.__file__ or "").read_text())
    typed = {
        alias.asname: node.module or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == {**galvatron_jax._HOMES, "errors": "errors"}


@pytest.mark.parametrize("name", sorted({*PUBLIC} - NEEDS_JAX - {"find_plan"}))
def test_public_name_loads(name: str) -> None:
    assert getattr(galvatron_jax, name) is not None


def test_public_names_are_the_modules_own() -> None:
    assert galvatron_jax.Plan is plan.Plan
    assert galvatron_jax.load_plan is plan.load_plan
    assert galvatron_jax.Cluster is cluster.Cluster
    assert galvatron_jax.HardwareProfile is profile.HardwareProfile


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'galvatron_jax' has no attribute 'auto_sharp'"):
        galvatron_jax.auto_sharp  # noqa: B018


def test_exported_name_never_equals_a_module_of_another_thing() -> None:
    """``search`` is the package and ``find_plan`` the function: else an import would change what a name means."""
    package = Path(galvatron_jax.__file__ or "").parent
    modules = {path.stem for path in package.iterdir()} - {"__init__", "__pycache__"}
    assert {*PUBLIC} & modules == {"errors"}


def test_schema_versions_are_these() -> None:
    kinds = (plan.Plan, profile.HardwareProfile, profile.ModelProfile)
    assert [(kind.DOCUMENT, kind.SCHEMA_VERSION) for kind in kinds] == [
        ("plan", 1),
        ("hardware profile", 1),
        ("model profile", 1),
    ]
    assert all(issubclass(kind, _document.Document) for kind in kinds)


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh Python has loaded after running ``code``."""
    code += "\nimport sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_imports_no_heavy_module() -> None:
    assert not imported_by("import galvatron_jax") & {"jax", "jaxlib", "flax", "numpy", "msgspec", "rich"}


def test_plans_and_hardware_need_no_jax() -> None:
    code = "import galvatron_jax as g; from galvatron_jax.hardware import load_hardware; g.Plan; load_hardware('h100')"
    assert not imported_by(code) & {"jax", "jaxlib", "flax", "optax", "orbax", "rich"}
