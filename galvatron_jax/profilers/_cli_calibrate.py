"""``python -m galvatron_jax.profilers calibrate RECORD…``: no devices, no JAX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from .._document import load, save
from ..hardware import load_hardware
from ..models import load_model_profile
from ..record import RunRecord
from ..units import format_seconds
from ._calibrate import Calibration, calibrate


def run_calibrate(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    records = [load(path, RunRecord) for path in options.records]
    plan = records[0].plan
    hardware = load_hardware(options.hardware or plan.cluster.gpu)
    model = load_model_profile(options.profile or plan.model.name).at_seq(plan.model.seq).at_dtype(plan.model.dtype)
    result = calibrate(records, model, hardware)
    print("\n".join(_lines(result)))
    save(result.hardware, options.out_hardware)
    print(f"wrote {options.out_hardware}")
    if options.out_profile:
        save(result.model, options.out_profile)
        print(f"wrote {options.out_profile}")
    elif any(kind.measured for kind in model.kinds):
        print("note: --out-profile would keep the correction of measured layers", file=sys.stderr)
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _lines(result: Calibration) -> Iterator[str]:
    width = max(len(fit.name) for fit in result.records)
    yield f"{'':<{width}}  measured    before     after"
    for fit in result.records:
        before, after = fit.before_s / fit.measured_s - 1, fit.after_s / fit.measured_s - 1
        yield f"{fit.name:<{width}}  {format_seconds(fit.measured_s):>8}  {before:>+8.1%}  {after:>+8.1%}"
    yield ""
    for name, factor in result.factors.items():
        yield f"seconds of {name}: x {factor:.3f}" + ("" if abs(factor - 1) > 1e-3 else " (left as it was)")
