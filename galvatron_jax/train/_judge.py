"""The judge: is this step's loss one to go on with?

A step whose loss or gradient norm is not finite has changed nothing (the compiled step left its update out); here it is
decided what the run does about it. A loss far above its recent mean is reported with its batch: spikes are how a bad
document or a too large learning rate shows itself. The host learns of one when the update is applied, so an update that
is to be left out is undone: back to the checkpoint, and on behind the batch.
"""

from __future__ import annotations

import collections
import enum
import logging
import statistics
from collections.abc import Callable, Sequence

from ..errors import NonFiniteError
from ._config import PolicyConfig

_log = logging.getLogger(__name__)

LEAST_LOSSES = 8
"""Before a deviation can be estimated at all."""


class Verdict(enum.Enum):
    """What the run does after a step."""

    GO_ON = enum.auto()
    ROLL_BACK = enum.auto()


class Judge:
    """Judges every step in order; all processes judge the same numbers."""

    def __init__(self, policy: PolicyConfig, describe: Callable[[int], str]) -> None:
        """Begin without a past.

        Args:
            policy: What to do.
            describe: Says which samples batch ``k`` holds.
        """
        self._policy, self._describe = policy, describe
        self._losses: collections.deque[float] = collections.deque(maxlen=policy.spike_window)
        self.skipped = 0
        """Of the steps so far, those that left their update out."""
        self.rollbacks = 0
        """So far."""

    @property
    def losses(self) -> tuple[float, ...]:
        """The window: the last finite losses."""
        return tuple(self._losses)

    def recall(self, losses: Sequence[float], *, skipped: int, rollbacks: int) -> None:
        """Go on with the past of a checkpoint."""
        self._losses = collections.deque(losses, maxlen=self._policy.spike_window)
        self.skipped, self.rollbacks = skipped, rollbacks

    def judge(self, step: int, batch: int, loss: float, gradient_norm: float, *, finite: bool, resume: str) -> Verdict:
        """Return what to do after ``step``.

        Args:
            step: The step.
            batch: Number of its batch.
            loss: Its loss.
            gradient_norm: Its gradient norm.
            finite: What the device decided.
            resume: Where the run can go on from, for the message.

        Raises:
            NonFiniteError: it is not finite and the policy is to stop, or it happened too often.
        """
        if finite:
            return self._judge_finite(step, batch, loss)
        policy, problem = self._policy.non_finite, f"step {step}: loss {loss}, gradient norm {gradient_norm}"
        if policy == "rollback":
            self.rollbacks += 1
        else:
            self.skipped += 1
        left_out = self.skipped + self.rollbacks
        if policy == "stop" or left_out > self._policy.max_skipped:
            raise NonFiniteError(
                f"{problem}; its update was left out" + f" ({left_out} so far)" * (policy != "stop"),
                expected="finite numbers",
                where=self._describe(batch),
                action=f"{resume}; look at the batch, lower the learning rate, or set [policy] non_finite",
            )
        _log.warning("%s; policy %s (%d so far); %s", problem, policy, left_out, self._describe(batch))
        return Verdict.ROLL_BACK if policy == "rollback" else Verdict.GO_ON

    def _judge_finite(self, step: int, batch: int, loss: float) -> Verdict:
        spike, may = self._is_spike(step, batch, loss), self.skipped + self.rollbacks < self._policy.max_skipped
        if spike and may and self._policy.spike == "rollback":
            self.rollbacks += 1
            return Verdict.ROLL_BACK
        self._losses.append(loss)
        return Verdict.GO_ON

    def _is_spike(self, step: int, batch: int, loss: float) -> bool:
        if len(self._losses) < LEAST_LOSSES:
            return False
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        if deviation <= 0 or loss <= mean + self._policy.spike_sigma * deviation:
            return False
        _log.warning(
            "loss spike at step %d: %.4g is %.1f standard deviations above the mean %.4g; %s",
            step,
            loss,
            (loss - mean) / deviation,
            mean,
            self._describe(batch),
        )
        return True
