"""The command line of the profilers: ``python -m galvatron_jax.profilers hardware|computation|memory|calibrate``.

JAX is imported after the arguments are read: ``--help`` answers at once, and ``--devices`` must reach XLA before that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster import parse_cluster
from ..errors import GalvatronError
from ..units import format_seconds

if TYPE_CHECKING:
    from ._measure import HardwareResult
    from ._report import Row
    from ._runner import Progress

_INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, by the shell's convention (128 + SIGINT)."""

_ATTENTION = "of a preset: fused, cuDNN's kernel on GPUs, as plans count on it, or xla, scores in memory (%(default)s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 bad input, 4 environment."""
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except GalvatronError as error:
        if options.debug:
            raise
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from here", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="galvatron_jax.profilers", description="Measure real devices.")
    commands = parser.add_subparsers(dest="command", required=True)
    hardware = commands.add_parser(
        "hardware", help="collectives, products, copies and launches of the devices in sight"
    )
    add = hardware.add_argument
    add("--mesh", required=True, metavar="NODESxGPUS", help="the devices to measure, for example 1x8")
    add("--out", type=Path, default=Path("configs/hardware.json"), help="hardware profile to write (%(default)s)")
    add("--quick", action="store_true", help="fewer sizes and repetitions: a first look, in about a minute")
    add("--budget-s", type=_positive, metavar="S", help="seconds to spend (300; with --quick 45)")
    _add_common(hardware)
    model = commands.add_parser(
        "computation", aliases=["model"], help="the layers of a model on devices: forward, backward, recomputation"
    )
    add = model.add_argument
    add("--model", required=True, metavar="NAME", help="a preset, or MODULE:FUNCTION that returns (model, loss, batch)")
    add("--mesh", default="1x1", metavar="NODESxGPUS", help="devices that run copies at the same time (%(default)s)")
    add("--out", type=Path, default=Path("configs/model.json"), help="model profile to write (%(default)s)")
    add("--samples", type=_counts, default=(1, 2, 4), metavar="N,N", help="samples on one device (1,2,4)")
    add("--tp", type=_counts, default=(1, 2, 4, 8), metavar="N,N", help="tensor-parallel degrees, as shares (1,2,4,8)")
    add("--seq", type=_count, metavar="N", help="sequence length of a preset (its own)")
    add("--dtype", help="compute dtype of a preset (its own)")
    add("--attention", choices=("fused", "xla"), default="fused", help=_ATTENTION)
    add("--budget-s", type=_positive, default=180.0, metavar="S", help="seconds to spend (%(default)s)")
    _add_common(model)
    _add_memory(commands.add_parser("memory", help="the layers of a model, compiled for GPUs that need not be there"))
    _add_calibrate(commands.add_parser("calibrate", help="correct profiles by what runs took (run records)"))
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the partial file of an interrupted run")
    add("--base", default="", metavar="NAME", help="profile for what is not measured (by the kind of device)")
    add("--devices", type=_count, metavar="N", help="measure N virtual CPU devices instead of what is in sight")
    add("--coordinator", metavar="HOST:PORT", help="several processes: where the first listens")
    add("--processes", type=_count, metavar="N", help="several processes: how many")
    add("--process", type=int, metavar="I", help="several processes: which one this is, from 0")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a preset, or MODULE:FUNCTION that returns (model, loss, batch)")
    add("--mesh", default="1x8", metavar="NODESxGPUS", help="compile for these devices (%(default)s)")
    add("--gpu", default="h100", metavar="NAME", help="the kind of GPU (%(default)s)")
    add("--out", type=Path, default=Path("configs/model.json"), help="model profile to write or add to (%(default)s)")
    add("--plan", type=Path, action="append", default=[], metavar="FILE", help="compile first what this plan uses")
    add("--state-bytes", type=int, default=8, metavar="N", help="optimizer state per parameter (%(default)s: Adam)")
    add("--seq", type=_count, metavar="N", help="sequence length of a preset (its own)")
    add("--dtype", help="compute dtype of a preset (its own)")
    add("--attention", choices=("fused", "xla"), default="fused", help=_ATTENTION)
    add("--budget-s", type=_positive, default=180.0, metavar="S", help="seconds to spend (%(default)s)")
    add("--resume", action="store_true", help="go on from the partial file of an interrupted run")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("records", nargs="+", type=Path, metavar="RECORD", help="run records of one model on one kind of device")
    add("--hardware", metavar="NAME|FILE", help="hardware profile to correct (by the plans' cluster)")
    add("--profile", metavar="NAME|FILE", help="model profile to correct (the preset of the plans)")
    add("--out-hardware", type=Path, default=Path("configs/hardware.json"), metavar="FILE", help="(%(default)s)")
    add("--out-profile", type=Path, metavar="FILE", help="write the model profile too: its measured layers change")
    add("--debug", action="store_true", help="show the traceback of an error")


