"""Checkpoints: whole or not there, whatever is damaged or killed; and the same numbers under any sharding."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from galvatron_jax.errors import CheckpointError, ConfigError, DocumentError
from galvatron_jax.runtime import TrainState
from galvatron_jax.train._config import CheckpointConfig
from galvatron_jax.train._ranks import OneRank
from galvatron_jax.train.checkpoint import CheckpointReader, CheckpointStore, Progress
from galvatron_jax.train.checkpoint._folder import list_steps, surplus
from tests.support.plans import small_plan

pytestmark = pytest.mark.multidevice


def sharding(*spec: str | None, shape: tuple[int, int] = (8, 1)) -> NamedSharding:
    devices = np.array(jax.devices()[: shape[0] * shape[1]], dtype=object).reshape(shape)
    mesh = Mesh(devices, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*spec))


def state_at(step: int, place: NamedSharding | None = None) -> TrainState:
    """A state whose every number depends on ``step``."""
    place = place or sharding("a")
    kernel = jax.random.normal(jax.random.key(step), (16, 64))
    parameters = {"kernel": jax.device_put(kernel, place), "half": jax.device_put(kernel.astype(jnp.bfloat16), place)}
    whole = NamedSharding(place.mesh, PartitionSpec())
    return TrainState(
        parameters=parameters,
        optimizer=(jax.tree.map(lambda x: x * 2, parameters), jax.device_put(jnp.int32(step), whole)),
        model_state={"rng": jax.device_put(jax.random.key(step + 1), whole)},
        step=jax.device_put(jnp.int32(step), whole),
    )


def abstract(state: TrainState) -> TrainState:
    result: TrainState = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return result


def numbers(state: TrainState) -> list[np.ndarray[Any, Any]]:
    leaves = jax.tree.leaves(state)
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]


def assert_same(found: TrainState, expected: TrainState) -> None:
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def progress(step: int) -> Progress:
    return Progress(step=step, next_batch=step + 2, data="d", config="c", losses=(1.5, 0.1))


def open_store(folder: Path, hook: Callable[[str, int], None] = lambda *_: None, **changes: Any) -> CheckpointStore:
    return CheckpointStore(folder, CheckpointConfig(**changes), OneRank(), hook=hook)


def write(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(state_at(step), progress(step), small_plan())
        event = store.finish()
        assert event is not None
        assert event.error is None


# --------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("target", [sharding(), sharding("b", "a", shape=(2, 4)), sharding("a", shape=(1, 1))])
def test_state_restored_under_another_sharding_is_the_same(tmp_path: Path, target: NamedSharding) -> None:
    store = open_store(tmp_path)
    write(store, 7)
    restored = open_store(tmp_path).restore(abstract(state_at(0, target)))
    assert restored is not None
    assert restored.checkpoint.progress == progress(7)
    assert restored.checkpoint.plan == small_plan()
    assert_same(restored.state, state_at(7))
    assert restored.state.parameters["kernel"].sharding == target


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
    store, state = open_store(tmp_path), state_at(1)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    expected = state_at(1)
    store.save(state, progress(1), small_plan())
    overwrite((state.parameters, state.optimizer))
    store.finish()
    restored = store.restore(abstract(expected))
    assert restored is not None
    assert_same(restored.state, expected)


def test_folder_without_checkpoints_restores_nothing(tmp_path: Path) -> None:
    assert open_store(tmp_path / "new").restore(abstract(state_at(0))) is None


def test_poll_tells_once_that_a_save_has_ended(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.poll() is None
    store.save(state_at(1), progress(1), small_plan())
    events = [store.finish(), store.poll()]
    assert [event.step if event else None for event in events] == [1, None]


# ---------------------------------------------------------------------------------------------------------- retention
@pytest.mark.parametrize(
    ("keep", "keep_every", "gone"), [(3, None, [10, 20, 30]), (1, 20, [10, 30, 50]), (9, None, []), (1, 1, [])]
)
def test_surplus_is_all_but_the_newest_and_the_landmarks(keep: int, keep_every: int | None, gone: list[int]) -> None:
    assert surplus([10, 20, 30, 40, 50, 60], keep=keep, keep_every=keep_every) == gone


def test_old_checkpoints_go_only_after_a_newer_one_is_whole(tmp_path: Path) -> None:
    store = open_store(tmp_path, keep=2)
    write(store, 1, 2, 3, 4)
    assert store.steps == [3, 4]
    failing = open_store(tmp_path, keep=1, hook=fail_at("mid_save"))
    failing.save(state_at(5), progress(5), small_plan())
    event = failing.finish()
    assert event is not None
    assert isinstance(event.error, OSError)
    assert failing.steps == [3, 4]


def fail_at(point: str) -> Callable[[str, int], None]:
    def hook(name: str, _: int) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return hook


# ------------------------------------------------------------------------------------------------------------- damage
def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(folder: Path) -> None:
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(folder: Path, old: str, new: str) -> None:
    document = folder / "galvatron.json"
    assert old in document.read_text()
    document.write_text(document.read_text().replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit flipped": (flip_bit, "has another checksum"),
    "file truncated": (lambda f: os.truncate(largest(f), 10), "has 10 bytes, not"),
    "file missing": (lambda f: largest(f).unlink(), "is missing"),
    "folder missing": (lambda f: shutil.rmtree(f / "d"), "is missing"),
    "our document no JSON": (lambda f: (f / "galvatron.json").write_text("{"), "galvatron.json"),
    "our document empty": (lambda f: (f / "galvatron.json").write_text(""), "galvatron.json"),
    "our document edited": (lambda f: edit(f, '"next_batch": 4', '"next_batch": 5'), "galvatron.json: has another"),
    "orbax metadata no JSON": (lambda f: (f / "_METADATA").write_text("{"), "_METADATA: has 1 bytes"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_restored(
    tmp_path: Path, damage: Callable[[Path], Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(open_store(tmp_path), 1, 2)
    damage(tmp_path / "step_00000002")
    restored = open_store(tmp_path).restore(abstract(state_at(0)))
    assert restored is not None
    assert_same(restored.state, state_at(1))
    assert reason in caplog.text
    assert (tmp_path / "step_00000002.corrupt").is_dir()
    assert list_steps(tmp_path) == [1]


def test_whole_checkpoint_that_orbax_cannot_read_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(open_store(tmp_path), 1)
    store = open_store(tmp_path)

    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("a fault of the reader")

    monkeypatch.setattr(store._orbax, "restore", fails)
    with pytest.raises(CheckpointError, match="a fault of the reader"):
        store.restore(abstract(state_at(0)))
    assert list_steps(tmp_path) == [1]


def test_the_one_file_without_a_checksum_is_not_needed(tmp_path: Path) -> None:
    write(open_store(tmp_path), 1)
    (tmp_path / "step_00000001" / "_CHECKPOINT_METADATA").write_text("{")
    restored = open_store(tmp_path).restore(abstract(state_at(0)))
    assert restored is not None
    assert_same(restored.state, state_at(1))


def test_arrays_that_orbax_cannot_read_are_damage_too(tmp_path: Path) -> None:
    write(open_store(tmp_path), 1, 2)
    (tmp_path / "step_00000002" / "_METADATA").write_text("{")  # arrays themselves are still in TensorStore's cache
    restored = open_store(tmp_path, verify=False).restore(abstract(state_at(0)))
    assert restored is not None
    assert_same(restored.state, state_at(1))


def test_when_all_are_damaged_nothing_is_restored_and_nothing_deleted(tmp_path: Path) -> None:
    write(open_store(tmp_path), 1, 2)
    for step in (1, 2):
        flip_bit(tmp_path / f"step_0000000{step}")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged") as error:
        open_store(tmp_path).restore(abstract(state_at(0)))
    assert error.value.exit_code == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.corrupt", "step_00000002.corrupt"]


def test_damage_of_the_same_step_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        write(open_store(tmp_path), 1)
        flip_bit(tmp_path / "step_00000001")
        with pytest.raises(CheckpointError):
            open_store(tmp_path).restore(abstract(state_at(0)))
    assert (tmp_path / "step_00000001.corrupt.2").is_dir()


def test_without_verification_a_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    """Why checksums are on by default: Orbax alone restores wrong numbers, or none, without a word."""
    write(open_store(tmp_path), 1)
    flip_bit(tmp_path / "step_00000001")
    store = open_store(tmp_path, verify=False)
    assert store._checked(1) is not None


def test_checkpoint_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    write(open_store(tmp_path), 1)
    edit(tmp_path / "step_00000001", '"schema_version": 1', '"schema_version": 9')
    with pytest.raises(DocumentError, match="update galvatron_jax"):
        open_store(tmp_path).restore(abstract(state_at(0)))
    assert list_steps(tmp_path) == [1]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "d/../../outside"])
def test_path_that_leaves_the_checkpoint_is_never_opened(tmp_path: Path, name: str) -> None:
    from galvatron_jax.train.checkpoint._files import check_files, sum_files

    (tmp_path / "outside").write_text("secret")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "x").write_text("x")
    sums = sum_files(tmp_path / "inside")
    assert check_files(tmp_path / "inside", {name: sums["x"]}, [name]) == [
        f"{name}: leaves the folder of the checkpoint"
    ]


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_link_in_a_checkpoint_is_never_followed(tmp_path: Path, linked: str) -> None:
    from galvatron_jax.train.checkpoint._files import check_files, sum_files

    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_text("secret")
    (tmp_path / "inside").mkdir()
    if linked == "folder":
        (tmp_path / "inside" / "d").symlink_to(tmp_path / "outside")
    else:
        (tmp_path / "inside" / "d").mkdir()
        (tmp_path / "inside" / "d" / "x").symlink_to(tmp_path / "outside" / "x")
    sums = sum_files(tmp_path / "outside")
    assert check_files(tmp_path / "inside", {"d/x": sums["x"]}, ["d/x"]) == ["d/x: is a link"]


# -------------------------------------------------------------------------------------------------------- other models
def test_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path: Path) -> None:
    write(open_store(tmp_path), 1)
    other = state_at(0)
    parameters = {"kernel": other.parameters["kernel"].astype(jnp.bfloat16), "bias": jnp.zeros(3)}
    with pytest.raises(ConfigError) as error:
        open_store(tmp_path).restore(abstract(other._replace(parameters=parameters)))
    assert error.value.exit_code == 2
    assert "parameters/bias: missing in the checkpoint" in error.value.message
    assert "parameters/half: not in this model" in error.value.message
    assert "parameters/kernel: float32[16,64] in the checkpoint, bfloat16[16,64] in this model" in error.value.message
    assert list_steps(tmp_path) == [1]


# --------------------------------------------------------------------------------------------------------------- kills
def test_leftovers_of_killed_processes_are_removed_and_set_aside_ones_kept(tmp_path: Path) -> None:
    write(open_store(tmp_path), 1)
    (tmp_path / "step_00000002.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / "step_00000003.deleted").mkdir()
    (tmp_path / "step_00000004").mkdir()  # renamed by a version of Orbax that knows nothing of our document
    (tmp_path / "step_00000005.corrupt").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    open_store(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step_00000001", "step_00000005.corrupt"]


def test_failed_save_leaves_no_files_and_the_next_one_succeeds(tmp_path: Path) -> None:
    failures = iter([True, False])

    def hook(name: str, _: int) -> None:
        if name == "mid_save" and next(failures):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_store(tmp_path, hook=hook)
    store.save(state_at(1), progress(1), small_plan())
    event = store.finish()
    assert event is not None
    assert "No space left" in str(event.error)
    assert list(tmp_path.iterdir()) == []
    write(store, 2)
    assert store.steps == [2]


def test_folder_that_cannot_be_made_is_an_error_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        open_store(tmp_path / "file" / "checkpoints")


def test_seal_fits_when_a_whole_number_stands_for_a_float(tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path)) as store:
        store.save(state_at(1), Progress(step=1, next_batch=2, data="d", config="c", losses=(2,)), small_plan())
        store.finish()
    assert CheckpointReader(tmp_path).checkpoint.is_intact


def test_reader_gives_parameters_one_by_one_and_refuses_damage(tmp_path: Path) -> None:
    with contextlib.closing(open_store(tmp_path)) as store:
        write(store, 1, 2)
    saved = CheckpointReader(tmp_path, 1).parameters
    assert sorted(saved) == ["half", "kernel"]
    np.testing.assert_array_equal(saved["kernel"][2:4, :], np.asarray(state_at(1).parameters["kernel"])[2:4, :])
    assert CheckpointReader(tmp_path).step == 2
    victim = max((tmp_path / "step_00000002").rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    with pytest.raises(CheckpointError, match="damaged"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        CheckpointReader(tmp_path, 7)
