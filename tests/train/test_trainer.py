"""AutoTrainer in Python: the user's own model, loss, optimizer and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galvatron_jax
from galvatron_jax._document import load
from galvatron_jax.models import Llama, LlamaConfig, next_token_loss
from galvatron_jax.record import RunRecord
from galvatron_jax.train import CheckpointConfig, DataConfig, LogConfig, RunConfig, RunSettings
from galvatron_jax.train._ranks import OneRank
from galvatron_jax.train._trainer import _speaker
from galvatron_jax.train.data._windows import SyntheticWindows

pytestmark = pytest.mark.multidevice

SEQ, BATCH, STEPS = 16, 8, 10
CONFIG = LlamaConfig(vocab=64, embed=32, mlp=64, layers=2, heads=4, kv_heads=2, seq=SEQ, dtype="float32")


def test_trainer_runs_a_users_model_and_leaves_everything_in_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RunConfig(
        data=DataConfig(seq=SEQ, global_batch=BATCH, held_out=0.1),
        run=RunSettings(folder=str(tmp_path), steps=STEPS, eval_every=4, profile="7:8"),
        checkpoint=CheckpointConfig(every=5),
        log=LogConfig(every=5),
    )
    trainer = galvatron_jax.AutoTrainer(
        lambda: Llama(CONFIG, rngs=nnx.Rngs(0)),
        config=config,
        loss=next_token_loss,
        optimizer=optax.adam(1e-2),
        data=SyntheticWindows(400, SEQ, CONFIG.vocab, seed=3),
        vocab=CONFIG.vocab,
    )
    outcome = trainer.run()
    assert (outcome.status, outcome.step, outcome.exit_code) == ("done", STEPS, 0)
    assert outcome.held_out_loss == pytest.approx(np.log(CONFIG.vocab), rel=0.2)  # random tokens cannot be learnt
    assert 0 < outcome.goodput["goodput"] < 1
    assert trainer.sharded is not None
    assert type(trainer.sharded.model) is Llama
    out = capsys.readouterr().out
    assert "step 4: held-out loss" in out
    assert len([line for line in out.splitlines() if line.strip().startswith(("5/10", "10/10"))]) == 2

    record = load(tmp_path / "run.json", RunRecord)
    assert len(record.step_times_s) == STEPS - 1
    assert record.plan == galvatron_jax.load_plan(tmp_path / "plan.json")
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, STEPS + 1))
    assert [m["step"] for m in metrics if "held_out_loss" in m] == [4, 8, 10]
    assert list((tmp_path / "profile-rank0").rglob("*.xplane.pb"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000005", "step_00000010"]


def test_names_in_a_plan_do_not_reach_the_terminal_as_commands(capsys: pytest.CaptureFixture[str]) -> None:
    _speaker(OneRank())("checkpoint made under \x1b]0;owned\x07[\x1b[31mred\u202e]")
    assert capsys.readouterr().out == "checkpoint made under ]0;owned[[31mred]\n"


def test_finished_run_started_again_trains_nothing(tmp_path: Path) -> None:
    config = RunConfig(
        data=DataConfig(seq=SEQ, global_batch=BATCH, kind="synthetic", windows=100),
        run=RunSettings(folder=str(tmp_path), steps=2),
    )

    def trainer() -> galvatron_jax.AutoTrainer:
        return galvatron_jax.AutoTrainer(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)), config=config, vocab=CONFIG.vocab)

    first, second = trainer().run(), trainer().run()
    assert (first.step, second.step) == (2, 2)
    assert second.loss is None
    assert second.held_out_loss == first.held_out_loss


def test_samples_of_any_kind_train_the_users_own_model(tmp_path: Path) -> None:
    """A regression: samples are pairs of arrays, the loss is the user's, nothing is a token."""
    rng = np.random.default_rng(0)
    inputs, weights = rng.normal(size=(256, 16)).astype(np.float32), rng.normal(size=(16, 4)).astype(np.float32)
    samples = [(x, x @ weights) for x in inputs]

    def loss(model: Any, batch: Any) -> Any:
        return jnp.mean(jnp.square(model(batch[0]) - batch[1]))

    config = RunConfig(
        data=DataConfig(global_batch=32, held_out=0.2), run=RunSettings(folder=str(tmp_path), steps=60, eval_batches=1)
    )
    trainer = galvatron_jax.AutoTrainer(
        lambda: nnx.Linear(16, 4, rngs=nnx.Rngs(0)), config=config, loss=loss, optimizer=optax.adam(3e-2), data=samples
    )
    outcome = trainer.run()
    assert outcome.held_out_loss is not None
    assert outcome.held_out_loss < 0.5 * float(np.mean(np.square(inputs @ weights)))
