"""The example: what you would write to train your own model, with ``auto_shard`` in the middle."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import jax
import optax
from flax import nnx

from galvatron_jax import auto_shard
from galvatron_jax.models import Llama, next_token_loss

from .data import held_out_batches, load_corpus, training_batches
from .options import Options
from .report import StepLog, describe_plan, describe_start

HELD_OUT_BATCHES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of the training."""

    first_loss: float
    last_loss: float
    held_out_loss: float
    step_time_s: float
    """Median measured time of a step, compilation left out; NaN when there was one step only."""


def shard(options: Options) -> Any:
    """Return the model, ready to train on all devices: nothing is computed before the first step."""
    warmup, peak = max(1, options.steps // 10), options.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(peak / warmup, peak, warmup, max(options.steps, warmup + 1))
    # Decay rates as Llama 2 (Touvron et al. 2023, arXiv:2307.09288, section 2.2).
    optimizer = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1)
    config = options.config
    if jax.default_backend() == "cpu":
        # CPUs emulate bfloat16, many times slower than float32. The plan is the same for both.
        config = replace(config, dtype="float32")
    return auto_shard(
        lambda: Llama(config, rngs=nnx.Rngs(options.seed)),
        loss=next_token_loss,
        optimizer=optimizer,
        plan=options.plan,
    )


def train(options: Options) -> Outcome:
    """Train, and tell on stdout what happens.

    Raises:
        GalvatronError: the text, the plan or the devices do not fit together.
    """
    corpus = load_corpus(options.text, seq=options.seq, batch=options.global_batch, seed=options.seed)
    print(describe_start(options, corpus, _describe_devices()), flush=True)
    trained = shard(options)
    batches = training_batches(corpus.train_NT, batch=options.global_batch, seed=options.seed)

    start = time.perf_counter()
    first_loss = float(trained.step(next(batches)).loss)
    print(f"ready      after {time.perf_counter() - start:.0f} s; the first step is done\n")
    print(describe_plan(trained.plan) + "\n")

    log = StepLog(trained.plan, tokens_per_step=options.global_batch * options.seq)
    log.record(1, first_loss)
    loss = first_loss
    for step, batch in enumerate(islice(batches, options.steps - 1), start=2):
        result = trained.step(batch)
        if step % options.log_every == 0 or step == options.steps:
            # Reading the loss waits for the device; in between, steps follow each other without waiting.
            loss = float(result.loss)
            log.record(step, loss)

    held_out = held_out_batches(corpus.held_out_NT, batch=options.global_batch, most=HELD_OUT_BATCHES)
    losses = [float(trained.eval(batch)) for batch in held_out]
    held_out_loss = sum(losses) / len(losses)
    print(f"\nheld out   loss {held_out_loss:.4f} on {len(losses) * options.global_batch} windows never trained on")
    print(log.summary())
    return Outcome(
        first_loss=first_loss, last_loss=loss, held_out_loss=held_out_loss, step_time_s=log.median_step_time_s
    )


def _describe_devices() -> str:
    devices = jax.devices()
    kind = (
        "virtual CPU devices of this machine, computing in float32"
        if devices[0].platform == "cpu"
        else devices[0].device_kind
    )
    return f"{len(devices)} x {kind}"
