from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cost._overlap import exposed_seconds, overlapped_seconds

seconds = st.floats(0, 1e3)
slowdowns = st.floats(1, 4)


@pytest.mark.parametrize(
    ("compute", "communication", "slowdown", "total"),
    [
        (10.0, 4.0, 1.0, 10.0),  # hidden for free
        (10.0, 5.0, 1.25, 11.0),  # 5 s beside it did 4 s of the work
        (10.0, 20.0, 1.25, 20.0),  # communication is the longer one
        (0.0, 3.0, 1.25, 3.0),  # nothing to hide behind
        (3.0, 0.0, 1.25, 3.0),
    ],
)
def test_overlapped_worked_out_by_hand(compute: float, communication: float, slowdown: float, total: float) -> None:
    assert overlapped_seconds(compute, communication, slowdown) == pytest.approx(total)
    assert exposed_seconds(compute, communication, slowdown) == pytest.approx(total - compute)


@given(compute=seconds, communication=seconds, slowdown=slowdowns)
def test_overlapped_lies_between_the_longer_and_the_sum(compute: float, communication: float, slowdown: float) -> None:
    total = overlapped_seconds(compute, communication, slowdown)
    assert max(compute, communication) - 1e-9 <= total <= compute + communication + 1e-9


@given(compute=seconds, communication=seconds, slowdown=slowdowns, more=st.floats(0, 10))
def test_overlapped_never_falls_while_anything_rises(
    compute: float, communication: float, slowdown: float, more: float
) -> None:
    total = overlapped_seconds(compute, communication, slowdown)
    assert overlapped_seconds(compute + more, communication, slowdown) >= total - 1e-9
    assert overlapped_seconds(compute, communication + more, slowdown) >= total - 1e-9
    assert overlapped_seconds(compute, communication, slowdown + more) >= total - 1e-9
