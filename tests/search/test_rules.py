from __future__ import annotations

from collections.abc import Callable

import pytest

from galvatron_jax.errors import GalvatronError
from galvatron_jax.plan import Strategy
from galvatron_jax.search._rules import Rule, forbid, parse_ranges, pin, ranges_text

FSDP = Strategy(dp=8, zero=3)
MEGATRON = Strategy(tp=4, sp=True, dp=2, remat="full")
ULYSSES = Strategy(ulysses=4, dp=2, zero=3, replicas=2)


@pytest.mark.parametrize(
    ("text", "met_by"),
    [
        ("tp=4", {MEGATRON}),
        ("tp=1|4", {FSDP, MEGATRON, ULYSSES}),
        ("tp!=1", {MEGATRON}),
        ("tp>1, sp", {MEGATRON}),
        ("tp <= 2", {FSDP, ULYSSES}),
        ("dp>=2,dp<8", {MEGATRON, ULYSSES}),
        ("ulysses", {ULYSSES}),
        ("hsdp", {ULYSSES}),
        ("hsdp=2", {ULYSSES}),
        ("replicas=1", {FSDP, MEGATRON}),
        ("zero", {FSDP, ULYSSES}),
        ("remat", {MEGATRON}),
        ("remat=none|dots", {FSDP, ULYSSES}),
        ("sp=no", {FSDP, ULYSSES}),
        ("all: zero=3", {FSDP, ULYSSES}),
    ],
)
def test_pin_keeps_and_prohibition_takes_what_meets_the_conditions(text: str, met_by: set[Strategy]) -> None:
    every = {FSDP, MEGATRON, ULYSSES}
    assert {s for s in every if pin(text).allows("block", s)} == met_by
    assert {s for s in every if forbid(text).allows("block", s)} == every - met_by


def test_rule_for_a_kind_leaves_other_kinds_alone() -> None:
    rule = pin("head: tp=4")
    assert rule.allows("block", FSDP)
    assert not rule.allows("head", FSDP)
    assert pin("layers.*: tp=4").kind == "layers.*"


def test_rule_for_numbers_holds_them_ascending() -> None:
    assert pin("layers 7, 0-3: tp=4").layers == (0, 1, 2, 3, 7)
    assert pin("layer 5: tp=4").layers == (5,)
    assert ranges_text(parse_ranges("0-2,5,3", "")) == "0-3,5"


@pytest.mark.parametrize("text", ["tp=8", "layers 0-3,7: tp<=2, sp!=no", "head: remat=none|dots"])
def test_rule_as_text_is_read_back_equal(text: str) -> None:
    assert pin(str(pin(text))) == pin(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a condition on one of tp"),
        ("tp=eight", "tp to be a whole number"),
        ("tp=", "a condition on one of"),
        ("pp=2", "a condition on one of"),
        ("remat=half", "one of none, dots, full"),
        ("sp=2", "one of no, yes"),
        ("remat<full", "remat= or remat!="),
        ("tp<1|2", "one number"),
        ("tp=1,,sp", "a condition on one of"),
        ("layers x: tp=8", "layer numbers such as 0-3,7"),
        ("layers 5-2: tp=8", "layer numbers such as 0-3,7"),
        ("layers: tp=8", "layer numbers such as 0-3,7"),
        (": tp=8", "a target before the colon"),
        ("tp=８", "a condition on one of"),
    ],
)
@pytest.mark.parametrize(("parse", "flag"), [(pin, "--pin"), (forbid, "--forbid")])
def test_bad_rule_is_refused_with_what_was_expected_and_an_example(
    parse: Callable[[str], Rule], flag: str, text: str, expected: str
) -> None:
    with pytest.raises(GalvatronError) as caught:
        parse(text)
    assert expected in caught.value.message
    assert caught.value.where == flag
    assert "for example" in caught.value.action
