"""The search as a command: read inputs, search, write the plan, answer what was asked beside it.

The first Ctrl-C (or SIGTERM) ends the search with the best plan so far, which is written; the second one ends the
process. Two searches for one plan file do not run at once: the second is told who works on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

import msgspec

from .._document import encode, load
from .._lock import only_writer
from .._text import Line, Piece, clean, labelled, show, write_json
from ..cluster import Cluster
from ..errors import DocumentError, GalvatronError
from ..plan import Plan, save_plan
from ._find import SearchResult, find_plan
from ._flags import FELL_BACK, INTERRUPTED, PROGRAM
from ._inputs import Inputs, assumption_lines, load_inputs
from ._options import Options
from ._proof import Proved, Verdict, prove, rejection_lines, run_verify
from ._report import proof_line, result_lines
from ._watch import Watch, watching
from .explain import Subject, asked_lines, asked_values, compare_clusters, memory_frontier, scaling_lines
from .html import PageContent, check_page_target, write_page


def run_search(options: Options) -> int:
    """Search, write and show; return the exit status: 0, FELL_BACK or INTERRUPTED."""
    if len(options.clusters) > 1:
        _compare(options)
        return 0
    writes = options.out_given or not options.json
    for path in [options.out] * writes + [options.report] * (options.report is not None):
        assert path is not None
        _check_target(path, "--report" if path is options.report else "--out")
    if options.report is not None:
        check_page_target(options.report, "--report")
    if writes and not options.force:
        _check_overwritten(options.out)
    with contextlib.ExitStack() as stack:
        if writes:
            stack.enter_context(only_writer(options.out))
        with watching(quiet=options.quiet) as watch:
            inputs = load_inputs(options, options.cluster)
            result = _found(options, inputs, watch)
            proved = _proved(options, inputs, result, watch) if options.verify else Proved(result, ())
        written = save_plan(proved.result.plan, options.out) if writes else None
    for line in rejection_lines(proved.rejected) if not options.quiet else ():
        sys.stderr.write(f"{clean(line)}\n")
    _show(options, inputs, proved.result, written)
    return INTERRUPTED if watch.interrupted else FELL_BACK if proved.rejected else 0


def _found(options: Options, inputs: Inputs, watch: Watch | None) -> SearchResult:
    try:
        return find_plan(
            inputs.model,
            inputs.cluster,
            inputs.hardware,
            global_batches=options.global_batches,
            memory_bytes=options.memory_bytes,
            max_stages=options.max_stages,
            max_tp=options.max_tp,
            microbatches=options.microbatches,
            schedules=options.schedules,
            rules=options.rules,
            time_limit_s=options.time_limit_s,
            watch=watch.look if watch else None,
        )
    except GalvatronError:
        if watch is not None and watch.interrupted:
            raise KeyboardInterrupt from None
        raise


def _proved(options: Options, inputs: Inputs, first: SearchResult, watch: Watch) -> Proved:
    """Have plans compiled until one fits."""

    def search(memory_bytes: int) -> SearchResult:
        return _found(dataclasses.replace(options, memory_bytes=memory_bytes), inputs, watch)

    def verify(plan: Plan) -> Verdict:
        if not options.quiet:
            sys.stderr.write(f"compiling for {plan.cluster.mesh} {plan.cluster.gpu}, no GPU used ...\n")
            sys.stderr.flush()
        return run_verify(plan, inputs.hardware, options.verify_model)

    return prove(first, inputs.hardware, search, verify)


def _compare(options: Options) -> None:
    """Several meshes: the best plan on each, side by side; no plan is written."""

    def find(cluster: Cluster) -> SearchResult:
        return _found(options, load_inputs(options, cluster), None)

    if options.out_given:
        raise GalvatronError(
            f"got --out with {len(options.clusters)} meshes",
            expected="one mesh",
            action="search the mesh that you chose",
        )
    inputs = load_inputs(options, max(options.clusters, key=lambda cluster: (cluster.nodes, cluster.gpus_per_node)))
    compared = compare_clusters(options.clusters, find, options.price_per_hour)
    if options.json:
        write_json({"scaling": compared}, sys.stdout)
    elif not options.quiet:
        show([*assumption_lines(inputs, options), (), *scaling_lines(compared)], sys.stdout)


def _show(options: Options, inputs: Inputs, result: SearchResult, written: Path | None) -> None:
    asked = asked_values(options, inputs, result)
    page = None if options.report is None else _write_report(options.report, inputs, result)
    if options.json:
        values = msgspec.to_builtins(asked)
        if any(values.values()):
            write_json({"plan": result.plan, **{name: value for name, value in values.items() if value}}, sys.stdout)
        else:
            sys.stdout.write(encode(result.plan))
        if not options.quiet:
            show([proof_line(result)], sys.stderr)
    elif not options.quiet:
        lines: list[Line] = [*assumption_lines(inputs, options), ()]
        lines += result_lines(result, inputs.model, inputs.hardware)
        lines += asked_lines(asked, Subject(result.plan, inputs.model, inputs.hardware))
        lines.append(())
        for path in (written, page):
            if path is not None:
                lines.append(labelled("file", f"wrote {clean(str(path))}"))
        if written is not None:
            lines += _next_steps(written)
        show(lines, sys.stdout)
    sys.stdout.flush()


def _write_report(path: Path, inputs: Inputs, result: SearchResult) -> Path:
    subject = Subject(result.plan, inputs.model, inputs.hardware)
    frontier = memory_frontier(result.split, result.global_batches, result.plan)
    return write_page(path, PageContent(subject=subject, baselines=result.baselines, frontier=frontier))


def _next_steps(written: Path) -> list[Line]:
    path = clean(str(written))
    python = f'in Python: galvatron_jax.auto_shard(model, plan=galvatron_jax.load_plan("{path}"))'
    return [
        labelled("next", Piece(f"{PROGRAM} explain {path}", "bold")),
        labelled("", Piece(python, "bold")),
    ]


def _check_target(path: Path, flag: str) -> None:
    """Refuse, before any work, a place that cannot be written."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DocumentError("cannot write there", where=f"{flag} {path}", action="choose another path")
    if path.is_dir():
        raise DocumentError("is a folder", expected="a file", where=f"{flag} {path}", action="add a file name")


def _check_overwritten(path: Path) -> None:
    """Refuse to overwrite what is not a plan."""
    if not path.exists():
        return
    try:
        load(path, Plan)
    except GalvatronError:
        raise DocumentError(
            "exists and is not a plan file",
            expected="a new file or a plan",
            where=f"--out {path}",
            action="choose another file, or add --force to overwrite it",
        ) from None
