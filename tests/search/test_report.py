from __future__ import annotations

import io
from pathlib import Path

import pytest

from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import ModelReference, Plan, PlanRun, Prediction, Stage, StagePrediction, Strategy
from galvatron_jax.search import describe_plan
from galvatron_jax.search._text import Piece, clean, labelled, plain, show, table
from galvatron_jax.units import GIB

GOLDENS = Path(__file__).parent / "goldens"


def hand_made_plan() -> Plan:
    """Two stages with round figures."""
    memory = {"parameters": 2 * GIB, "gradients": 2 * GIB, "optimizer": GIB, "residuals": 30 * GIB, "live": 3 * GIB}
    memory["boundary"] = GIB // 4
    peak = sum(memory.values())
    stage = StagePrediction(forward_s=0.1, backward_s=0.2, step_end_s=0.05, peak_bytes=peak, memory=memory)
    wide = Strategy(tp=2, sp=True, dp=4, zero=3, remat="full")
    return Plan(
        model=ModelReference(
            name="toy", structure="x", dtype="bfloat16", seq=1024, layer_count=7, parameter_count=10**9
        ),
        cluster=Cluster(nodes=2, gpus_per_node=8),
        memory_budget_bytes=70 * GIB,
        global_batch=64,
        microbatches=8,
        stages=(
            Stage(devices=8, runs=(
                PlanRun(kind="embed", count=1, strategy=Strategy(dp=8)),
                PlanRun(kind="layers.*", count=2, strategy=wide),
            )),
            Stage(devices=8, runs=(
                PlanRun(kind="layers.*", count=3, strategy=Strategy(dp=8, zero=1)),
                PlanRun(kind="head", count=1, strategy=Strategy(tp=8)),
            )),
        ),
        predicted=Prediction(
            step_time_s=2.5,
            tokens_per_s=26_214.4,
            mfu=0.4567,
            times={"compute": 2.0, "bubble": 0.375, "optimizer": 0.125, "relayout": 0.0},
            stages=(stage, stage),
        ),
    )  # fmt: skip


def test_describe_plan_equals_the_golden_text() -> None:
    assert describe_plan(hand_made_plan()) == (GOLDENS / "describe_plan.txt").read_text(encoding="utf-8")


def test_describe_plan_without_prediction_says_only_what_runs_where() -> None:
    import msgspec

    text = describe_plan(msgspec.structs.replace(hand_made_plan(), predicted=None))
    assert "predicted" not in text
    assert "layers.*" in text


def test_table_aligns_numbers_right_and_names_left() -> None:
    text = plain(table(["name", "n", ""], [["a", "10", "x y"], ["long name", "5", ""]], indent=0))
    assert text == "name        n\na          10  x y\nlong name   5\n"


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\u202eb", "a\x00b", "a\u2028b"])
def test_clean_removes_what_moves_the_cursor(name: str) -> None:
    assert clean(name) in ("a[31mb", "ab")


def test_show_in_a_terminal_styles_pieces_and_reads_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    styled = Terminal()
    show([labelled("model", Piece("[red]x[/red]", "bold"))], styled)
    assert "\x1b[1m[red]x[/red]" in styled.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    unstyled = Terminal()
    show([labelled("model", Piece("[red]x[/red]", "bold"))], unstyled)
    assert unstyled.getvalue() == "model    [red]x[/red]\n"
