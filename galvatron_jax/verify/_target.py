"""Descriptions of GPUs for XLA's compiler, which then compiles for a GPU that is not there."""

from __future__ import annotations

from importlib import resources

from ..errors import UnsupportedError

_FOLDER = "_targets"
_SUFFIX = ".txtpb"


def target_names() -> tuple[str, ...]:
    """Return the names of the bundled targets, sorted; they are names of bundled hardware."""
    files = (resources.files(__package__) / _FOLDER).iterdir()
    return tuple(sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX)))


def load_target(gpu: str) -> str:
    """Return the GpuTargetConfigProto text of a GPU.

    Args:
        gpu: A name of bundled hardware, such as ``"h100"``.

    Raises:
        UnsupportedError: XLA's GPU compiler has no such target (``"cpu"``, or hardware of your own).
    """
    if gpu not in target_names():
        raise UnsupportedError(
            f"no compiler target for {gpu!r}",
            expected="one of " + ", ".join(target_names()),
            where="cluster.gpu of the plan",
            action="verify a plan for one of these GPUs",
        )
    return (resources.files(__package__) / _FOLDER / (gpu + _SUFFIX)).read_text()
