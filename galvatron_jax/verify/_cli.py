"""The command ``python -m galvatron_jax.verify PLAN``: compile the plan for its GPUs without a GPU, and compare.

stdout carries the result, stderr everything else. An error is one message; ``--debug`` adds its traceback. jax is
imported by the compiling subprocess only, so ``--help`` and a bad plan answer at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import GalvatronError
from ..hardware import load_hardware
from ..plan import load_plan
from ._compile import TIME_LIMIT_S

DOES_NOT_FIT = 3
INTERRUPTED = 130
INTERNAL_ERROR = 1
EPILOG = """\
needs the compiler of jax's CUDA plugin (about 183 MB, no GPU, no CUDA):
  pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION     (VERSION of the installed jaxlib)

attention by cuDNN's fused kernel, as most plans count on, needs cuDNN (716 MB, no GPU):
  pip install --no-deps nvidia-cudnn-cu12
without it the scores of attention are arrays, and the estimate beside them assumes the same. CUDA context and NCCL are
the reserve of the hardware profile, not compiled (docs/verify.md)

exit status: 0 fits, 3 does not fit, 2 bad plan or model, 4 compiler missing or failed
"""
_MODEL_HELP = """your own model: a function without arguments that returns (model or builder, loss, batch); it is
imported and called (default: the preset that the plan names)"""


class _Parser(argparse.ArgumentParser):
    """Errors are raised like all others instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise GalvatronError(message, action="see python -m galvatron_jax.verify --help")


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status (0, 2, 3, 4 or 130; 1 for an error of our own)."""
    debug = "--debug" in argv
    try:
        return _run(_parser().parse_args(argv))
    except GalvatronError as error:
        return _fail(error.message, error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout has gone; nobody is left to tell
        return 0
    except Exception as error:
        action = "this is a fault of galvatron_jax: please report it with the output of --debug"
        return _fail(f"internal error: {type(error).__name__}: {error}; {action}", INTERNAL_ERROR, debug)


def _run(options: argparse.Namespace) -> int:
    from ._report import as_data, report_lines
    from ._verification import verify_plan

    plan = load_plan(options.plan)
    hardware = load_hardware(options.hardware) if options.hardware else None
    if not options.quiet:
        sys.stderr.write(f"compiling for {plan.cluster.mesh} {plan.cluster.gpu}, up to {options.time_limit:g} s ...\n")
        sys.stderr.flush()
    found = verify_plan(plan, model=options.model, hardware=hardware, time_limit_s=options.time_limit)
    if options.json:
        sys.stdout.write(json.dumps(as_data(found), indent=2) + "\n")
    elif not options.quiet:
        sys.stdout.writelines(f"{line}\n" for line in report_lines(found, str(options.plan)))
    sys.stdout.flush()
    return 0 if found.fits else DOES_NOT_FIT


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m galvatron_jax.verify",
        description="Compile a plan with XLA's real compiler for its GPUs, on a machine that has none: does it fit, and"
        " does it communicate as predicted?",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("plan", type=Path, metavar="PLAN", help="plan file, as python -m galvatron_jax.search writes it")
    add("--model", default="", metavar="MODULE:FUNCTION", help=_MODEL_HELP)
    add("--hardware", type=Path, metavar="FILE", help="hardware profile to estimate with (default: bundled)")
    add("--time-limit", type=_seconds, default=TIME_LIMIT_S, metavar="SECONDS", help="for the compilation")
    add("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")
    add("--quiet", action="store_true", help="print nothing but errors (and the result with --json)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _seconds(text: str) -> float:
    try:
        limit_s = float(text)
    except ValueError:
        limit_s = -1.0
    if not 0 < limit_s < 1e7:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected positive seconds")
    return limit_s


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"galvatron_jax.verify: {'' if status == INTERRUPTED else 'error: '}{message}\n")
    return status
