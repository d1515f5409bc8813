"""Data: the same global batches for any number of processes, a place that is one number, and damage that is counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from galvatron_jax.errors import DataError
from galvatron_jax.train._config import DataConfig
from galvatron_jax.train.data import Loader, SkippedRecords, open_windows, split_windows
from galvatron_jax.train.data._records import CheckedWindows
from galvatron_jax.train.data._windows import CorruptRecordError, StreamWindows, SyntheticWindows, Tokens, join_windows

SEQ = 8


def stream(count: int = 1000, source: str = "stream") -> StreamWindows:
    return StreamWindows(np.arange(count, dtype=np.uint16), SEQ, source)


def take(loader: Loader, count: int) -> list[np.ndarray[Any, Any]]:
    return [next(loader)["inputs"] for _ in range(count)]


def loader(rows: range = range(8), **changes: Any) -> Loader:
    return Loader(stream(), global_batch=8, rows=rows, **changes)


# ------------------------------------------------------------------------------------------------------------- windows
def test_stream_windows_predict_every_token_once() -> None:
    windows = stream(100)
    inputs = np.concatenate([windows[i][:-1] for i in range(len(windows))])
    targets = np.concatenate([windows[i][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(inputs, np.arange(len(inputs)))
    np.testing.assert_array_equal(targets, np.arange(len(targets)) + 1)
    assert len(windows) * SEQ + 1 <= 100 < (len(windows) + 1) * SEQ + 1


def test_joined_windows_are_those_of_all_shards_in_order() -> None:
    shards = [stream(50, "a"), stream(9, "b"), stream(5, "too short"), stream(80, "c")]
    joined = join_windows(shards, where="test")
    expected = [(s.name(i), s[i]) for s in shards for i in range(len(s))]
    assert [joined.name(i) for i in range(len(joined))] == [name for name, _ in expected]
    for index, (_, tokens) in enumerate(expected):
        np.testing.assert_array_equal(joined[index], tokens)


@pytest.mark.parametrize("held_out", [0.05, 0.2, 0.49])
def test_split_holds_out_the_share_and_loses_nothing(held_out: float) -> None:
    whole = stream()
    train, judge = split_windows(whole, held_out)
    assert judge is not None
    names = [train.name(i) for i in range(len(train))] + [judge.name(i) for i in range(len(judge))]
    assert sorted(names) == sorted(whole.name(i) for i in range(len(whole)))
    assert len(judge) == pytest.approx(len(whole) / round(1 / held_out), abs=1)


@pytest.mark.parametrize(
    "other",
    [
        stream(1001),
        StreamWindows(np.arange(1000, dtype=np.uint16), SEQ + 1, "stream"),
        StreamWindows(np.arange(1, 1001, dtype=np.uint16), SEQ, "stream"),
        split_windows(stream(), 0.1)[0],
        join_windows([stream(), stream()], where="test"),
        SyntheticWindows(124, SEQ, 10, seed=0),
    ],
)
def test_fingerprint_tells_other_data(other: Any) -> None:
    assert other.fingerprint != stream().fingerprint
    assert stream().fingerprint == StreamWindows(np.arange(1000, dtype=np.uint32), SEQ, "elsewhere").fingerprint


# -------------------------------------------------------------------------------------------------------------- loader
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_all_processes_together_are_the_global_batch(processes: int) -> None:
    whole = take(loader(), 40)  # beyond the end of the first round (15 batches)
    share = 8 // processes
    parts = [take(loader(range(p * share, (p + 1) * share)), 40) for p in range(processes)]
    for number, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[number] for part in parts]), batch)


def test_round_sees_every_window_once_and_the_next_one_in_another_order() -> None:
    batches = take(loader(rows=range(8)), 31)
    first_tokens = np.concatenate(batches)[:, 0].tolist()
    assert sorted(first_tokens[:124]) == [8 * i for i in range(124)]
    assert sorted(first_tokens[124:248]) == [8 * i for i in range(124)]
    assert first_tokens[:124] != first_tokens[124:248]


@pytest.mark.parametrize("position", [0, 1, 13, 40])
def test_loader_put_to_a_position_goes_on_as_if_it_had_read_up_to_there(position: int) -> None:
    reference = take(loader(), position + 5)
    later = loader()
    take(later, 3)
    later.seek(position)
    assert later.position == position
    np.testing.assert_array_equal(take(later, 5), reference[position:])
    assert later.position == position + 5


@pytest.mark.parametrize("garbage", [-1, 16, "5", None, True, 2.0, {"next_index": 3}])
def test_loader_refuses_a_position_that_is_none(garbage: object) -> None:
    with pytest.raises(DataError, match="batch number, 0 to 15"):
        loader(epochs=1).seek(garbage)


def test_loader_ends_after_its_epochs_without_the_remainder() -> None:
    assert len(list(loader(epochs=1))) == 124 // 8
    assert len(list(loader(epochs=2))) == 248 // 8


def test_loader_with_less_than_one_batch_says_so() -> None:
    with pytest.raises(DataError, match="got 124 windows; expected at least one batch of 125"):
        Loader(stream(), global_batch=125, rows=range(125))


def test_describe_names_the_windows_of_a_batch() -> None:
    names = loader().describe(2)
    first = take(loader(), 3)[2][0, 0]
    assert names.startswith(f"batch 2: stream tokens {first}-{first + SEQ}; ")
    assert names.endswith(" and 4 more")


# --------------------------------------------------------------------------------------------------------------- files
WRITERS: dict[str, Callable[[Path, np.ndarray[Any, Any]], None]] = {
    ".bin": lambda path, tokens: tokens.astype("<u2").tofile(path),
    ".npy": lambda path, tokens: np.save(path, tokens.astype(np.int64)),
}


def write_records(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def open_files(*paths: Path, seq: int = SEQ, **changes: Any) -> Any:
    config = DataConfig(kind="tokens", paths=tuple(map(str, paths)), **changes)
    return open_windows(config, seq=seq, vocab=None)[0]


@pytest.mark.parametrize("suffix", WRITERS)
def test_token_files_hold_what_was_written(tmp_path: Path, suffix: str) -> None:
    for name, start in (("a", 0), ("b", 500)):
        WRITERS[suffix](tmp_path / f"{name}{suffix}", np.arange(start, start + 100))
    windows = open_files(tmp_path)
    np.testing.assert_array_equal(windows[0], np.arange(9))
    np.testing.assert_array_equal(windows[12], np.arange(500, 509))
    assert len(windows) == 24
    assert windows.name(13) == f"{tmp_path / f'b{suffix}'} tokens 8-16"


def test_array_records_are_windows_and_a_record_of_another_size_is_corrupt(tmp_path: Path) -> None:
    good = [np.arange(i, i + 9, dtype="<u2").tobytes() for i in range(5)]
    write_records(tmp_path / "x.arrayrecord", [*good, b"short"])
    windows = open_files(tmp_path / "x.arrayrecord")
    np.testing.assert_array_equal(windows[3], np.arange(3, 12))
    with pytest.raises(CorruptRecordError, match="5 bytes, expected 18"):
        windows[5]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.bin", b"\0" * 7, "got 7 bytes; expected whole tokens of 2 bytes"),
        ("x.bin", b"", "holds no window"),
        ("x.npy", b"nonsense", "cannot be read"),
        ("x.npy", b"\x80\x04K\x05.", "cannot be read"),  # a pickle
        ("x.arrayrecord", b"nonsense", "cannot be opened|holds no window"),
        ("x.txt", b"text", "is no token file"),
    ],
)
def test_token_files_that_are_none_are_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        open_files(tmp_path / name)


def test_npy_of_floats_or_two_dimensions_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "floats.npy", np.zeros(100))
    np.save(tmp_path / "matrix.npy", np.zeros((10, 10), np.int32))
    for name, problem in (("floats", "float64"), ("matrix", r"shape \(10, 10\)")):
        with pytest.raises(DataError, match=problem):
            open_files(tmp_path / f"{name}.npy")


def test_missing_shard_in_the_middle_is_named(tmp_path: Path) -> None:
    for shard in (0, 1, 3):
        WRITERS[".bin"](tmp_path / f"c4-{shard:05d}-of-00004.bin", np.arange(100))
    with pytest.raises(DataError, match=r"c4: 1 of 4 shards are missing, the first is number 2"):
        open_files(tmp_path)


def test_text_is_packed_with_a_separator_after_each_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.jsonl").write_text('{"text": "zwei ü"}\n{"text": "drei"}\n')
    windows, skipped = open_windows(DataConfig(paths=(str(tmp_path),)), seq=4, vocab=256)
    tokens = np.concatenate([windows[0], *(windows[i][1:] for i in range(1, len(windows)))])
    assert bytes(tokens.tolist()) == b"first\0zwei \xc3\xbc\0drei\0"[: len(tokens)]
    assert not skipped.names


def test_text_of_this_machine_is_enough_to_train_on() -> None:
    windows, _ = open_windows(DataConfig(max_bytes=2**20, max_skipped_share=0.01), seq=128, vocab=256)
    assert len(windows) > 5000


# -------------------------------------------------------------------------------------------------------------- damage
class Damaged:
    """A stream some of whose windows cannot be read."""

    def __init__(self, bad: set[int], count: int = 1000) -> None:
        self.whole, self.bad = stream(count * SEQ + 1, "damaged"), bad
        self.fingerprint = self.whole.fingerprint

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int, /) -> Tokens:
        if index in self.bad:
            raise CorruptRecordError("bad checksum")
        return self.whole[index]

    def name(self, index: int) -> str:
        return f"record {index}"


def test_damaged_record_is_replaced_by_the_next_whole_one_and_named() -> None:
    damaged = Damaged({4, 5}, count=4000)
    skipped = SkippedRecords(total=len(damaged))
    checked = CheckedWindows(damaged, None, skipped)
    np.testing.assert_array_equal(checked[4], damaged.whole[6])
    np.testing.assert_array_equal(checked[4], damaged.whole[6])
    assert skipped.names == {"record 4": "bad checksum", "record 5": "bad checksum"}


def test_too_many_damaged_records_stop_the_run_and_name_the_last() -> None:
    checked = CheckedWindows(Damaged({10, 20, 30}), None, SkippedRecords(total=1000))
    checked[10]
    with pytest.raises(DataError, match="2 of 1000 records are damaged, the last one record 20: bad checksum"):
        checked[20]


@pytest.mark.parametrize(("vocab", "problem"), [(8, "got token id 8; expected 0 to 7"), (9, None), (None, None)])
def test_token_outside_the_vocabulary_is_never_skipped(vocab: int | None, problem: str | None) -> None:
    checked = CheckedWindows(stream(), vocab, SkippedRecords(total=100))
    if problem is None:
        assert checked[0].max() == 8
        return
    with pytest.raises(DataError, match=problem) as error:
        checked[0]
    assert error.value.exit_code == 2
    assert "stream tokens 0-8" in error.value.message


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "an empty document"), (b"na\xefve", "not UTF-8 at byte 2"), (b"a\0b", "a zero byte")]
)
def test_damaged_documents_are_counted_and_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.txt").write_bytes(content)
    windows, skipped = open_windows(DataConfig(paths=(str(tmp_path),)), seq=SEQ, vocab=256)
    assert len(windows) > 50
    ((name, why),) = skipped.names.items()
    assert name == str(tmp_path / "b.txt")
    assert reason in why
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(DataError, match="2 of 3 records are damaged"):
        open_windows(DataConfig(paths=(str(tmp_path),)), seq=SEQ, vocab=256)
