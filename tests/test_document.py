"""Documents from strangers: whatever the file holds, the answer is a value or one clear error."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from galvatron_jax import _document
from galvatron_jax._document import MAX_DOCUMENT_BYTES, decode, encode, load, save
from galvatron_jax.errors import DocumentError, DocumentNotFoundError, GalvatronError
from galvatron_jax.hardware import load_hardware
from galvatron_jax.plan import Plan
from galvatron_jax.profile import HardwareProfile
from tests.support.plans import small_plan


def plan_with(**changes: Any) -> str:
    """The JSON of a valid plan with top-level fields replaced."""
    return json.dumps({**json.loads(encode(small_plan())), **changes})


def test_encode_then_decode_gives_equal_plan() -> None:
    plan = small_plan()
    assert decode(encode(plan), Plan, where="text") == plan
    assert encode(decode(encode(plan), Plan, where="text")) == encode(plan)


def test_save_then_load_gives_equal_document(tmp_path: Path) -> None:
    path = save(small_plan(), tmp_path / "new" / "folder" / "plan.json")
    assert load(path, Plan) == small_plan()
    assert path.read_text() == encode(small_plan())


def test_encode_ends_with_newline_and_keeps_lines_short() -> None:
    text = encode(small_plan())
    assert text.endswith("}\n")
    assert max(map(len, text.splitlines())) <= 120


def test_encode_shows_one_line_per_run_of_layers() -> None:
    runs = [line for line in encode(small_plan()).splitlines() if '"strategy"' in line]
    assert len(runs) == 4  # embed, two runs of layers, head: not one line per layer


@given(st.text(max_size=20), st.floats(min_value=0, allow_infinity=False, allow_nan=False, max_value=1e20))
def test_encode_then_decode_keeps_any_text_and_number(name: str, duration_s: float) -> None:
    hardware = msgspec.structs.replace(load_hardware("h100"), name=name, kernel_launch_s=duration_s)
    assert decode(encode(hardware), HardwareProfile, where="text") == hardware


def test_fingerprint_differs_only_when_the_document_does() -> None:
    plan = small_plan()
    assert plan.fingerprint == decode(encode(plan), Plan, where="text").fingerprint
    assert plan.fingerprint != msgspec.structs.replace(plan, global_batch=64).fingerprint


def test_fingerprint_of_a_whole_number_of_seconds_is_that_of_the_file() -> None:
    hardware = msgspec.structs.replace(load_hardware("h100"), kernel_launch_s=1)
    assert hardware.fingerprint == decode(encode(hardware), HardwareProfile, where="text").fingerprint


BAD_TEXTS = {
    "empty": ("", "truncated"),
    "truncated": (encode(small_plan())[:200], "truncated"),
    "not JSON": ("plan: yes", "malformed"),
    "binary": (b"\x80\x04\x95\x00\xff\xfe", "malformed"),
    "a pickle": (b"\x80\x04N.", "malformed"),
    "invalid UTF-8 in a string": (plan_with().replace("llama", "\ud800").encode("utf-8", "surrogatepass"), "utf"),
    "an array": ("[]", "array"),
    "no schema version": (plan_with().replace('"schema_version": 1, ', ""), "schema_version"),
    "a newer schema": (plan_with(schema_version=2), "schema_version 2"),
    "schema version 0": (plan_with(schema_version=0), "schema_version 0"),
    "schema version as text": (plan_with(schema_version="1"), "schema_version"),
    "an unknown field": (plan_with(run="rm -rf /"), "run"),
    "text for a number": (plan_with(global_batch="32"), "global_batch"),
    "a fraction for a count": (plan_with(global_batch=8.5), "global_batch"),
    "zero for a count": (plan_with(global_batch=0), "global_batch"),
    "a negative count": (plan_with(microbatches=-1), "microbatches"),
    "a huge integer": (plan_with(global_batch=10**400), "global_batch"),
    "a huge size": (plan_with(memory_budget_bytes=2**60), "memory_budget_bytes"),
    "an endless integer": (
        plan_with().replace('"global_batch": 32', '"global_batch": ' + "9" * 10_000),
        "global_batch",
    ),
    "a billion nodes": (plan_with(cluster={"nodes": 10**9, "gpus_per_node": 8}), "nodes"),
    "NaN": (plan_with(global_batch=float("nan")), "malformed"),
    "infinity": (plan_with(global_batch=float("inf")), "malformed"),
    "a number that overflows": (plan_with().replace('"global_batch": 32', '"global_batch": 1e999'), ""),
    "an unknown schedule": (plan_with(schedule="zigzag"), "schedule"),
    "a duplicate key": (plan_with().replace('"global_batch"', '"global_batch": 8, "global_batch"'), "'global_batch'"),
    "text after the end": (plan_with() + "{}", "trailing"),
}


@pytest.mark.parametrize(("text", "told"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_decode_bad_text_raises_one_clear_error(text: str | bytes, told: str) -> None:
    with pytest.raises(DocumentError) as caught:
        decode(text, Plan, where="plan.json")
    message = str(caught.value)
    assert message.startswith("plan.json: ")
    assert told.lower() in message.lower()
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("place", ["whole", "field"])
def test_decode_100_000_deep_raises_document_error(opening: str, closing: str, place: str) -> None:
    nest = opening * 100_000 + "1" + closing * 100_000
    text = nest if place == "whole" else plan_with(stages=0).replace('"stages": 0', f'"stages": {nest}')
    with pytest.raises(DocumentError):
        decode(text, Plan, where="plan.json")


def test_decode_names_the_json_path_of_a_deep_fault() -> None:
    with pytest.raises(DocumentError, match=r"stages\[0\]\.runs\[1\]\.strategy\.zero"):
        decode(encode(small_plan()).replace('"zero": 3', '"zero": 4'), Plan, where="plan.json")


def test_decode_a_million_keys_takes_seconds_at_most() -> None:
    many = ",".join(f'"{i:x}":""' for i in range(500_000))
    text = encode(load_hardware("cpu")).replace('"sources": {', '"sources": {' + many + ",")
    start = time.perf_counter()
    decode(text, HardwareProfile, where="text")
    assert time.perf_counter() - start < 20  # a quadratic check for duplicates would take hours


def test_load_100_mb_file_raises_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(100 * 10**6)  # sparse: no such memory or disk is used
    with pytest.raises(DocumentError, match=f"100000000 bytes; expected at most {MAX_DOCUMENT_BYTES}"):
        load(path, Plan)


def test_load_endless_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="at most"):
        load("/dev/zero", Plan)


def test_load_missing_file_raises_not_found(tmp_path: Path) -> None:
    with pytest.raises(DocumentNotFoundError, match=r"no\.json: cannot read the plan: No such file"):
        load(tmp_path / "no.json", Plan)


def test_load_folder_raises_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot read the plan"):
        load(tmp_path, Plan)


def test_save_over_an_old_file_replaces_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old " * 10_000)
    save(small_plan(), path)
    assert path.read_text() == encode(small_plan())
    assert path.stat().st_mode & 0o777 == 0o644


def test_save_interrupted_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        save(small_plan(), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_save_full_disk_raises_document_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DocumentError, match="cannot write the plan: No space left on device"):
        save(small_plan(), tmp_path / "plan.json")
    assert os.listdir(tmp_path) == []


def test_save_to_symbolic_link_refuses_and_leaves_the_target(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("data")
    link = tmp_path / "plan.json"
    link.symlink_to(target)
    with pytest.raises(DocumentError, match="symbolic link"):
        save(small_plan(), link)
    assert target.read_text() == "data"


def test_save_to_a_folder_that_cannot_be_made_raises_document_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    with pytest.raises(DocumentError, match=r"file/plan\.json: cannot write the plan"):
        save(small_plan(), tmp_path / "file" / "plan.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_save_to_a_read_only_folder_raises_document_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DocumentError, match="Permission denied"):
        save(small_plan(), tmp_path / "plan.json")


def test_save_number_that_json_has_not_raises_and_leaves_nothing(tmp_path: Path) -> None:
    hardware = msgspec.structs.replace(load_hardware("cpu"), kernel_launch_s=float("inf"))
    with pytest.raises(ValueError, match="JSON"):
        save(hardware, tmp_path / "hardware.json")
    assert os.listdir(tmp_path) == []


def test_every_document_error_is_ours_and_a_builtin() -> None:
    assert issubclass(DocumentError, (GalvatronError, ValueError))
    assert issubclass(DocumentError, ValueError)
    assert issubclass(DocumentNotFoundError, FileNotFoundError)


def test_package_holds_no_dangerous_call() -> None:
    """Plans and profiles are passed round a team: nothing in the package may execute what a file says."""
    words = ("import pickle", "pickle.", "eval(", "exec(", "yaml.load", "allow_pickle=True", "shell=True", "os.system")
    package = Path(_document.__file__).parent
    found = [
        f"{file.relative_to(package)}:{number}: {word}"
        for file in sorted(package.rglob("*.py"))
        for number, line in enumerate(file.read_text().splitlines(), 1)
        for word in words
        if word in line and f".{word}" not in line and f"def {word}" not in line  # `trained.eval(` is ours
    ]
    assert not found, found
