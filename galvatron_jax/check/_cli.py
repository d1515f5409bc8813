"""The command ``python -m galvatron_jax.cost PLAN [--measure] [--trace FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .._document import load, save
from .._text import clean, show
from ..cost import estimate_plan
from ..errors import DocumentNotFoundError, GalvatronError
from ..hardware import as_priced, load_hardware
from ..models import load_model_profile
from ..plan import Plan, load_plan
from ..profile import HardwareProfile, ModelProfile
from ..record import RunRecord
from ._breakdown import RunPrice, stage_prices
from ._report import breakdown_lines, measured_lines
from ._trace import trace_events

D = TypeVar("D")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 bad input, 4 environment."""
    options = _parser().parse_args(arguments)
    try:
        return _check(options)
    except GalvatronError as error:
        if options.debug:
            raise
        print(f"error: {clean(error.message)}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="galvatron_jax.cost", description="Take a plan's cost apart; with --measure, hold it against the clock."
    )
    add = parser.add_argument
    add("plan", type=Path, help="a plan, found or written by hand")
    add("--hardware", metavar="NAME|FILE", help="hardware profile (by the plan's cluster)")
    add("--profile", type=Path, metavar="FILE", help="model profile, for example with measured layers (by its preset)")
    add("--model", default="", metavar="MODULE:FUNCTION", help="your own model: returns (model, loss, batch)")
    add("--attention", choices=("fused", "xla"), help="how attention runs (default: as the plan was priced)")
    add("--trace", type=Path, metavar="FILE", help="write the predicted step as Trace Event JSON (ui.perfetto.dev)")
    add("--measure", action="store_true", help="run the plan on the visible devices and show the errors")
    add("--steps", type=_positive, default=10, metavar="N", help="steps to measure (%(default)s)")
    add("--record", type=Path, metavar="FILE", help="write what was measured: calibrate reads it")
    add("--devices", type=_positive, metavar="N", help="measure on N virtual CPU devices")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _check(options: argparse.Namespace) -> int:
    if options.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
        flags += [f"--xla_force_host_platform_device_count={options.devices}"]
        os.environ["XLA_FLAGS"] = " ".join(flags)
    plan = load_plan(options.plan)
    model, hardware = _model(options, plan), _hardware(options, plan)
    plan = msgspec.structs.replace(plan, predicted=estimate_plan(plan, model, hardware))
    stages = stage_prices(plan, model, hardware)
    if options.trace:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        options.trace.write_text(json.dumps(trace_events(plan, model, hardware)) + "\n")
    assert plan.predicted is not None
    if not options.json:
        show(breakdown_lines(plan, model, hardware, stages, plan.predicted), sys.stdout)
    record = _measure(options, plan, model, hardware) if options.measure else None
    if options.json:
        print(json.dumps(_data(plan, stages, record), indent=2))
    elif record:
        show(measured_lines(record, plan.predicted), sys.stdout)
    for path in filter(None, (options.trace, options.record if record else None)):
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _measure(options: argparse.Namespace, plan: Plan, model: ModelProfile, hardware: HardwareProfile) -> RunRecord:
    from .. import distributed  # JAX only where a clock runs
    from .._user_model import own_model, preset_model
    from ._measure import measure_plan

    distributed.initialize()
    name = plan.model
    if options.model:
        user = own_model(options.model)
    else:
        fused = hardware.fused_attention
        user = preset_model(name.name, seq=name.seq, dtype=name.dtype, fused_attention=fused)
    record = measure_plan(plan, user, model, hardware, steps=options.steps, show=_progress)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if options.record:
        save(record, options.record)
    return record


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        what = "compiling" if done == 0 else f"step {done} of {total}"
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _hardware(options: argparse.Namespace, plan: Plan) -> HardwareProfile:
    hardware = _named(load_hardware, options.hardware or plan.cluster.gpu, "give the plan's hardware with --hardware")
    if options.attention is None:
        return (as_priced(hardware, plan.hardware.fingerprint) if plan.hardware else None) or hardware
    return msgspec.structs.replace(hardware, fused_attention=options.attention == "fused")


def _model(options: argparse.Namespace, plan: Plan) -> ModelProfile:
    if options.profile:
        return load(options.profile, ModelProfile).at_seq(plan.model.seq).at_dtype(plan.model.dtype)
    if options.model:
        from .._user_model import own_model  # an own model is analysed, and that needs JAX
        from ..analysis import analyse_model

        user = own_model(options.model).resized(plan.microbatch_size)
        return analyse_model(user.model, user.loss, user.batch, name=plan.model.name).profile
    model = _named(load_model_profile, plan.model.name, "give the plan's model with --profile or --model")
    return model.at_seq(plan.model.seq).at_dtype(plan.model.dtype)


def _named(find: Callable[[str], D], name: str, action: str) -> D:
    """What the plan names, if we store it; else an error that says which flag gives it."""
    try:
        return find(name)
    except DocumentNotFoundError as error:
        raise DocumentNotFoundError(error.problem, expected=error.expected, where="plan", action=action) from None


def _data(plan: Plan, stages: Sequence[Sequence[RunPrice]], record: RunRecord | None) -> dict[str, Any]:
    rows = [
        {
            "stage": s,
            "first": price.first,
            "count": price.count,
            "kind": price.kind,
            "strategy": msgspec.to_builtins(price.strategy),
            "times_s": price.causes_s,
            "memory_bytes": dict(price.cost.memory),
            "compute": "measured" if price.measured else "estimated",
        }
        for s, prices in enumerate(stages)
        for price in prices
    ]
    data = {"predicted": msgspec.to_builtins(plan.predicted), "runs": rows}
    if record:
        data["measured"] = {
            "step_time_s": record.step_time_s,
            "spread": record.spread,
            "error": record.time_error,
            "mfu": record.mfu,
            "peak_bytes": record.peak_bytes,
        }
    return data


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value
