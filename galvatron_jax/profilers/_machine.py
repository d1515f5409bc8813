"""The devices in sight: which, how many, with which software."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from ..cluster import Cluster
from ..errors import DeviceMismatchError
from ..hardware import installed_driver
from ..measured import Provenance
from ._loop import platform_of
from ._readings import Machine
from ._timing import Agree, alone


def mesh_devices(cluster: Cluster) -> tuple[jax.Device, ...]:
    """Return the devices of ``cluster``, node-major: by process, then by number.

    Raises:
        DeviceMismatchError: fewer devices than the mesh needs; or several processes, and not all their devices in it.
    """
    try:
        found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    except RuntimeError as error:
        raise DeviceMismatchError(
            f"jax finds no devices: {error}", where="--mesh", action="check the driver, or give --devices N for CPU"
        ) from None
    too_few = len(found) < cluster.devices
    if too_few or (jax.process_count() > 1 and len(found) != cluster.devices):
        raise DeviceMismatchError(
            f"mesh {cluster.mesh} has {cluster.devices} devices, jax sees {len(found)} ({found[0].device_kind})",
            expected="at least as many devices as the mesh has" if too_few else "all devices of all processes",
            where="--mesh",
            action="give another --mesh, or --devices N for N virtual CPU devices",
        )
    return tuple(found[: cluster.devices])


def describe_machine(cluster: Cluster, devices: Sequence[jax.Device]) -> Machine:
    """Return what identifies this machine in a profile."""
    platform = platform_of(devices)
    return Machine(
        platform=platform,
        device_kind=devices[0].device_kind,
        devices=len(devices),
        processes=jax.process_count(),
        mesh=cluster.mesh,
        jax_version=jax.__version__,
        driver=installed_driver() if platform == "gpu" else "",
    )


def provenance_of(machine: Machine, device: str, date: str) -> Provenance:
    """Return the fingerprint of what is measured on ``machine`` today; ``device`` names its hardware profile."""
    return Provenance(
        device=device,
        device_kind=machine.device_kind,
        driver=machine.driver,
        jax_version=machine.jax_version,
        date=date,
    )


def here(device: str, date: str) -> Provenance:
    """Return the fingerprint of the devices in sight; ``device`` names the hardware profile that stands for them."""
    first = jax.devices()[0]
    return Provenance(
        device=device,
        device_kind=first.device_kind,
        driver=installed_driver() if platform_of([first]) == "gpu" else "",
        jax_version=jax.__version__,
        date=date,
    )


def largest_of_all() -> Agree:
    """Return a function that makes one number of those of all processes: the largest."""
    if jax.process_count() == 1:
        return alone
    from jax.experimental import multihost_utils  # loads more than one process needs

    return lambda number: float(multihost_utils.process_allgather(np.float32(number)).max())
