"""What a run tells: lines, JSON lines that survive a kill, goodput that adds up."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import msgspec
import pytest
import rich.console

from galvatron_jax.plan import Plan, Prediction, StagePrediction
from galvatron_jax.train._goodput import Goodput, describe
from galvatron_jax.train._report import HEADINGS, Line, Reporter, StepRecord, live_table
from galvatron_jax.train._trackers import JsonLines, read_metrics
from tests.support.plans import small_plan


def record(step: int, *, time_s: float = 0.5, compiled: bool = False, loss: float = 2.0) -> StepRecord:
    return StepRecord(
        step=step,
        batch=step - 1,
        loss=loss,
        gradient_norm=1.5,
        learning_rate=1e-3,
        finite=True,
        step_time_s=time_s,
        data_wait_s=0.01,
        compiled=compiled,
    )


def predicted_plan() -> Plan:
    stage = StagePrediction(forward_s=0.1, backward_s=0.1, step_end_s=0.0, peak_bytes=3 * 2**30, memory={})
    prediction = Prediction(step_time_s=0.4, tokens_per_s=1.0, mfu=0.5, times={}, stages=(stage,))
    return msgspec.structs.replace(small_plan(), predicted=prediction)


class Memory:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, object]] = []

    def track(self, step: int, metrics: object) -> None:
        assert isinstance(metrics, dict)
        self.metrics.append({"step": step, **metrics})

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_line_holds_every_figure_measured_beside_predicted() -> None:
    out, memory = io.StringIO(), Memory()
    reporter = Reporter(predicted_plan(), steps=100, every=10, devices=4, trackers=[memory], out=out)
    for step in range(1, 21):
        reporter.record(record(step, compiled=step == 1, time_s=30.0 if step == 1 else 0.5), peak_bytes=2**31)
    head, first, *lines = out.getvalue().splitlines()
    for heading in HEADINGS:
        assert heading in head
    assert first.split()[0] == "1/100"  # the step that compiled has no speed
    line = lines[-1]
    for text in (
        "20/100",
        "2.0000",
        "1.5",
        "1.00e-03",
        "4.1 k",
        "1.02 k",
        "40.0%",
        "2.0 GiB (3.0 GiB)",
        "500.0 ms (400.0 ms)",
    ):
        assert text in line
    assert line.endswith("0:00:40")  # 80 steps of half a second
    assert len(memory.metrics) == 20
    assert memory.metrics[4]["tokens_per_s"] == 32 * 64 / 0.5
    assert memory.metrics[4]["mfu"] == pytest.approx(0.4)


@pytest.mark.parametrize(("columns", "shown"), [(80, 7), (100, 8), (122, 10), (200, 10)])
def test_live_table_never_wraps(columns: int, shown: int) -> None:
    widest = Line(
        step=99_999,
        steps=100_000,
        loss=10.0,
        gradient_norm=0.000123,
        learning_rate=1e-5,
        tokens_per_s=123.4e6,
        devices=2,
        mfu=0.543,
        peak_bytes=77 * 2**30,
        predicted_peak_bytes=78 * 2**30,
        step_time_s=0.1234,
        predicted_step_time_s=0.1234,
        left_s=86_399,
    ).cells()
    console = rich.console.Console(width=columns, file=io.StringIO(), color_system=None)
    lines = ["".join(piece.text for piece in line) for line in console.render_lines(live_table([widest], columns))]
    assert len(lines) == 2
    assert "…" not in "".join(lines)
    found = [heading for heading in HEADINGS if widest[heading] in lines[1]]
    assert len(found) == shown


def test_plan_without_prediction_shows_what_is_known() -> None:
    out = io.StringIO()
    reporter = Reporter(small_plan(), steps=5, every=1, devices=4, trackers=[], out=out)
    reporter.record(record(1), peak_bytes=None)
    assert "500.0 ms" in out.getvalue()


def test_metrics_survive_a_kill_and_a_half_written_line(tmp_path: Path) -> None:
    first = JsonLines(tmp_path / "metrics.jsonl")
    first.track(1, {"loss": float("nan"), "mfu": None})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:  # killed in the middle of a line
        file.write('{"step": 2, "lo')
    second = JsonLines(tmp_path / "metrics.jsonl")
    second.track(2, {"loss": 1.5})
    second.close()
    assert list(read_metrics(tmp_path)) == [{"step": 1, "loss": "nan", "mfu": None}, {"step": 2, "loss": 1.5}]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=lambda _: pytest.fail("NaN is no JSON")) is not None


def test_goodput_adds_up() -> None:
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    with goodput.measure("setup"):
        wait(10)
    goodput.add("steps", 60)
    wait(62)
    with goodput.measure("checkpoint"):
        wait(8)
    goodput.lost_s = 20
    found = goodput.summary()
    assert found["wall"] == 80
    assert found["other"] == pytest.approx(2)
    assert sum(found[name] for name in ("setup", "steps", "data", "checkpoint", "evaluation", "other")) == 80
    assert found["goodput"] == pytest.approx(0.6)
    text = describe(found)
    assert text.startswith("goodput 60% (setup ")
    assert sum(int(share) for share in re.findall(r"(\d+)%", text)) == pytest.approx(100, abs=3)