def _hardware(options: argparse.Namespace) -> int:
    cluster = parse_cluster(options.mesh)
    _choose_devices(options)
    from ._measure import HardwareOrder, measure_hardware

    order = HardwareOrder(
        cluster=cluster,
        out=options.out,
        budget_s=options.budget_s or (45.0 if options.quick else 300.0),
        quick=options.quick,
        resume=options.resume,
        base=options.base,
    )
    start_s = time.monotonic()
    result = measure_hardware(order, show=_progress())
    if not options.process:
        _print_result(result, options, time.monotonic() - start_s)
    return 0


def _model(options: argparse.Namespace) -> int:
    cluster = parse_cluster(options.mesh)
    _choose_devices(options)
    from .._user_model import named_model
    from ._layer_report import layer_rows
    from ._model import ModelOrder, measure_model
    from ._report import plain_table

    own = ":" in options.model
    name = options.model.rpartition(":")[2] if own else options.model.strip().lower()
    fused = options.attention == "fused"
    model = named_model(options.model, seq=options.seq, dtype=options.dtype, fused_attention=fused)
    start_s = time.monotonic()
    result = measure_model(
        ModelOrder(
            model=model,
            name=name,
            cluster=cluster,
            out=options.out,
            samples=options.samples,
            degrees=options.tp,
            budget_s=options.budget_s,
            resume=options.resume,
            base=options.base,
        ),
        show=_progress(),
    )
    if not options.process:
        _clear_line()
        print(plain_table(layer_rows(result.profile), headings=("", "measured", "")))
        _print_end(options, result.notes, complete=result.complete, taken_s=time.monotonic() - start_s)
    return 0


def _memory(options: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # here the model is only traced; the compiler works in a process of its own
    from ._cli_memory import run_memory

    return run_memory(options, progress_line)


def _calibrate(options: argparse.Namespace) -> int:
    from ._cli_calibrate import run_calibrate  # numpy only here

    return run_calibrate(options)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "hardware": _hardware,
    "computation": _model,
    "model": _model,
    "memory": _memory,
    "calibrate": _calibrate,
}


def _choose_devices(options: argparse.Namespace) -> None:
    """Before JAX looks for devices."""
    if options.devices:
        _force_cpu_devices(options.devices)
    _join_processes(options)


def _force_cpu_devices(devices: int) -> None:
    """Ask XLA for virtual CPU devices; too late, and without effect, once a program has asked JAX for its devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])


def _join_processes(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any: named here, or by the launcher (``distributed``)."""
    from .. import distributed

    place = distributed.initialize(options.coordinator, options.processes, options.process)
    options.process = place.process if place else 0


def _progress() -> Callable[[Progress], None]:
    """Return what shows progress: one line that is written over, on a terminal only."""
    if not sys.stderr.isatty():
        return lambda _: None

    return lambda progress: progress_line(progress.subject.text, progress.done, progress.total, progress.left_s)


def progress_line(text: str, done: int, total: int, left_s: float) -> None:
    """Write over the one line that shows progress, on a terminal only."""
    if sys.stderr.isatty():
        left = format_seconds(left_s) if done else "?"
        print(f"\r\x1b[K{f'{done + 1}/{total}  {text}  ({left} left)'[:110]}", end="", file=sys.stderr, flush=True)


def _print_result(result: HardwareResult, options: argparse.Namespace, taken_s: float) -> None:
    from ._report import plain_table, report_rows

    _clear_line()
    rows = report_rows(result.profile, result.base)
    if sys.stdout.isatty():
        _print_rich(rows)
    else:
        print(plain_table(rows))
    print(
        f"\nexpected: profile {result.base.name}. collectives: time at the smallest size, bus bandwidth at the largest"
    )
    _print_end(options, result.notes, complete=result.complete, taken_s=taken_s)


def _clear_line() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)


def _print_end(options: argparse.Namespace, notes: Sequence[str], *, complete: bool, taken_s: float) -> None:
    print(f"wrote {options.out} in {format_seconds(taken_s)}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not complete:
        print("note: the same command with --resume measures what was left out", file=sys.stderr)


def _print_rich(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ._report import HEADINGS

    table = Table(box=None, header_style="bold")
    for column, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a positive number of seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 to 4096")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))
