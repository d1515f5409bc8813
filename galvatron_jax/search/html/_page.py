"""The page: figures, map, timeline, memory, time, baselines, frontier. One file, nothing loaded from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..._document import write_text
from ...cost import PlanTimeline, plan_timeline
from ...errors import DocumentError
from ...plan import Plan
from ...units import GIB, format_count, format_gib, format_seconds
from .._baselines import Baseline
from .._report import run_cells
from ..explain import Point, Subject
from ._bars import baseline_bars, time_bar
from ._frontier import frontier_chart
from ._map import layer_map, strategy_rows
from ._markup import Markup, join, tag
from ._memory import memory_charts
from ._pictures import standalone
from ._png import write_pngs
from ._schedule import timeline_chart
from ._style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy: whatever a name holds, the page runs no script and asks nobody for anything."""


PLAN_WORDS = (
    "Layers from left to right, GPUs from top to bottom. Thin lines separate GPUs that work on different samples; "
    "hatching is rematerialisation."
)
STEP_WORDS = "What every stage does when. Communication that nothing hides is inside the boxes."
MEMORY_WORDS = "Of one GPU of every stage over the step. The dashed line is the budget."
TIME_WORDS = "On the stage that is done last."


@dataclass(frozen=True, slots=True, kw_only=True)
class PageContent:
    """What a page is about."""

    subject: Subject
    baselines: tuple[Baseline, ...] = ()
    frontier: tuple[Point, ...] = ()
    note: str = ""
    """A caution for the reader."""


def write_pictures(folder: Path, content: PageContent) -> list[Path]:
    """Write the charts of the page as SVG files that stand alone; return their paths.

    Raises:
        DocumentError: the folder cannot be written.
    """
    subject, plan = content.subject, content.subject.plan
    timeline, memory = _played(subject)
    charts = {
        "map": layer_map(plan),
        "timeline": timeline_chart(timeline, slice_word(plan)),
        "memory": memory_charts(timeline, memory, subject.budget_bytes, slice_word(plan)),
    }
    if content.frontier:
        charts["frontier"] = frontier_chart(content.frontier, subject.budget_bytes, subject.present.peak_bytes)
    return [
        write_text(picture, folder / f"{name}{number}.svg", "picture")
        for name, markup in charts.items()
        for number, picture in standalone(markup)
    ]


def write_png_pictures(folder: Path, content: PageContent) -> list[Path]:
    """Write timeline and memory as PNG files; arguments and errors as ``_png.write_pngs``."""
    timeline, memory = _played(content.subject)
    return write_pngs(folder, timeline, memory, slice_word(content.subject.plan))


def _played(subject: Subject) -> tuple[PlanTimeline, list[dict[str, int]]]:
    """What every slice does when, and its bytes by category."""
    plan = subject.plan
    assert plan.predicted is not None
    memory = [stage.memory for stage in plan.predicted.stages[: plan.slices]]
    return plan_timeline(plan, subject.model, subject.hardware), memory


def render_page(content: PageContent) -> str:
    """Return the page as HTML."""
    plan = content.subject.plan
    title = f"{plan.model.name} on {plan.cluster.mesh} {plan.cluster.gpu}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    body = tag("body", tag("main", tag("h1", title), tag("p", _subtitle(plan)), *_sections(content), _footer(plan)))
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def write_page(path: Path, content: PageContent) -> Path:
    """Write the page atomically; return its path.

    Raises:
        DocumentError: the folder cannot be written, or ``path`` is a symbolic link.
    """
    return write_text(render_page(content), path, "report")


def _sections(content: PageContent) -> list[Markup]:
    subject, plan = content.subject, content.subject.plan
    predicted = plan.predicted
    assert predicted is not None
    timeline, memory = _played(subject)
    columns, cells = run_cells(plan, subject.model, subject.hardware)
    found = [tag("p", content.note, class_="warn")] if content.note else []
    found += [
        _cards(subject),
        _section("Plan", PLAN_WORDS, layer_map(plan), strategy_rows(plan, columns, cells)),
        _section("One step", STEP_WORDS, timeline_chart(timeline, slice_word(plan))),
        _section("Memory", MEMORY_WORDS, memory_charts(timeline, memory, subject.budget_bytes, slice_word(plan))),
        _section("Where the time goes", TIME_WORDS, time_bar(predicted.times, predicted.step_time_s)),
    ]
    if content.baselines:
        found.append(
            _section(
                "Beside it",
                "The same model on the same GPUs, each family at its best.",
                baseline_bars(plan, content.baselines),
            )
        )
    if content.frontier:
        peak = max(stage.peak_bytes for stage in predicted.stages)
        chart = frontier_chart(content.frontier, subject.budget_bytes, peak)
        found.append(_section("Memory against speed", "The fastest plan for each amount of memory.", chart))
    return found


def slice_word(plan: Plan) -> str:
    """Return what a slice of devices is called: a stage, unless it holds several."""
    return "slice" if plan.chunks > 1 else "stage"


def _section(title: str, words: str, *content: str) -> Markup:
    return tag("section", tag("h2", title), tag("p", words, class_="note"), *content)


def _subtitle(plan: Plan) -> str:
    stages = f"{plan.slices} stages, {plan.schedule}" if len(plan.stages) > 1 else "1 stage"
    return (
        f"{format_count(plan.model.parameter_count)} parameters · sequence {plan.model.seq} · {plan.model.dtype} · "
        f"global batch {plan.global_batch} · {stages} · "
        f"{plan.microbatches} microbatches of {plan.microbatch_size} samples"
    )


def _cards(subject: Subject) -> Markup:
    plan, predicted = subject.plan, subject.plan.predicted
    assert predicted is not None
    peak = max(stage.peak_bytes for stage in predicted.stages)
    certificate = plan.certificate
    proof = ("not searched", "no certificate") if certificate is None else ("optimal", "in the stated space")
    if certificate is not None and not certificate.optimal:
        proof = (f"≤ {certificate.gap:.1%}", "from the optimum, proven")
    cards = [
        (format_seconds(predicted.step_time_s), "per step, predicted"),
        (format_count(predicted.tokens_per_s), "tokens/s"),
        (format_count(predicted.tokens_per_s / plan.cluster.devices), "tokens/s per GPU"),
        (f"{predicted.mfu:.1%}", "MFU, causal attention half"),
        (f"{peak / GIB:.1f} GiB", f"peak of {format_gib(subject.budget_bytes)} per GPU"),
        proof,
    ]
    boxes = [tag("div", tag("b", figure), tag("span", words), class_="card") for figure, words in cards]
    return tag("div", *boxes, class_="cards")


def _footer(plan: Plan) -> Markup:
    words = [f"model structure {plan.model.structure}", f"plan {plan.fingerprint}"]
    if plan.hardware is not None:
        kind = "measured" if plan.hardware.measured else "not measured"
        words.insert(1, f"hardware {plan.hardware.name} {plan.hardware.fingerprint} ({kind})")
    return tag("footer", join(["galvatron_jax · estimates of a cost model, no clock ran · ", " · ".join(words)]))


def check_page_target(path: Path, flag: str) -> None:
    """Refuse, before any work, a place where no page can be written.

    Raises:
        DocumentError: it is a folder, or something else than a page that would be overwritten.
    """
    if path.is_dir():
        raise DocumentError("is a folder", expected="a file", where=f"{flag} {path}", action="add a file name")
    if path.exists() and not path.read_bytes()[:15].lower().startswith(b"<!doctype html>"):
        raise DocumentError(
            "exists and is not a page", expected="a new file or an HTML page", where=f"{flag} {path}",
            action="choose another file",
        )  # fmt: skip
