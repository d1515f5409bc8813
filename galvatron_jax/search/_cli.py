"""The command ``python -m galvatron_jax.search``: which command is meant, and how it ends.

Without a word the command is the search (``_command_search``); with one it works on plan files (``_command_plan``).
stdout carries the result, stderr everything else. An error is one message; ``--debug`` adds its traceback.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence

from ..errors import GalvatronError
from ._flags import INTERRUPTED, PROGRAM

INTERNAL_ERROR = 1
COMMANDS = ("explain", "diff", "report")


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status (0, 2, 3, 4, 6 or 130; 1 for an error of our own)."""
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets question marks, not a traceback
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        return _run(argv)
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


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        from ._command_plan import run_plan_command

        return run_plan_command(argv[0], argv[1:])
    if argv and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise GalvatronError(
            f"got {argv[0]!r}",
            expected=f"flags, or one of the commands {', '.join(COMMANDS)}",
            action=f"did you mean {close[0]}?" if close else f"for example {PROGRAM} --mesh 2x8",
        )
    from ._options import parse_options

    options = parse_options(argv)
    from ._command_search import run_search  # numpy comes with it: --help and a slip of the keyboard need none

    return run_search(options)


def _fail(message: str, status: int, debug: bool) -> int:
    from .._text import clean

    if debug:
        traceback.print_exc()
    text = "\n".join(clean(line) for line in message.splitlines())
    sys.stderr.write(f"galvatron_jax.search: {'' if status == INTERRUPTED else 'error: '}{text}\n")
    return status
