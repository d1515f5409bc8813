"""The HTML report: what it draws is what the cost model says, no name breaks it, and a real browser shows it."""

from __future__ import annotations

import html
import html.parser
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from galvatron_jax.cluster import parse_cluster
from galvatron_jax.cost import estimate_plan, plan_timeline
from galvatron_jax.errors import ToolchainError
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference
from galvatron_jax.profile import LayerRun, ModelProfile
from galvatron_jax.search import find_plan
from galvatron_jax.search.explain import Subject, memory_frontier
from galvatron_jax.search.html import PageContent, render_page, write_page, write_pictures, write_png_pictures
from galvatron_jax.search.html._draw import ticks
from galvatron_jax.search.html._markup import tag
from tests.support.toy_models import llama_like_profile, toy_hardware

HOSTILE = '<script>document.title="broken"</script>'
MODEL = llama_like_profile(layers=6, embed=512, heads=8, head_dim=64, mlp=1536, vocab=5000, seq=512)
CLUSTER = parse_cluster("2x2")
VOID = {"meta", "br", "line", "rect", "path", "circle"}


def hostile_model() -> ModelProfile:
    """The model with markup in every name that a page shows."""
    kinds = tuple(
        msgspec.structs.replace(kind, name=f'"><img src=x onerror=1>{HOSTILE}{kind.name}') for kind in MODEL.kinds
    )
    runs = tuple(LayerRun(kind=kinds[i].name, count=run.count) for i, run in enumerate(MODEL.layers))
    return msgspec.structs.replace(MODEL, name=HOSTILE, structure=HOSTILE, kinds=kinds, layers=runs)


def pipeline(schedule: str, slices: int, microbatches: int, chunks: int = 1) -> Plan:
    """A plan of one layer a stage or so, with remat in some layers, for any schedule."""
    order = [run.kind for run in MODEL.layers for _ in range(run.count)]
    devices, stages = CLUSTER.devices // slices, slices * chunks
    ends = [round(len(order) * s / stages) for s in range(stages + 1)]
    remat = Strategy(dp=devices, remat="full")
    plan = Plan(
        model=model_reference(MODEL),
        cluster=CLUSTER,
        global_batch=4 * microbatches,
        microbatches=microbatches,
        schedule=schedule,  # type: ignore[arg-type]
        chunks=chunks,
        stages=tuple(
            Stage(
                devices=devices,
                runs=tuple(
                    PlanRun(kind=order[i], count=1, strategy=remat if i % 3 else Strategy(dp=devices))
                    for i in range(ends[s], ends[s + 1])
                ),
            )
            for s in range(stages)
        ),
    )
    return msgspec.structs.replace(plan, predicted=estimate_plan(plan, MODEL, toy_hardware()))


PLANS = [("1f1b", 1, 4, 1), ("1f1b", 2, 4, 1), ("gpipe", 2, 4, 1), ("1f1b", 4, 2, 1), ("interleaved-1f1b", 2, 4, 2)]


@pytest.mark.parametrize("shape", PLANS, ids=str)
def test_timeline_ends_with_the_step_and_never_does_two_things_at_once(shape: tuple[str, int, int, int]) -> None:
    plan = pipeline(*shape)
    assert plan.predicted is not None
    timeline = plan_timeline(plan, MODEL, toy_hardware())
    assert timeline.step_time_s == pytest.approx(plan.predicted.step_time_s, rel=1e-12)
    assert len(timeline.spans) == plan.slices
    for spans in timeline.spans:
        assert len(spans) == 2 * plan.microbatches * plan.chunks + 1
        for before, after in zip(spans, spans[1:], strict=False):
            assert after.start_s >= before.end_s * (1 - 1e-12)


@pytest.mark.parametrize("shape", PLANS, ids=str)
def test_highest_memory_of_the_picture_is_the_predicted_peak(shape: tuple[str, int, int, int]) -> None:
    plan = pipeline(*shape)
    assert plan.predicted is not None
    timeline = plan_timeline(plan, MODEL, toy_hardware())
    for s, levels in enumerate(timeline.levels):
        memory = plan.predicted.stages[s].memory
        highest = max(level.residual_bytes + level.live_bytes for level in levels)
        assert highest == pytest.approx(memory["residuals"] + memory["live"], rel=1e-6)
        assert min(level.residual_bytes for level in levels) >= 0


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all sections for a plan whose model has hostile names."""
    model = hostile_model()
    found = find_plan(model, CLUSTER, toy_hardware(), global_batches=(16,), max_stages=2)
    content = PageContent(
        subject=Subject(found.plan, model, toy_hardware()),
        baselines=found.baselines,
        frontier=memory_frontier(found.split, (16,), found.plan),
        note=HOSTILE,
    )
    return write_page(tmp_path_factory.mktemp("page") / "report.html", content)


class Balance(html.parser.HTMLParser):
    """Checks that elements close in order, and collects names and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_holds_no_script_and_no_address(page: Path) -> None:
    text = page.read_text()
    parsed = Balance()
    parsed.feed(text)
    assert parsed.open == []
    assert not parsed.seen & {"script", "img", "link", "iframe", "object"}
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http://" not in text
    assert "https://" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in parsed.attributes
    assert "&lt;script&gt;" in text  # the name is shown, as text
    assert not re.search(r'="[^"]*\b(nan|inf)\b', text)


