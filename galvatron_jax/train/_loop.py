"""The loop: batch, step, look at the step before; evaluate, save; stop when asked.

One step is always in flight: the host reads the loss of step k while the devices work on step k + 1. Whatever the run
decides (save, stop, roll back) is decided from numbers and flags that are the same on every process, at the same step.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import socket
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax

from .._sharded_model import ShardedModel, StepResult
from ..errors import CheckpointError
from ._agreement import Agreement, Flag
from ._compiles import CompileWatch
from ._config import RunConfig
from ._faults import FaultPlan
from ._goodput import Goodput
from ._judge import Judge, Verdict
from ._memory import peak_bytes
from ._profile_window import ProfileWindow
from ._ranks import Ranks
from ._report import Reporter, StepRecord
from ._signals import StopRequest
from ._stragglers import StragglerWatch
from ._watchdog import Watchdog
from .checkpoint import CheckpointStore, Progress, SaveEvent
from .data import Loader
from .data._loader import Batch

_log = logging.getLogger(__name__)

Status = Literal["done", "data ended", "preempted", "interrupted"]
EXIT_CODES: dict[Status, int] = {"done": 0, "data ended": 0, "preempted": 75, "interrupted": 130}

USUAL_STEPS = 20
"""A step may take so many times the usual one before it counts as standing still."""
LONGEST_BACK_OFF = 64
"""Steps (or seconds, at the end) before a failed save is tried again."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    status: Status
    step: int
    loss: float | None
    """Of the last step; None when there was none."""
    held_out_loss: float | None
    goodput: dict[str, float]

    @property
    def exit_code(self) -> int:
        """0 done, 75 preempted and saved, 130 interrupted and saved."""
        return EXIT_CODES[self.status]


@dataclasses.dataclass(slots=True)
class InFlight:
    """A step that the devices may still be working on."""

    step: int
    batch: int
    result: StepResult
    flags: Any
    data_wait_s: float
    own_s: float
    """This process's time before the step was sent off."""
    compiled: bool


