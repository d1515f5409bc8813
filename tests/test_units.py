"""Units: text to bytes and back; GiB is 2^30, GB is 10^9."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.errors import GalvatronError
from galvatron_jax.units import GIB, ITEM_BYTES, format_count, format_gib, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("72GiB", 72 * 2**30),
        ("80 GB", 80 * 10**9),
        ("80gb", 80 * 10**9),
        ("1.5G", 3 * 2**29),
        ("8589934592", 2**33),
        (" 512 MiB ", 2**29),
        ("1TiB", 2**40),
        ("100b", 100),
    ],
)
def test_parse_bytes_good_text_returns_bytes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "0", "0.0001b", "1e9", "72 GiBs", "７２GiB", "nan", "inf", "9" * 30, "1,5GiB"]
)
def test_parse_bytes_bad_text_raises_clear_error(text: str) -> None:
    with pytest.raises(GalvatronError, match="expected a positive size such as 72GiB or 80GB") as caught:
        parse_bytes(text, where="--memory")
    assert str(caught.value).startswith(f"--memory: got {text!r}")


@pytest.mark.parametrize(("size", "text"), [(68.3 * GIB, "68.3 GiB"), (0.03 * GIB, "30.7 MiB"), (0, "0.0 GiB")])
def test_format_gib_shows_small_sizes_in_mib(size: float, text: str) -> None:
    assert format_gib(size) == text


@given(st.integers(1, 2**20))
def test_parse_bytes_inverts_format_gib_to_a_tenth(tenths: int) -> None:
    size_bytes = tenths * GIB / 10
    assert abs(parse_bytes(format_gib(size_bytes)) - size_bytes) <= 1


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(1.623, "1.62 s"), (1.0, "1.00 s"), (0.0381, "38.1 ms"), (1e-3, "1.0 ms"), (12e-6, "12 µs"), (0.0, "0 µs")],
)
def test_format_seconds_picks_the_unit(duration_s: float, text: str) -> None:
    assert format_seconds(duration_s) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(6_738_415_616, "6.74 B"), (1_290_000, "1.29 M"), (80_100, "80.1 k"), (999, "999"), (0, "0"), (-2e12, "-2 T")],
)
def test_format_count_has_three_digits(number: float, text: str) -> None:
    assert format_count(number) == text


def test_item_bytes_agree_with_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")  # comes with jax
    numpy = pytest.importorskip("numpy")
    for name, size_bytes in ITEM_BYTES.items():
        assert numpy.dtype(getattr(ml_dtypes, name, name)).itemsize == size_bytes, name
