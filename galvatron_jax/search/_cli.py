"""The command ``python -m galvatron_jax.search``: read options, search, show and write the plan.

stdout carries the result, stderr everything else. An error is one message; ``--debug`` adds its traceback. The first
Ctrl-C (or SIGTERM) ends the search with the best plan so far, the second one ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import DocumentError, GalvatronError
from ._options import Options, parse_options

if TYPE_CHECKING:
    from ..plan import Plan
    from ._find import SearchResult
    from ._inputs import Inputs

INTERRUPTED = 130
INTERNAL_ERROR = 1
PROGRESS_AFTER_S = 1.0
PROGRESS_EVERY_S = 0.1


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status (0, 2, 3, 4 or 130; 1 for an error of our own)."""
    debug = "--debug" in argv
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets question marks, not a traceback
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        return _run(parse_options(argv))
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


def _run(options: Options) -> int:
    from ..plan import save_plan
    from ._find import find_plan
    from ._inputs import load_inputs

    writes = options.out_given or not options.json
    if writes:
        _check_out(options.out, options.force)
    inputs = load_inputs(options)
    with _watching(quiet=options.quiet) as watch:
        try:
            result = find_plan(
                inputs.model,
                inputs.cluster,
                inputs.hardware,
                global_batches=options.global_batches,
                memory_bytes=options.memory_bytes,
                max_stages=options.max_stages,
                max_tp=options.max_tp,
                microbatches=options.microbatches,
                time_limit_s=options.time_limit_s,
                watch=watch.look,
            )
        except GalvatronError:
            if watch.interrupted:
                raise KeyboardInterrupt from None
            raise
    written = save_plan(result.plan, options.out) if writes else None
    _show(options, inputs, result, written)
    return INTERRUPTED if watch.interrupted else 0


def _show(options: Options, inputs: Inputs, result: SearchResult, written: Path | None) -> None:
    from .._document import encode
    from ._inputs import assumption_lines
    from ._report import proof_line, result_lines
    from ._text import Line, Piece, clean, labelled, show

    if options.json:
        sys.stdout.write(encode(result.plan))
        if not options.quiet:
            show([proof_line(result)], sys.stderr)
    elif not options.quiet:
        lines: list[Line] = [*assumption_lines(inputs, options), ()]
        lines += result_lines(result, inputs.model, inputs.hardware)
        if written is not None:
            lines.append(labelled("file", f"wrote {clean(str(written))}"))
            lines.append(labelled("next", Piece(_next_step(result.plan, written), "bold")))
        show(lines, sys.stdout)
    sys.stdout.flush()


def _next_step(plan: Plan, written: Path) -> str:
    if len(plan.stages) > 1:
        return "this version runs plans of one stage: search with --no-pp for one that auto_shard can train"
    return f'in Python: galvatron_jax.auto_shard(model, plan=galvatron_jax.load_plan("{written}"))'


def _check_out(path: Path, force: bool) -> None:
    """Refuse, before any work, to overwrite what is not a plan."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DocumentError("cannot write there", where=f"--out {path}", action="choose another path")
    if path.is_dir():
        raise DocumentError("is a folder", expected="a file", where=f"--out {path}", action="add a file name")
    if not force and path.exists() and not _is_plan(path):
        raise DocumentError(
            "exists and is not a plan file",
            expected="a new file or a plan",
            where=f"--out {path}",
            action="choose another file, or add --force to overwrite it",
        )


def _is_plan(path: Path) -> bool:
    from .._document import load
    from ..plan import Plan

    try:
        load(path, Plan)
    except GalvatronError:
        return False
    return True


class _Watch:
    """Looks at the search while it runs: shows progress, and ends it when a signal came."""

    def __init__(self, quiet: bool) -> None:
        self.interrupted = False
        self._shows = not quiet and sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + PROGRESS_AFTER_S
        self._shown = False

    def look(self, best: float | None) -> bool:
        """Take note of the best seconds per sample so far; return whether to stop."""
        now = time.monotonic()
        if self._shows and now >= self._next:
            found = "no plan yet" if best is None else f"best so far {1 / best:.4g} samples/s"
            sys.stderr.write(f"\r\033[Ksearching, {now - self._start:.0f} s · {found} · Ctrl-C keeps the best")
            sys.stderr.flush()
            self._next, self._shown = now + PROGRESS_EVERY_S, True
        return self.interrupted

    def end(self) -> None:
        """Take the progress line away."""
        if self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Stop the search at the next look; a second signal ends the process as usual."""
        self.interrupted = True
        signal.signal(number, signal.default_int_handler)


@contextmanager
def _watching(*, quiet: bool) -> Iterator[_Watch]:
    """Catch SIGINT and SIGTERM while the search runs."""
    watch = _Watch(quiet)
    before: dict[signal.Signals, object] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                before[number] = signal.signal(number, watch.on_signal)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        yield watch
    finally:
        watch.end()
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() returned, it takes back


def _fail(message: str, status: int, debug: bool) -> int:
    from ._text import clean

    if debug:
        traceback.print_exc()
    text = "\n".join(clean(line) for line in message.splitlines())
    sys.stderr.write(f"galvatron_jax.search: {'' if status == INTERRUPTED else 'error: '}{text}\n")
    return status
