"""The run record: what the plan of a run really took, beside what was predicted; ``calibrate`` reads it back."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax

from .._document import save
from ..plan import Plan
from ..profilers import here
from ..record import RunRecord
from ..runtime import platform_options
from ._memory import device_memory

RECORD_NAME = "run.json"
LEAST_STEPS = 5
"""Fewer say nothing."""
MOST_STEPS = 10_000
"""The last ones; a record is a small file."""


def write_record(plan: Plan, step_times_s: Sequence[float], folder: Path) -> Path | None:
    """Keep how long the steps took; return the file, or None when there were too few.

    Args:
        plan: What ran.
        step_times_s: Of the steps that did not compile, as the devices finished them.
        folder: The run's folder.
    """
    times = tuple(time_s for time_s in step_times_s if time_s > 0)[-MOST_STEPS:]
    if len(times) < LEAST_STEPS:
        return None
    predicted = plan.predicted
    # Predicted and measured MFU count the same FLOPs over the same peak; only the time differs.
    mfu = predicted.mfu * predicted.step_time_s / statistics.median(times) if predicted else 0.0
    record = RunRecord(
        plan=plan,
        provenance=here(plan.cluster.gpu, datetime.date.today().isoformat()),
        processes=jax.process_count(),
        step_times_s=times,
        mfu=mfu,
        memory=device_memory(),
        compiler_options=platform_options(jax.default_backend()),
        note="steps of a training run, checkpoints and evaluations left out",
    )
    return save(record, folder / RECORD_NAME)
