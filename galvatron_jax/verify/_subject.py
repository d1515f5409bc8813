"""What a plan is verified on: the model, its loss, its batch and an optimizer of the planned size."""

from __future__ import annotations

import optax

from .._user_model import UserModel, own_model, preset_model
from ..errors import UnsupportedError
from ..plan import Plan


def load_subject(plan: Plan, model: str, *, fused_attention: bool) -> UserModel:
    """Return the model of ``plan`` with the batch of one microbatch, abstract: nothing is built.

    Args:
        plan: The plan; names a preset when ``model`` is empty.
        model: ``MODULE:FUNCTION`` (see ``own_model``).
        fused_attention: Whether a preset asks for cuDNN's kernel; a model of the user's own says so itself.

    Raises:
        DocumentNotFoundError: there is no such preset.
        ModelError: the function cannot be imported, or returns something else.
    """
    reference = plan.model
    if model:
        found = own_model(model)
    else:
        found = preset_model(reference.name, seq=reference.seq, dtype=reference.dtype, fused_attention=fused_attention)
    return found.resized(plan.microbatch_size)


def stand_in_optimizer(plan: Plan) -> optax.GradientTransformation:
    """Return an optimizer that keeps as many bytes per parameter as the plan says: memory is all that matters here.

    Raises:
        UnsupportedError: there is none.
    """
    size = plan.training.state_bytes_per_parameter
    optimizers = {8: optax.adamw(1e-3), 4: optax.sgd(1e-3, momentum=0.9), 0: optax.sgd(1e-3)}
    if size not in optimizers:
        raise UnsupportedError(
            f"got an optimizer with {size} bytes of state per parameter",
            expected="8 (two float32 moments), 4 (one) or 0",
            where="training.state_bytes_per_parameter of the plan",
            action="verify with the nearest of these",
        )
    return optimizers[size]
