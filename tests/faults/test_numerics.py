"""Cases 20 and 21: a loss that is not finite never reaches the state; spikes are reported with their batch."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from galvatron_jax.errors import NonFiniteError
from galvatron_jax.train import PolicyConfig
from galvatron_jax.train._judge import Judge, Verdict
from galvatron_jax.train._trackers import read_metrics
from galvatron_jax.train.data import Loader, split_windows
from galvatron_jax.train.data._windows import StreamWindows
from tests.faults.conftest import STEPS, Run, Runs
from tests.faults.poison import MARK

pytestmark = pytest.mark.multidevice

BAD_BATCH = 6
SEQ, BATCH = 32, 16


def poisoned_run(
    runs: Runs, tmp_path: Path, policy: str, /, bad: tuple[int, ...] = (BAD_BATCH,), **changes: dict[str, Any]
) -> Run:
    """A run whose batches ``bad`` hold a marked token each; ``changes`` as in ``settings``."""
    tokens = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8).astype("<u2")
    train, _ = split_windows(StreamWindows(tokens, SEQ, "text"), 0.05)
    # Positions in the order of training, from a loader that reads the number of each token.
    numbers = StreamWindows(np.arange(len(tokens)), SEQ, "numbers")
    order = Loader(split_windows(numbers, 0.05)[0], global_batch=BATCH, rows=range(BATCH))
    for number in range(max(bad) + 1):
        batch = next(order)
        if number in bad:
            tokens[batch["inputs"][3, 5]] = MARK
    tokens.tofile(tmp_path / "tokens.bin")
    assert len(train) > STEPS * BATCH
    return runs.new(
        data={"kind": "tokens", "paths": [str(tmp_path / "tokens.bin")]},
        **{
            "model": {"loss": "tests.faults.poison:poisoned_loss"},
            **changes,
            "policy": {"non_finite": policy, **changes.get("policy", {})},
        },
    )


def test_stop_ends_with_5_and_names_the_batch_and_the_last_checkpoint(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned_run(runs, tmp_path, "stop")
    assert run.here() == 5
    message = capsys.readouterr().err
    assert f"step {BAD_BATCH + 1}: loss nan, gradient norm nan; its update was left out" in message
    assert f"batch {BAD_BATCH}: {tmp_path / 'tokens.bin'} tokens" in message
    assert "the last checkpoint is step 4" in message
    last = [record for record in read_metrics(run.folder) if "loss" in record][-1]
    assert (last["step"], last["batch"], last["loss"], last["finite"]) == (BAD_BATCH + 1, BAD_BATCH, "nan", False)


def test_skip_leaves_the_update_out_and_goes_on(runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = poisoned_run(runs, tmp_path, "skip")
    assert run.here() == 0
    assert f"step {BAD_BATCH + 1}: loss nan" in caplog.text
    assert [step for step, loss in run.losses.items() if str(loss) == "nan"] == [BAD_BATCH + 1]
    document = json.loads((run.folder / "checkpoints" / f"step_{STEPS:08d}" / "galvatron.json").read_text())
    assert document["progress"]["skipped_steps"] == 1
    assert document["progress"]["next_batch"] == STEPS
    assert run.losses[STEPS] < run.losses[BAD_BATCH]


def test_skip_has_a_cap(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = poisoned_run(runs, tmp_path, "skip", bad=(5, 6, 8), policy={"max_skipped": 2})
    assert run.here() == 5
    assert "step 9: loss nan" in capsys.readouterr().err


def test_rollback_goes_back_to_the_checkpoint_and_on_behind_the_bad_batch(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned_run(runs, tmp_path, "rollback")
    assert run.here() == 0
    assert f"rolled back to step 4; batch {BAD_BATCH} is left out" in capsys.readouterr().out
    batches = {step: batch for step, (batch, *_) in run.trace.items()}
    assert batches == {**{s: s - 1 for s in range(1, 5)}, **{s: s + 2 for s in range(5, STEPS + 1)}}
    assert all(np.isfinite(loss) for loss in run.losses.values())


def test_spike_is_undone_and_its_batch_left_out_when_asked(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = {"loss": "tests.faults.poison:spiking_loss"}
    run = poisoned_run(runs, tmp_path, "stop", bad=(9,), model=model, policy={"spike": "rollback"})
    assert run.here() == 0
    assert "loss spike at step 10" in caplog.text
    assert "rolled back to step 8; batch 9 is left out" in capsys.readouterr().out
    batches = {step: batch for step, (batch, *_) in run.trace.items()}
    assert batches == {**{s: s - 1 for s in range(1, 9)}, **{s: s + 1 for s in range(9, STEPS + 1)}}
    assert max(run.losses.values()) < 10


# --------------------------------------------------------------------------------------------------------------- judge
def judge(**changes: float) -> Judge:
    return Judge(PolicyConfig(**changes), lambda batch: f"batch {batch}")  # type: ignore[arg-type]


def feed(judge: Judge, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        assert judge.judge(step, step, loss, 1.0, finite=True, resume="") is Verdict.GO_ON


def test_spike_is_reported_with_its_batch_and_slow_drift_is_not(caplog: pytest.LogCaptureFixture) -> None:
    noise = np.random.default_rng(0).normal(size=200)
    quiet = judge()
    with caplog.at_level(logging.WARNING):
        feed(quiet, [5 - 0.01 * i + 0.05 * noise[i] for i in range(200)])
        assert not caplog.text
        feed(quiet, [9.0])
    assert "loss spike at step 1: 9 is" in caplog.text
    assert "batch 1" in caplog.text


def test_spikes_are_only_reported_after_so_many_rollbacks() -> None:
    strict = judge(spike="rollback", max_skipped=1)  # type: ignore[arg-type]
    feed(strict, [1.0 + 0.01 * (i % 3) for i in range(20)])
    verdicts = [strict.judge(21, 21, 50.0, 1.0, finite=True, resume="") for _ in range(2)]
    assert verdicts == [Verdict.ROLL_BACK, Verdict.GO_ON]
    assert strict.losses[-1] == 50.0


def test_window_of_losses_survives_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    first, second = judge(), judge()
    feed(first, [1.0 + 0.01 * (i % 3) for i in range(20)])
    second.recall(first.losses, skipped=first.skipped, rollbacks=first.rollbacks)
    feed(second, [1.5])
    assert "loss spike" in caplog.text


def test_stop_raises_at_the_first_and_skip_after_the_cap() -> None:
    with pytest.raises(NonFiniteError) as error:
        judge().judge(3, 2, float("inf"), 1.0, finite=False, resume="resume here")
    assert error.value.exit_code == 5
    lenient = judge(non_finite="skip", max_skipped=2)  # type: ignore[arg-type]
    for step in (1, 2):
        assert lenient.judge(step, step, float("nan"), 1.0, finite=False, resume="") is Verdict.GO_ON
    with pytest.raises(NonFiniteError, match="3 so far"):
        lenient.judge(3, 3, float("nan"), 1.0, finite=False, resume="")
