"""Run a plan on the devices in sight, through the same door as a user's training, and take its times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from .._auto_shard import auto_shard
from .._user_model import UserModel
from ..errors import UnsupportedError
from ..plan import Plan
from ..profile import HardwareProfile, ModelProfile
from ..profilers import RunMeter, SystemClock, here
from ..record import RunRecord


def measure_plan(
    plan: Plan,
    user: UserModel,
    model: ModelProfile,
    hardware: HardwareProfile,
    *,
    steps: int,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> RunRecord:
    """Return the record of ``steps`` steps of ``plan`` after two to warm up.

    Args:
        plan: With its prediction.
        user: The model that it is for.
        model: That model's profile.
        hardware: What the prediction was made with.
        steps: How many are timed.
        show: Called before each step.

    Raises:
        DeviceMismatchError: other devices are visible than the plan is for.
        UnsupportedError: the runtime cannot run such a plan, or there is no optimizer with as much state.
    """
    trainer = auto_shard(user.model, loss=user.loss, optimizer=_optimizer(plan), plan=plan, hardware=hardware)
    batch = jax.tree.map(_values, user.resized(plan.global_batch).batch)
    meter = RunMeter(warm_up=2)
    for done in range(steps + 2):
        show(done, steps + 2)
        meter.step(trainer.step(batch).loss)
    clock = SystemClock()
    return meter.record(plan, here(hardware.device, clock.today()), model=model, hardware=hardware)


def _optimizer(plan: Plan) -> optax.GradientTransformation:
    """One that keeps as many bytes per parameter as the plan counts with."""
    size = plan.training.state_bytes_per_parameter
    known = {8: optax.adamw(1e-4), 4: optax.sgd(1e-4, momentum=0.9), 0: optax.sgd(1e-4)}
    if size not in known:
        raise UnsupportedError(
            f"got an optimizer with {size} bytes of state per parameter",
            expected="8 (two float32 moments), 4 (one) or 0",
            where="training.state_bytes_per_parameter of the plan",
            action="measure with the nearest of these",
        )
    return known[size]


def _values(spec: Any) -> np.ndarray:
    """Data of the right shape: small whole numbers, or noise."""
    random = np.random.default_rng(0)
    whole = np.issubdtype(spec.dtype, np.integer) or spec.dtype == np.bool_
    values: np.ndarray = random.integers(0, 2, spec.shape) if whole else random.normal(size=spec.shape)
    return values.astype(spec.dtype)
