from __future__ import annotations

import pytest

from galvatron_jax.schedule import in_flight_units
from galvatron_jax.search._slices import fullest_moments
from galvatron_jax.search._space import Shape


@pytest.mark.parametrize("slices", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 9])
def test_fullest_moments_repeat_after_a_few_groups(slices: int, chunks: int, groups: int) -> None:
    shape = Shape(slices, "interleaved-1f1b", chunks)
    for s in range(slices):
        every = in_flight_units("interleaved-1f1b", s, slices, groups * slices, chunks)
        assert set(fullest_moments(shape, groups * slices, s)) == every


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
@pytest.mark.parametrize("microbatches", [1, 3, 9])
def test_fullest_moment_of_one_chunk(name: str, microbatches: int) -> None:
    shape = Shape(4, name, 1)  # type: ignore[arg-type]  # both are schedules
    for s in range(4):
        assert set(fullest_moments(shape, microbatches, s)) == in_flight_units(name, s, 4, microbatches)
