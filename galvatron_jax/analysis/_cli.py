"""The command ``python -m galvatron_jax.analysis MODEL``: what is found in a model, without building it.

stdout carries the result, stderr everything else. An error is one message; ``--debug`` adds its traceback.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .._text import clean, show, write_json
from ..errors import GalvatronError

LEAST_SAMPLES = 4
"""A batch of one has no batch dimension to find; four samples stand for the usual few per device."""

INTERRUPTED = 130
INTERNAL_ERROR = 1
EPILOG = """\
MODEL is a preset (llama2-7b) or MODULE:FUNCTION, a function without arguments that returns (model, loss, batch):
  model   a flax.nnx.Module; a flax.linen.Module, bound or not; a pytree of parameters; or a function that builds one
  loss    loss(model, batch), a scalar, or a tuple that begins with it; a Linen module arrives bound to its variables
  batch   a pytree of arrays or jax.ShapeDtypeStruct; dimension 0 is the batch. Only its shapes are used

    def tiny():
        return (lambda: MyModel(rngs=nnx.Rngs(0))), my_loss, {"tokens": jax.ShapeDtypeStruct((8, 128), jnp.int32)}

  $ python -m galvatron_jax.analysis my_project.model:tiny

exit status: 0 done, 2 the model, the loss or an option is wrong, 130 interrupted
"""

Load = Callable[[str], tuple[Any, Any, Any]]
"""From the command's argument to (model, loss, batch)."""


class _Parser(argparse.ArgumentParser):
    """Errors are raised like all others instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise GalvatronError(message, action="see python -m galvatron_jax.analysis --help")


def main(argv: Sequence[str], load: Load) -> int:
    """Run the command; return its exit status (0, 2 or 130; 1 for an error of our own)."""
    debug = "--debug" in argv
    try:
        return _run(_parser().parse_args(argv), load)
    except GalvatronError as error:
        return _fail(f"error: {error.message}", error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except Exception as error:
        action = "this is a fault of galvatron_jax: please report it with the output of --debug"
        return _fail(f"internal error: {type(error).__name__}: {error}; {action}", INTERNAL_ERROR, debug)


def _run(options: argparse.Namespace, load: Load) -> int:
    from ._batch import abstract_batch, sample_count
    from ._profile import analyse_model
    from ._report import analysis_lines

    model, loss, batch = load(options.model)
    batch = abstract_batch(batch, options.batch or max(sample_count(batch) or 1, LEAST_SAMPLES))
    name = None if ":" in options.model else options.model
    analysis = analyse_model(model, loss, batch, name=name, layers=options.layers)
    if options.json:
        write_json(analysis.profile, sys.stdout)
    else:
        show(analysis_lines(analysis), sys.stdout)
    sys.stdout.flush()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m galvatron_jax.analysis",
        description="Show what is found in a model: its layers, what may be sharded, what that costs. Nothing is built:"
        " no parameter memory, no device.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a preset, or MODULE:FUNCTION of your own model")
    add(
        "--batch",
        type=_samples,
        metavar="N",
        help="samples of the traced microbatch (default: of the batch, at least 4)",
    )
    add("--layers", metavar="GLOB", help="the repeated blocks, where they are not found: 'model.layers.*'")
    add(
        "--json",
        action="store_true",
        help="print the model profile as JSON, for python -m galvatron_jax.search --model",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _samples(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number of samples")
    return int(text)


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"galvatron_jax.analysis: {clean(message)}\n")
    return status
