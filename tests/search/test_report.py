from __future__ import annotations

import io
from pathlib import Path

import pytest

from galvatron_jax._text import Line, Piece, clean, labelled, plain, show, table, wrapped
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import ModelReference, Plan, PlanRun, Prediction, Stage, StagePrediction, Strategy
from galvatron_jax.search import describe_plan
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


@pytest.mark.parametrize("width", [50, 64, 80])
@pytest.mark.parametrize(
    ("line", "indent"),
    [
        (
            labelled(
                "model", Piece("llama2-7b", "bold"), " of some words that go on and on" * 5, Piece("  end", "dim")
            ),
            9,
        ),
        ((Piece("dp     512     -   113.3  does not fit: it needs a good deal more than there is"),), 26),
    ],
)
def test_long_line_is_broken_between_words_below_its_last_cell(line: Line, indent: int, width: int) -> None:
    parts = wrapped(line, width)
    texts = ["".join(piece.text for piece in part) for part in parts]
    assert all(len(text) <= width for text in texts)
    assert all(text.startswith(" " * indent) and text[indent] != " " for text in texts[1:])
    assert " ".join(text.strip() for text in texts).split() == plain([line]).split()
    assert {piece.style for part in parts for piece in part} >= {piece.style for piece in line if piece.text.strip()}


def test_short_line_and_long_word_stay_whole() -> None:
    short: Line = (Piece("a b", "bold"),)
    word: Line = (Piece("x" * 200),)
    assert wrapped(short, 80) == [short]
    assert wrapped(word, 80) == [word]


def test_columns_appear_when_a_run_uses_them() -> None:
    from msgspec.structs import replace

    plan = hand_made_plan()
    first = replace(
        plan.stages[0], runs=(replace(plan.stages[0].runs[0], strategy=Strategy(ulysses=2, dp=4, zero=3, replicas=2)),)
    )
    text = describe_plan(replace(plan, stages=(first, plan.stages[1]), predicted=None))
    for column in ("ulysses", "hsdp", "2 x 4"):
        assert column in text
        assert column not in describe_plan(plan)
