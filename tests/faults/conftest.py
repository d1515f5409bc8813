"""A tiny run on 8 virtual devices, in this process or in one of its own, with faults on purpose.

Every test compiles the same few programs; a cache shared by all of them, and by all workers of pytest-xdist, keeps that
short.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
import tomli_w

from galvatron_jax.train._cli import main
from galvatron_jax.train._faults import VARIABLE
from galvatron_jax.train._trackers import read_metrics

STEPS = 12
REPOSITORY = Path(__file__).parents[2]
Table = dict[str, dict[str, Any]]


def settings(**changes: dict[str, Any]) -> Table:
    """Sections of a run file; ``changes`` are laid over them key by key."""
    table: Table = {
        "model": {"changes": {"layers": 2, "embed": 32, "mlp": 64, "heads": 4, "kv_heads": 2}},
        "data": {"paths": [argparse.__file__], "seq": 32, "global_batch": 16},
        "optimizer": {"learning_rate": 3e-3},
        "run": {"steps": STEPS},
        "checkpoint": {"every": 4},
        "log": {"every": 4},
    }
    for section, keys in changes.items():
        table[section] = {**table.get(section, {}), **keys}
    return table


@dataclasses.dataclass(frozen=True)
class Run:
    """A run file and its folder."""

    file: Path
    folder: Path
    cache: Path

    def here(self, *arguments: str, faults: list[dict[str, Any]] | None = None) -> int:
        """Run in this process; return the exit code."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = json.dumps(faults or [])
        try:
            return main([str(self.file), *arguments])
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before

    def apart(
        self,
        *arguments: str,
        faults: list[dict[str, Any]] | None = None,
        launch: tuple[str, ...] | None = None,
        timeout_s: float = 500,
    ) -> subprocess.CompletedProcess[str]:
        """Run in a process of its own (under the supervisor with the flags ``launch``)."""
        with self.started(*arguments, faults=faults, launch=launch) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()  # a supervisor ends its processes
                try:
                    out, err = process.communicate(timeout=90)
                finally:
                    process.kill()
                pytest.fail(f"still running after {timeout_s} s\n{out[-2000:]}\n{err[-4000:]}")
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def started(
        self,
        *arguments: str,
        faults: list[dict[str, Any]] | None = None,
        launch: tuple[str, ...] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process of its own."""
        module = ["galvatron_jax.train"] if launch is None else ["galvatron_jax.train.launch", *launch]
        return subprocess.Popen(
            [sys.executable, "-u", "-m", *module, str(self.file), *arguments],
            env={
                **os.environ,
                VARIABLE: json.dumps(faults or []),
                "PYTHONPATH": str(REPOSITORY),
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step, of the last time that each was taken."""
        return {r["step"]: r["loss"] for r in read_metrics(self.folder) if "loss" in r}

    @property
    def trace(self) -> dict[int, tuple[Any, ...]]:
        """(batch, loss, gradient norm) by step, of the last time that each was taken."""
        return {
            r["step"]: (r["batch"], r["loss"], r["gradient_norm"]) for r in read_metrics(self.folder) if "loss" in r
        }

    @property
    def checkpoints(self) -> list[str]:
        """Names in the folder of checkpoints."""
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@dataclasses.dataclass(frozen=True)
class Runs:
    """Makes runs that share a cache of compiled programs."""

    root: Path
    cache: Path

    def new(self, name: str = "run", /, **changes: dict[str, Any]) -> Run:
        """Write the run file of ``settings(**changes)``."""
        folder = self.root / name
        table = settings(**changes)
        table["run"]["folder"] = str(folder)
        file = self.root / f"{name}.toml"
        file.write_text(tomli_w.dumps(table))
        return Run(file, folder, self.cache)


def shared_root(factory: pytest.TempPathFactory) -> Path:
    """The folder of this session that all workers of pytest-xdist have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of compiled programs, used by this process and those that it starts."""
    folder = shared_root(tmp_path_factory) / "compiled"
    changes = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    old = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield folder
    for name, value in old.items():
        jax.config.update(name, value)


@pytest.fixture
def runs(tmp_path: Path, compile_cache: Path) -> Runs:
    return Runs(tmp_path, compile_cache)


@pytest.fixture(scope="session")
def control(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> Run:
    """The run that nothing happens to; one worker runs it, the others wait for it."""
    root = shared_root(tmp_path_factory) / "control"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = Runs(root, compile_cache).new()
        assert (root / "done").exists() or run.here() == 0
        (root / "done").touch()
    return run
