"""Commands on plan files: explain, diff, report."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._text import Line, Piece, clean, show, write_json
from ..errors import DocumentError, GalvatronError
from ..plan import load_plan
from ._baselines import price_baselines
from ._engine import Engine
from ._flags import PROGRAM
from ._options import Parser, peer_folder
from ._plan_inputs import load_subject
from ._problem import problem_of
from ._report import plan_lines, prediction_lines
from .explain import (
    Subject,
    binding_lines,
    diff_lines,
    diff_plans,
    layer_alternatives,
    layer_lines,
    memory_frontier,
    plan_reasons,
    reason_lines,
    what_if_lines,
    what_ifs,
)
from .html import PageContent, check_page_target, write_page, write_pictures, write_png_pictures

TEXTS = {
    "explain": "Say why each layer has its strategy, what the others would cost, and what binds.",
    "diff": "Say where two plans differ, and what that costs.",
    "report": "Draw a plan as one self-contained HTML page.",
}
EXAMPLES = {
    "explain": "explain configs/optimal_solution.json layer 7",
    "diff": "diff a.json b.json",
    "report": "report configs/optimal_solution.json --out report.html",
}


def run_plan_command(command: str, argv: Sequence[str]) -> int:
    """Run a command on plan files; return its exit status."""
    found = _parser(command).parse_args(argv)
    {"explain": _explain, "diff": _diff, "report": _report}[command](found)
    sys.stdout.flush()
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{PROGRAM} {command}",
        description=TEXTS[command],
        epilog=f"example: {PROGRAM} {EXAMPLES[command]}",
        allow_abbrev=False,
    )
    if command == "diff":
        parser.add_argument("a", metavar="A", type=Path, help="plan file")
        parser.add_argument("b", metavar="B", type=Path, help="plan file")
    else:
        parser.add_argument("plan", metavar="PLAN", type=Path, help="plan file")
        parser.add_argument("--profile", metavar="FILE", type=Path, help="model profile, when it is no preset")
        parser.add_argument("--hardware", metavar="FILE", type=Path, help="hardware profile, when it is not bundled")
        parser.add_argument("--profile-from", nargs=2, metavar=("TOOL", "DIR"), help="another tool's measurements")
    if command == "explain":
        parser.add_argument("layer", nargs="*", metavar="layer N", help="one layer, as the plan table numbers them")
        parser.add_argument("--all", action="store_true", help="show every alternative of a layer")
    if command == "report":
        parser.add_argument(
            "--out", metavar="FILE", type=Path, default=Path("report.html"), help="(default: report.html)"
        )
        parser.add_argument("--svg", metavar="DIR", type=Path, help="write the charts as SVG files there too")
        parser.add_argument(
            "--png", metavar="DIR", type=Path, help="write timeline and memory as PNG there too ([viz])"
        )
    else:
        parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _subject(found: argparse.Namespace) -> tuple[Subject, str]:
    return load_subject(
        found.plan, profile=found.profile, hardware=found.hardware, peer=peer_folder(found.profile_from)
    )


def _explain(found: argparse.Namespace) -> None:
    subject, note = _subject(found)
    layer = _layer(found.layer, subject)
    value: dict[str, Any]
    lines: list[Line] = [(Piece(note, "yellow"),)] if note else []
    if layer is not None:
        alternatives = layer_alternatives(subject, layer)
        value = {"layer": layer, "present": subject.present, "alternatives": alternatives}
        lines += layer_lines(subject, layer, alternatives, every=found.all)
    else:
        reasons = plan_reasons(subject)
        changes = what_ifs(problem_of(subject), [subject.plan.global_batch], subject.plan)
        value = {"present": subject.present, "reasons": reasons, "what_ifs": changes}
        lines += plan_lines(subject.plan, subject.model, subject.hardware)
        lines += [(), *prediction_lines(subject.plan), (), *binding_lines(subject), *reason_lines(subject, reasons)]
        lines += [(), *what_if_lines(changes)]
    if found.json:
        write_json(value, sys.stdout)
    else:
        show(lines, sys.stdout)


def _layer(words: Sequence[str], subject: Subject) -> int | None:
    """``layer 7`` or ``7`` as 7."""
    count = subject.plan.model.layer_count
    text = " ".join(words)
    if not text:
        return None
    match = re.fullmatch(r"(?:layer )?([0-9]{1,5})", text, flags=re.ASCII)
    if match and int(match[1]) < count:
        return int(match[1])
    raise GalvatronError(
        f"got {text!r}",
        expected=f"layer N with N from 0 to {count - 1}, as the plan table numbers them",
        action=f"for example {PROGRAM} {EXAMPLES['explain']}",
    )


def _diff(found: argparse.Namespace) -> None:
    diff = diff_plans(load_plan(found.a), load_plan(found.b))
    if found.json:
        write_json(diff, sys.stdout)
    else:
        show(diff_lines(diff, clean(found.a.name), clean(found.b.name)), sys.stdout)


def _report(found: argparse.Namespace) -> None:
    check_page_target(found.out, "--out")
    subject, note = _subject(found)
    if subject.plan.predicted is None:
        raise DocumentError("carries no prediction", expected="a plan that the search wrote", where=str(found.plan))
    split, batches = problem_of(subject), [subject.plan.global_batch]
    baselines = price_baselines(Engine(split.problem, batches))
    frontier = memory_frontier(split, batches, subject.plan)
    content = PageContent(subject=subject, baselines=baselines, frontier=frontier, note=note)
    written = write_png_pictures(found.png, content) if found.png else []  # first: it may need what is not installed
    written += [write_page(found.out, content), *(write_pictures(found.svg, content) if found.svg else [])]
    show([(Piece(f"wrote {clean(str(path))}"),) for path in written], sys.stdout)
