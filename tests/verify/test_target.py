from __future__ import annotations

import re

import pytest

from galvatron_jax.errors import UnsupportedError
from galvatron_jax.hardware import hardware_names, load_hardware
from galvatron_jax.verify import target_names
from galvatron_jax.verify._target import load_target


def test_targets_are_the_bundled_gpus() -> None:
    assert {*target_names()} == {*hardware_names()} - {"cpu"}


@pytest.mark.parametrize("name", target_names())
def test_target_has_the_memory_and_bandwidth_of_the_hardware_profile(name: str) -> None:
    """CUDA reports a little less memory than the driver; profiles hold the bandwidth that copies reach."""
    text, hardware = load_target(name), load_hardware(name)
    fields = {key: int(value) for key, value in re.findall(r"^  (\w+): (\d+)$", text, re.MULTILINE)}
    assert 0.98 * hardware.memory_bytes < fields["device_memory_size"] < 1.01 * hardware.memory_bytes
    assert 0.85 < hardware.memory_bandwidth_bytes_per_s / fields["memory_bandwidth"] < 1
    assert "openxla/xla" in text.splitlines()[1]  # the source of the facts


def test_cpu_is_no_target_and_the_error_lists_the_targets() -> None:
    with pytest.raises(UnsupportedError, match=r"no compiler target for 'cpu'.*a100-40g, .*h200"):
        load_target("cpu")
