"""Clusters: the grammar NODESxGPUS, mesh axes, slices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax.cluster import MAX_DEVICES, Cluster, divisors, parse_cluster, prime_factors
from galvatron_jax.errors import ClusterError


@pytest.mark.parametrize(
    ("text", "nodes", "gpus"),
    [("2x8", 2, 8), ("2X8", 2, 8), (" 1x1 ", 1, 1), ("128x8", 128, 8), ("3x2", 3, 2), ("01x08", 1, 8)],
)
def test_parse_cluster_good_text_returns_cluster(text: str, nodes: int, gpus: int) -> None:
    cluster = parse_cluster(text, gpu="a100")
    assert cluster == Cluster(nodes=nodes, gpus_per_node=gpus, gpu="a100")
    assert cluster.mesh == f"{nodes}x{gpus}"
    assert cluster.devices == nodes * gpus


@pytest.mark.parametrize(
    "text",
    [
        "2x",
        "0x8",
        "8x0",
        "-1x8",
        "2x8x4",
        "２x8",
        "2×8",
        "1e9x8",
        "9999999x9999999",
        "1000001x1",
        "",
        "x",
        "2 x 8",
        "2x8\n3",
        "8",
    ],
)
def test_parse_cluster_bad_text_raises_one_line_with_example(text: str) -> None:
    with pytest.raises(ClusterError) as caught:
        parse_cluster(text)
    message = str(caught.value)
    assert message.startswith(f"--mesh: got {text!r}; expected NODESxGPUS")
    assert "for example 2x8" in message
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_parse_cluster_largest_is_accepted() -> None:
    assert parse_cluster(f"{MAX_DEVICES // 8}x8").devices == MAX_DEVICES


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ("2x8", [("n0", 2), ("g0", 2), ("g1", 2), ("g2", 2)]),
        ("6x4", [("n0", 3), ("n1", 2), ("g0", 2), ("g1", 2)]),
        ("1x6", [("g0", 3), ("g1", 2)]),
        ("1x1", []),
        ("5x7", [("n0", 5), ("g0", 7)]),
    ],
)
def test_axes_are_prime_factors_nodes_first(mesh: str, axes: list[tuple[str, int]]) -> None:
    assert [tuple(axis) for axis in parse_cluster(mesh).axes] == axes


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [("2x8", 16, (2, 8)), ("2x8", 8, (1, 8)), ("2x8", 2, (1, 2)), ("4x6", 12, (2, 6)), ("4x6", 3, (1, 3))],
)
def test_slice_shape_even_slice_returns_nodes_and_gpus(mesh: str, devices: int, shape: tuple[int, int]) -> None:
    assert parse_cluster(mesh).slice_shape(devices) == shape


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [("2x8", 3), ("2x8", 0), ("2x8", -8), ("2x8", 32), ("4x6", 4), ("3x2", 4), ("3x8", 12)],
)
def test_slice_shape_uneven_slice_raises(mesh: str, devices: int) -> None:
    with pytest.raises(ClusterError, match=f"stage of {devices} devices on a {mesh} cluster"):
        parse_cluster(mesh).slice_shape(devices)


@given(st.integers(1, 40), st.integers(1, 16))
def test_stage_axes_multiply_to_every_legal_stage(nodes: int, gpus: int) -> None:
    cluster = Cluster(nodes=nodes, gpus_per_node=gpus)
    for devices in divisors(cluster.devices):
        try:
            axes = cluster.stage_axes(devices)
        except ClusterError:
            assert devices % gpus, "whole nodes must always be legal"
            assert gpus % devices, "an even part of a node must always be legal"
        else:
            assert math.prod(axis.size for axis in axes) == devices


@given(st.integers(1, 100_000))
def test_prime_factors_multiply_and_descend(number: int) -> None:
    factors = prime_factors(number)
    assert math.prod(factors) == number
    assert list(factors) == sorted(factors, reverse=True)
    assert all(factor % d for factor in factors for d in range(2, math.isqrt(factor) + 1))


@given(st.integers(1, 5_000))
def test_divisors_equal_trial_division(number: int) -> None:
    assert list(divisors(number)) == [d for d in range(1, number + 1) if number % d == 0]
