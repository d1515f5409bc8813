"""The optional libraries themselves, where they are installed: TensorBoard, Weights & Biases, Hugging Face, NVML.

CI installs none of them, so these tests are skipped there, by name. To run them:
``pip install 'galvatron-jax[hf,tensorboard,wandb]' nvidia-ml-py && pytest tests/train/test_extras.py``.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from galvatron_jax.train import LogConfig
from galvatron_jax.train._config import DataConfig
from galvatron_jax.train._stragglers import NVML_NAMES
from galvatron_jax.train._trackers import open_trackers
from galvatron_jax.train.data import open_windows

METRICS: dict[str, float | int | str | None] = {"loss": 2.5, "finite": True, "note": "text", "gradient_norm": math.nan}
TEXTS = ["the first text", "", "the second text, of more words than the first"]


def test_tensorboard_reads_the_numbers_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    for step in (1, 2):  # the run was stopped, and went on
        for tracker in open_trackers(LogConfig(tensorboard=True), tmp_path):
            tracker.track(step, METRICS | {"loss": 2.5 / step})
            tracker.flush()
            tracker.close()
    found: dict[tuple[int, str], float] = {}
    for file in (tmp_path / "tensorboard").glob("events*"):
        content, start = file.read_bytes(), 0
        while start < len(content):  # a record: its length, a checksum, the event, a checksum
            (length,) = struct.unpack("<Q", content[start : start + 8])
            event = Event.FromString(content[start + 12 : start + 12 + length])
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
            start += 16 + length
    assert {key: value for key, value in found.items() if key[1] == "loss"} == {(1, "loss"): 2.5, (2, "loss"): 1.25}
    assert {tag for _, tag in found} == {"loss", "gradient_norm"}


def test_wandb_takes_the_numbers_and_a_resumed_run_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = []
    for folder in (tmp_path / "run", tmp_path / "run", tmp_path / "elsewhere" / "run"):
        folder.mkdir(parents=True, exist_ok=True)
        lines, tracker = open_trackers(LogConfig(wandb="project"), folder)
        run = tracker._run  # type: ignore[attr-defined]
        names.append(run.id)
        tracker.track(1, METRICS)
        assert run.summary["loss"] == 2.5
        assert "note" not in dict(run.summary)
        tracker.close()
        lines.close()
        assert list(folder.glob(f"wandb/offline-run-*/run-{run.id}.wandb"))
    assert names[0] == names[1] != names[2]


def test_hugging_face_dataset_and_tokenizer_become_one_stream(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, tokenizers.trainers.WordLevelTrainer(special_tokens=["?", "</s>"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts" / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = DataConfig(
        kind="huggingface",
        paths=(str(tmp_path / "texts"),),
        tokenizer=str(tmp_path / "tokenizer.json"),
        max_skipped_share=0.5,
    )
    windows, skipped = open_windows(config, seq=4, vocab=tokenizer.get_vocab_size())
    end = tokenizer.token_to_id("</s>")
    expected = [token for text in TEXTS if text for token in (*tokenizer.encode(text).ids, end)]
    np.testing.assert_array_equal(windows[0], expected[:5])
    np.testing.assert_array_equal(windows[2], expected[8:13])
    assert list(skipped.names.values()) == ["an empty document"]


def test_nvml_has_all_that_is_asked_of_it() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in NVML_NAMES if not hasattr(pynvml, name)] == []