def test_sections_are_there(page: Path) -> None:
    text = page.read_text()
    for title in ("Plan", "One step", "Memory", "Where the time goes", "Beside it", "Memory against speed"):
        assert f"<h2>{title}</h2>" in text
    assert "this plan" in text


@pytest.mark.parametrize("shape", PLANS, ids=str)
def test_page_of_every_schedule_is_drawn(shape: tuple[str, int, int, int]) -> None:
    plan = pipeline(*shape)
    text = render_page(PageContent(subject=Subject(plan, MODEL, toy_hardware())))
    assert text.count("<svg") == 2 + plan.slices
    assert text.count('class="block"') == sum(len(stage.runs) for stage in plan.stages)
    assert 'fill="url(#hatch)"' in text


def test_pictures_stand_alone(tmp_path: Path) -> None:
    content = PageContent(subject=Subject(pipeline("1f1b", 2, 4), MODEL, toy_hardware()))
    written = write_pictures(tmp_path / "pictures", content)
    assert [path.name for path in written] == ["map.svg", "timeline.svg", "memory1.svg", "memory2.svg"]
    for path in written:
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_png_pictures_are_drawn_or_say_what_is_missing(tmp_path: Path) -> None:
    content = PageContent(subject=Subject(pipeline("interleaved-1f1b", 2, 4, 2), MODEL, toy_hardware()))
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ToolchainError, match=r"matplotlib is not installed.*--svg"):
            write_png_pictures(tmp_path, content)
        return
    for path in write_png_pictures(tmp_path, content):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_attributes_and_text_are_escaped() -> None:
    assert tag("b", "<&>", title='"') == '<b title="&quot;">&lt;&amp;&gt;</b>'
    assert tag("p", tag("b", "x")) == "<p><b>x</b></p>"


@pytest.mark.parametrize("top", [0.0, 1e-6, 0.37, 1.0, 9.5, 73.6, 12345.0])
def test_ticks_are_round_and_within(top: float) -> None:
    values = ticks(top)
    assert values[0] == 0
    assert all(0 <= value <= top * (1 + 1e-9) for value in values)
    assert len(values) <= 12


# ----------------------------------------------------------------------------------------------------------- browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MEASURE = """<script>
const wide = [...document.querySelectorAll("body *")].filter(
  e => !e.closest(".chart, .scroll") && e.getBoundingClientRect().right > innerWidth + 1);
const charts = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height > 20);
const painted = [...document.querySelectorAll("svg rect")].filter(e => e.getBoundingClientRect().width > 2);
const style = getComputedStyle(document.body);
document.title = JSON.stringify({width: innerWidth, wide: wide.length, charts: charts.length,
  fills: [...new Set(painted.map(e => getComputedStyle(e).fill))], ink: style.color, ground: style.backgroundColor});
</script>"""
FIRST_STRATEGY, BACKWARD = "rgb(78, 121, 167)", "rgb(89, 161, 79)"


def browse(page: Path, *flags: str) -> str:
    """Open a page in a real browser; return what it prints."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [
        found,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={page.parent}/profile",
    ]
    done = subprocess.run([*command, *flags, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_browser_runs_nothing_that_a_name_says(page: Path) -> None:
    shown = browse(page, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", shown, flags=re.DOTALL)
    assert title is not None
    assert title[1].startswith("&lt;script&gt;")  # neither broken nor changed


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (500, "dark")])
def test_browser_lays_the_page_out_without_overflow_and_in_colour(page: Path, width: int, scheme: str) -> None:
    policy = re.compile(r"<meta http-equiv[^>]*>")
    measured = page.parent / f"measured{width}.html"
    measured.write_text(policy.sub("", page.read_text()).replace("</body>", MEASURE + "</body>"))
    preferred = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    shown = browse(measured, f"--window-size={width},900", preferred, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", shown, re.DOTALL)
    assert title is not None
    found = msgspec.json.decode(html.unescape(title[1]))
    assert (found["width"], found["wide"]) == (width, 0)
    assert found["charts"] >= 4
    assert {FIRST_STRATEGY, BACKWARD} <= set(found["fills"])
    ink, ground = brightness(found["ink"]), brightness(found["ground"])
    assert abs(ink - ground) > 180
    assert (ground < 60) == (scheme == "dark")


def brightness(colour: str) -> float:
    """The mean of ``rgb(r, g, b)``."""
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
