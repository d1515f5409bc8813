"""Set the stage for all tests: 8 virtual CPU devices, deterministic examples.

JAX reads its environment when it is imported, so the variables are set here, before any test module is, and jax itself
is not imported: planning tests must run without it.
"""

from __future__ import annotations

import os

from hypothesis import settings

VIRTUAL_DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
_flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
# Virtual devices share two cores: XLA's 40 seconds of patience at a collective are too few on a busy machine.
_flags += ["--xla_cpu_collective_call_terminate_timeout_seconds=1200"]
# Tests compile much and run little: without LLVM's optimisations they take 40 % of the time.
_flags += ["--xla_backend_optimization_level=0"]
os.environ["XLA_FLAGS"] = " ".join([*_flags, f"--xla_force_host_platform_device_count={VIRTUAL_DEVICES}"])

# One run is like every other: the same examples, and no failure because the machine was busy.
settings.register_profile("galvatron", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("galvatron")
