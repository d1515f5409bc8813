from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from galvatron_jax.errors import DocumentError
from galvatron_jax.profilers._log import partial_path, resume_readings, save_readings

from .fakes import MACHINE, reading

READINGS = (reading(1e-5, "all-gather", size=1024, group=8), reading(2e-6, "loop"))


def test_partial_file_stands_beside_the_output() -> None:
    assert partial_path(Path("configs/hardware.json")) == Path("configs/hardware.partial.json")


def test_readings_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.partial.json"
    save_readings(path, MACHINE, READINGS, quick=False)
    assert resume_readings(path, MACHINE, quick=False) == READINGS


def test_no_partial_file_means_no_readings(tmp_path: Path) -> None:
    assert resume_readings(tmp_path / "none.json", MACHINE, quick=False) == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\x00\xff" * 100,
        lambda data: data.replace(b"1e-05", b"-1e-05"),
        lambda data: data.replace(b"1e-05", b"NaN"),
        lambda data: data.replace(b'"spread"', b'"sprawl"'),
        lambda data: data.replace(b'"schema_version": 1', b'"schema_version": 99'),
    ],
    ids=["half", "empty", "binary", "negative", "nan", "unknown field", "newer"],
)
def test_corrupt_partial_file_is_refused_with_a_way_out(damage: object, tmp_path: Path) -> None:
    path = tmp_path / "x.partial.json"
    save_readings(path, MACHINE, READINGS, quick=False)
    damaged = damage(path.read_bytes())  # type: ignore[operator]
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(DocumentError, match="without --resume") as caught:
        resume_readings(path, MACHINE, quick=False)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("field", "value"), [("device_kind", "NVIDIA A100"), ("mesh", "2x4"), ("jax_version", "0.9"), ("driver", "1.0")]
)
def test_partial_file_of_another_machine_is_refused(field: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "x.partial.json"
    save_readings(path, MACHINE, READINGS, quick=False)
    with pytest.raises(DocumentError, match=field):
        resume_readings(path, msgspec.structs.replace(MACHINE, **{field: value}), quick=False)


def test_partial_file_of_a_quick_run_is_refused_by_a_full_one(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.json"
    save_readings(path, MACHINE, READINGS, quick=True)
    with pytest.raises(DocumentError, match="quick True"):
        resume_readings(path, MACHINE, quick=False)
