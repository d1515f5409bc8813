"""From a plan file back to the model and hardware that it was made for."""

from __future__ import annotations

from pathlib import Path

from .._document import load
from ..errors import GalvatronError
from ..hardware import as_priced, load_hardware
from ..models import load_model_profile
from ..plan import Plan, check_plan, load_plan
from ..profile import HardwareProfile, ModelProfile
from ._galvatron import import_galvatron
from ._inputs import check_model
from .explain import Subject

STALE = "the figures below are priced with the profile given now, those in the plan file were not"


def load_subject(
    path: Path, *, profile: Path | None = None, hardware: Path | None = None, peer: Path | None = None
) -> tuple[Subject, str]:
    """Return the plan in a file with its model and hardware, and a note when these are not those that priced it.

    Args:
        path: The plan file.
        profile: The model's profile; None for a preset.
        hardware: The hardware profile; None for bundled data.
        peer: Folder with Hetu-Galvatron's measurements, in place of both.

    Raises:
        GalvatronError: a file cannot be read, or the model is not the plan's.
    """
    plan = load_plan(path)
    model = _model(plan, path, profile)
    if peer is not None:
        found = import_galvatron(peer, plan.cluster)
        model = found.apply(model) if (found.seq, found.dtype) == (model.seq, model.dtype) else model
        devices, note = found.hardware, ""
    else:
        devices, note = _hardware(plan, path, hardware)
    check_plan(plan, model, where=str(path))
    return Subject(plan, model, devices), note


def _model(plan: Plan, path: Path, profile: Path | None) -> ModelProfile:
    if profile is not None:
        model = load(profile, ModelProfile)
        check_model(model, str(profile))
    else:
        try:
            model = load_model_profile(plan.model.name)
        except GalvatronError:
            raise GalvatronError(
                f"got a plan for model {plan.model.name!r}, which is no preset",
                expected="its model profile",
                where=str(path),
                action="add --profile FILE, the profile that the plan was searched with",
            ) from None
    return model.at_seq(plan.model.seq).at_dtype(plan.model.dtype)


def _hardware(plan: Plan, path: Path, hardware: Path | None) -> tuple[HardwareProfile, str]:
    """The hardware profile; the attention that it was priced with (``--attention``) is found by its fingerprint."""
    if hardware is None and plan.hardware is None:
        raise GalvatronError(
            "the plan names no hardware", expected="--hardware FILE", where=str(path), action="name a hardware profile"
        )
    found = load_hardware(hardware if hardware is not None else plan.hardware.name if plan.hardware else "")
    if plan.hardware is None:
        return found, ""
    if priced := as_priced(found, plan.hardware.fingerprint):
        return priced, ""
    return found, f"{plan.hardware.name} has another fingerprint than the profile that priced the plan: {STALE}"
