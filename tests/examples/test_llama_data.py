"""The text of the Llama example: bounded, deterministic, nothing held out is trained on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from examples.llama import data
from galvatron_jax.errors import GalvatronError


def windows(count: int, seq: int = 4) -> np.ndarray:
    """``count`` windows of which each holds its own number only."""
    return np.repeat(np.arange(count, dtype=np.uint8)[:, None], seq + 1, axis=1)


def test_corpus_of_a_file_is_split_without_loss_or_overlap(tmp_path: Path) -> None:
    text = bytes(range(1, 101))
    (tmp_path / "text").write_bytes(text)
    corpus = data.load_corpus(tmp_path / "text", seq=4, batch=3, seed=0)
    assert corpus.held_out_NT.shape == (3, 5)
    assert corpus.train_NT.shape == (17, 5)
    both = np.concatenate([corpus.train_NT, corpus.held_out_NT])
    assert sorted(map(bytes, both)) == [text[i : i + 5] for i in range(0, 100, 5)]


def test_corpus_of_the_same_seed_is_the_same_and_of_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(1, 201)))
    first, again, other = (data.load_corpus(tmp_path / "text", seq=4, batch=3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train_NT, again.train_NT)
    assert not np.array_equal(first.train_NT, other.train_NT)


def test_corpus_of_default_text_exists_on_any_machine() -> None:
    corpus = data.load_corpus(None, seq=128, batch=32, seed=0)
    assert corpus.files > 100
    assert 1_000_000 < corpus.train_NT.size + corpus.held_out_NT.size <= data.MAX_TEXT_BYTES
    assert len(corpus.held_out_NT) / len(corpus.train_NT) == pytest.approx(0.05 / 0.95, rel=0.01)


def test_corpus_too_small_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"short")
    with pytest.raises(GalvatronError, match=r"got 5 bytes.*at least 30.*--global-batch"):
        data.load_corpus(tmp_path / "text", seq=4, batch=3, seed=0)


def test_corpus_of_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(GalvatronError, match=r"nowhere: does not exist"):
        data.load_corpus(tmp_path / "nowhere", seq=4, batch=3, seed=0)


def test_text_files_of_a_folder_come_in_order_without_links(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    names = [file.relative_to(tmp_path).as_posix() for file in data.text_files([tmp_path])]
    assert names == ["a.txt", "b.txt", "deep/c.txt"]


def test_read_text_leaves_out_binaries_and_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_TEXT_BYTES", 10)
    contents = {"1": b"abcdef", "2": b"\x00binary", "3": b"", "4": b"ghijklmno", "5": b"never"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    text, used = data.read_text(sorted(tmp_path.iterdir()))
    assert text.tobytes() == b"abcdefghij"
    assert used == 2


def test_training_batches_show_every_window_once_per_round() -> None:
    batches = list(islice(data.training_batches(windows(12), batch=4, seed=0), 6))
    first, second = (np.concatenate([b["inputs"][:, 0] for b in batches[i : i + 3]]) for i in (0, 3))
    assert sorted(first) == sorted(second) == list(range(12))
    assert not np.array_equal(first, second)


def test_training_batches_are_int32_and_shifted_by_one() -> None:
    batch = next(data.training_batches(np.arange(10, dtype=np.uint8).reshape(2, 5), batch=2, seed=0))
    assert batch["inputs"].shape == batch["targets"].shape == (2, 4)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)


def test_training_batches_of_the_same_seed_are_the_same() -> None:
    first, again = (list(islice(data.training_batches(windows(12), batch=5, seed=3), 5)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (2, 2), (9, 2)])
def test_held_out_batches_are_whole_and_bounded(most: int, expected: int) -> None:
    assert len(list(data.held_out_batches(windows(11), batch=4, most=most))) == expected
