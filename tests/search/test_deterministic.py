"""The same inputs give the same plan file, byte for byte, whatever the process is like."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

from galvatron_jax.search import _bounds, _knapsack, _pricing, _relaxation, _shared, _stage

CODE = """
import sys
from galvatron_jax import _document
from galvatron_jax.cluster import parse_cluster
from galvatron_jax.search import find_plan
import random
from tests.search.problems import model_of, random_hardware
draw = random.Random(11)
arguments = model_of("e1 l3 d3 h1", draw), parse_cluster("2x2"), random_hardware(draw)
roomy = find_plan(*arguments, global_batches=(8, 16), memory_bytes=10**12).plan
peak = max(stage.peak_bytes for stage in roomy.predicted.stages)
tight = find_plan(*arguments, global_batches=(8, 16), memory_bytes=int(0.8 * peak)).plan
sys.stdout.write(_document.encode(roomy) + _document.encode(tight))
"""


def plan_files(**environment: str) -> str:
    """Return the plans that a fresh process finds, with memory to spare and without."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def test_plan_does_not_depend_on_hash_seed_or_threads() -> None:
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    one = plan_files(PYTHONHASHSEED="0", **dict.fromkeys(threads, "1"))
    other = plan_files(PYTHONHASHSEED="12345", **dict.fromkeys(threads, "4"))
    assert one == other
    assert one.count('"optimal": true') == 2


def test_search_multiplies_no_matrices() -> None:
    """A matrix product sums in an order that depends on the machine's BLAS."""
    for module in (_bounds, _knapsack, _pricing, _relaxation, _shared, _stage):
        code = [line for line in inspect.getsource(module).splitlines() if not line.lstrip().startswith("@")]
        assert not any(" @ " in line and "``" not in line for line in code)