@dataclasses.dataclass
class Loop:
    """One attempt at a run, from a state that is in place."""

    config: RunConfig
    ranks: Ranks
    sharded: ShardedModel
    loader: Loader
    held_out: Sequence[Batch]
    store: CheckpointStore
    reporter: Reporter
    judge: Judge
    watchdog: Watchdog
    request: StopRequest
    faults: FaultPlan
    goodput: Goodput
    compiles: CompileWatch
    profile: ProfileWindow
    learning_rate: optax.Schedule | None
    config_fingerprint: str
    data_fingerprint: str
    step: int
    """Steps sent off so far."""

    def __post_init__(self) -> None:
        """Begin with nothing in flight."""
        self._agreement = Agreement()
        self._in_flight: collections.deque[InFlight] = collections.deque()
        self._agreed: frozenset[Flag] = frozenset()
        self._save_failed = False
        self._failures = 0
        self._retry_at: int | None = None
        self._rate_at: Any = jax.jit(self.learning_rate) if self.learning_rate else None
        self._saved_step = self.step if self.store.steps else -1
        self._loss: float | None = None
        self._held_out_loss: float | None = None
        self._last_end_s = time.perf_counter()
        self._known: set[str] = set()
        self._patient = True
        self._stragglers = StragglerWatch(self.ranks, socket.gethostname(), self.config.policy.straggler_share)

    def run(self) -> Outcome:
        """Train until the last step, the end of the data or a request to stop; the last state is saved.

        Raises:
            NonFiniteError: by the policy.
            CheckpointError: checkpoints could not be written, again and again.
            DataError: the data is damaged beyond what may be skipped.
        """
        status: Status = "done"
        first = self.step + 1
        while self.step < self.config.run.steps:
            self._watch(f"step {self.step + 1}", "step")
            start = time.perf_counter()
            batch = self._next_batch()
            if batch is None:  # on all processes at the same step: they read the same batches
                status = "data ended"
                break
            self._send(batch, start, compiled=self.step + 1 == first)
            if len(self._in_flight) > 1:
                self._settle()
            if self._agreed & {Flag.TERMINATED, Flag.INTERRUPTED}:
                status = "preempted" if Flag.TERMINATED in self._agreed else "interrupted"
                break
            self._after_step()
        self._drain()
        return self._end(status)

    # ----------------------------------------------------------------------------------------------------------- steps
    def _next_batch(self) -> Batch | None:
        self.faults.at("before_step", self.step + 1)
        return next(self.loader, None)

    def _send(self, batch: Batch, start: float, *, compiled: bool) -> None:
        number = self.loader.position - 1
        data_wait_s = time.perf_counter() - start
        self.goodput.add("data", data_wait_s)
        if compiled:
            self.faults.at("compile", self.step + 1)
        self.profile.before(self.step + 1)
        flags = self._agreement.propose(self._own_flags())
        own_s = time.perf_counter() - start
        result = self.sharded.step(batch)
        self.step += 1
        self._in_flight.append(InFlight(self.step, number, result, flags, data_wait_s, own_s, compiled))
        self.faults.at("after_step", self.step)

    def _own_flags(self) -> frozenset[Flag]:
        flags = set()
        if self.request.signal is not None:
            flags.add(Flag.TERMINATED if self.request.signal.name == "SIGTERM" else Flag.INTERRUPTED)
        if self._save_failed:
            flags.add(Flag.SAVE_FAILED)
            self._save_failed = False
        return frozenset(flags)

    def _settle(self) -> None:
        """Wait for the oldest step in flight, and judge it."""
        flight = self._in_flight.popleft()
        loss, norm = float(flight.result.loss), float(flight.result.gradient_norm)
        finite = bool(flight.result.finite)
        self._agreed = self._agreement.read(flight.flags)
        self._patient = False
        now = time.perf_counter()
        step_s, self._last_end_s = now - self._last_end_s, now
        self.goodput.add("setup" if flight.compiled else "steps", max(0.0, step_s - flight.data_wait_s))
        self._loss = loss
        self.reporter.record(
            StepRecord(
                step=flight.step,
                batch=flight.batch,
                loss=loss,
                gradient_norm=norm,
                learning_rate=self._rate(flight.step),
                finite=finite,
                step_time_s=step_s,
                data_wait_s=flight.data_wait_s,
                compiled=flight.compiled,
            ),
            peak_bytes=peak_bytes(),
        )
        self._stragglers.record(flight.own_s, step_s)
        if flight.compiled:
            self.compiles.settle()
        else:
            self.compiles.check(flight.step, f"number {flight.batch}")
        self.profile.after(flight.step)
        if Flag.SAVE_FAILED in self._agreed:
            self._note_failure(flight.step)
        self._judge(flight, loss, norm, finite=finite)

    def _judge(self, flight: InFlight, loss: float, norm: float, *, finite: bool) -> None:
        resume = ""
        if not finite:
            self.reporter.flush()
            self._report_save(self.store.finish())  # so that the message names the newest checkpoint
            saved = self.store.steps
            resume = f"the last checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
        verdict = self.judge.judge(flight.step, flight.batch, loss, norm, finite=finite, resume=resume)
        if verdict is not Verdict.ROLL_BACK:
            return
        self._report_save(self.store.finish())
        if finite and not self.store.steps:
            self.reporter.say(f"step {flight.step} is kept: there is no checkpoint yet to go back to")
            return
        self._roll_back(flight)

    def _roll_back(self, flight: InFlight) -> None:
        """Go back to the last checkpoint, and on with the batch behind the bad one."""
        self._in_flight.clear()
        self._watch("rollback", "rollback")
        abstract = self.sharded.abstract_state()
        if self.store.steps:
            free_state(self.sharded)
        restored = self.store.restore(abstract)
        if restored is None:
            raise CheckpointError(
                "there is no checkpoint to go back to",
                where=f"step {flight.step}, [policy] non_finite = rollback",
                action="save earlier ([checkpoint] every), or choose skip",
            )
        self.sharded.restore_state(restored.state)
        progress = restored.checkpoint.progress
        self.judge.recall(progress.losses, skipped=progress.skipped_steps, rollbacks=self.judge.rollbacks)
        self.step = progress.step
        self._saved_step = self.step
        self.loader.seek(flight.batch + 1)
        self.reporter.say(f"rolled back to step {self.step}; batch {flight.batch} is left out")
        self._go_on()

    def _drain(self) -> None:
        while self._in_flight:
            self._settle()

    def _rate(self, step: int) -> float:
        # Updates left out do not count for the optimizer, whose schedule this is.
        if self.learning_rate is None:
            return 0.0
        return float(self._rate_at(np.int32(max(0, step - 1 - self.judge.skipped))))

    # --------------------------------------------------------------------------------------------------- between steps
    def _after_step(self) -> None:
        self._report_save(self.store.poll())
        settings, last = self.config.run, self.step == self.config.run.steps
        if settings.eval_every and self.step % settings.eval_every == 0 and not last:
            self._drain()
            self._evaluate()
        # Only what all processes know decides: that a save succeeded, each of them notices at another step.
        due = self.step % self.config.checkpoint.every == 0
        again = self._retry_at is not None and self.step >= self._retry_at
        if (due or again) and not last:
            self._drain()
            if self._in_flight or self._saved_step == self.step:  # a rollback happened meanwhile
                return
            self._save()

    def _evaluate(self) -> None:
        if not self.held_out:
            return
        self._watch("evaluation", "evaluation")
        with self.goodput.measure("evaluation"):
            losses = [float(self.sharded.eval(batch)) for batch in self.held_out]
        self._held_out_loss = sum(losses) / len(losses)
        self.reporter.note(self.step, held_out_loss=self._held_out_loss)
        self.reporter.say(f"step {self.step}: held-out loss {self._held_out_loss:.4f}")
        self._go_on()

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def _save(self) -> None:
        self._watch("checkpoint", "checkpoint")
        with self.goodput.measure("checkpoint"):
            progress = Progress(
                step=self.step,
                next_batch=self.loader.position,
                data=self.data_fingerprint,
                config=self.config_fingerprint,
                losses=self.judge.losses,
                skipped_steps=self.judge.skipped,
                rollbacks=self.judge.rollbacks,
            )
            self._saved_step, self._retry_at = self.step, None
            event = self.store.save(self.sharded.neutral_state(), progress, self.sharded.plan)
        self._report_save(event)
        self._go_on()

    def _go_on(self) -> None:
        """Begin to measure steps again after something else; what that compiled is no surprise."""
        self._last_end_s = time.perf_counter()
        self.compiles.settle()

    def _report_save(self, event: SaveEvent | None) -> None:
        """Note how a save ended; a failure is told to the others with the next step."""
        if event is None:
            return
        self.reporter.note(event.step, checkpoint_s=event.duration_s, checkpoint_failed=int(event.error is not None))
        if event.error is None:
            self._failures = 0
            return
        self._save_failed = True
        problem = f"{type(event.error).__name__}: {str(event.error)[:200]}"
        _log.warning("checkpoint of step %d failed: %s", event.step, problem)

    def _note_failure(self, step: int) -> None:
        self._failures += 1
        if self._failures > self.config.checkpoint.max_failures:
            raise self._gave_up()
        back_off = min(2 ** (self._failures - 1), LONGEST_BACK_OFF, self.config.checkpoint.every)
        self._retry_at = step + back_off
        self._saved_step = -1
        _log.warning("training goes on; the next save is tried after step %d", self._retry_at)

    def _gave_up(self) -> CheckpointError:
        return CheckpointError(
            f"{self._failures} saves in a row failed",
            expected=f"at most {self.config.checkpoint.max_failures} ([checkpoint] max_failures)",
            where=str(self.store.folder),
            action="make room or repair the file system; older checkpoints are untouched",
        )

    def _save_last(self) -> None:
        """Save and wait; try again with growing pauses until it is saved or has failed too often."""
        tried = False
        while True:
            self._report_save(self.store.finish())
            saved = self._saved_step == self.step and not self._save_failed
            if not any(self.ranks.exchange("last save", "" if saved else "not saved")):
                return
            if tried:
                self._failures += 1
                if self._failures > self.config.checkpoint.max_failures:
                    raise self._gave_up()
                time.sleep(min(2 ** (self._failures - 1), LONGEST_BACK_OFF))
            self._save_failed, tried = False, True
            self._save()

    # ------------------------------------------------------------------------------------------------------------- end
    def _end(self, status: Status) -> Outcome:
        self._save_last()
        if status in ("done", "data ended"):
            self._evaluate()
        summary = self.goodput.summary()
        self.reporter.note(self.step, **{f"goodput_{name}": value for name, value in summary.items()})
        self.reporter.flush()
        return Outcome(
            status=status, step=self.step, loss=self._loss, held_out_loss=self._held_out_loss, goodput=summary
        )

    def _watch(self, what: str, kind: Literal["step", "evaluation", "checkpoint", "rollback"]) -> None:
        """Tell the watchdog what begins.

        What is done for the first time is compiled, here and on the other processes, which may need longer: the step
        that waits for them afterwards has the same patience.
        """
        if kind not in self._known:
            self._known.add(kind)
            self._patient = True
        policy, usual_s = self.config.policy, self.reporter.median_step_time_s
        limit_s = policy.stall_s if math.isnan(usual_s) else max(policy.stall_s, USUAL_STEPS * usual_s)
        self.watchdog.beat(what, policy.compile_s if self._patient or kind != "step" else limit_s)


def free_state(sharded: ShardedModel) -> None:
    """Delete the state from the devices, so that another one fits; the next use must be ``restore_state``."""
    for leaf in jax.tree.leaves(sharded.state):
        leaf.delete()
