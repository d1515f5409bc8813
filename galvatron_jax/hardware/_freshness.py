"""Is a hardware profile still true, and can it be? What a user should hear before trusting a plan.

* **stale**: measured with another driver or JAX than this machine has now;
* **foreign**: measured on devices of another kind than those in sight here (planning for a cluster elsewhere is fine,
  so this is a remark, not an error);
* **doubtful**: a figure so far from the bundled profile of the same device that a unit slipped or a clock lied. The
  schema already refuses what cannot be (zeros, NaN, tables that fall); this catches what hardly can.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from ..errors import DocumentNotFoundError
from ..profile import HardwareProfile
from ._bundled import load_hardware

ABSURD_RATIO = 8.0
"""Beyond it in either direction a figure is doubted. Links differ most between machines with one kind of GPU: 400 Gb/s
for each GPU or for eight of them."""

MOST_FLOPS_PER_S, MOST_BYTES_PER_S, MOST_LATENCY_S = 1e17, 1e14, 0.01
"""Of one device: ten times what the fastest one of 2026 does; a hundred times a slow network's latency."""

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def freshness_notes(hardware: HardwareProfile, *, visible_gpu: str | None = None) -> list[str]:
    """Return what is doubtful about ``hardware`` here and now, in words; empty for bundled data and when all is well.

    Args:
        hardware: A profile, measured or not.
        visible_gpu: Kind of the devices in sight, when known (as ``nvidia-smi`` prints it).
    """
    notes = list(_absurd(hardware))
    found = hardware.provenance
    if found is None:
        return notes
    now = {"driver": installed_driver(), "jax": _installed_jax()}
    then = {"driver": found.driver, "jax": found.jax_version}
    changed = [f"{name} {then[name]}, now {now[name]}" for name in now if now[name] and then[name] != now[name]]
    if visible_gpu and visible_gpu.lower() not in found.device_kind.lower():
        notes.append(f"foreign: measured on {found.device_kind}, here is {visible_gpu}")
    elif [text for text in changed if not text.endswith(" ")]:
        notes.append(f"stale: measured {found.date} with {'; '.join(changed)}: measure again")
    return notes


def installed_driver() -> str:
    """Return the version of the NVIDIA driver, ``""`` when there is none."""
    try:
        text = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else ""


def _installed_jax() -> str:
    try:
        return metadata.version("jax")
    except metadata.PackageNotFoundError:  # planning needs none
        return ""


def _absurd(hardware: HardwareProfile) -> Iterator[str]:
    try:
        usual = load_hardware(hardware.device)
    except DocumentNotFoundError:
        yield from _unheard_of(hardware)  # no bundled profile to hold it against
        return
    pairs = {
        "memory_bandwidth_bytes_per_s": (hardware.memory_bandwidth_bytes_per_s, usual.memory_bandwidth_bytes_per_s),
        "memory_bytes": (hardware.memory_bytes, usual.memory_bytes),
        "intra_node bandwidth": (hardware.intra_node.bandwidth_bytes_per_s, usual.intra_node.bandwidth_bytes_per_s),
        "inter_node bandwidth": (hardware.inter_node.bandwidth_bytes_per_s, usual.inter_node.bandwidth_bytes_per_s),
    }
    for dtype in sorted(set(hardware.matmul_flops_per_s) & set(usual.matmul_flops_per_s)):
        pairs[f"matmul_flops_per_s {dtype}"] = (hardware.matmul_flops_per_s[dtype], usual.matmul_flops_per_s[dtype])
    if hardware.device == "cpu":
        return  # one name for every host
    for name, (value, expected) in pairs.items():
        ratio = value / expected
        if not 1 / ABSURD_RATIO <= ratio <= ABSURD_RATIO:
            yield f"doubtful: {name} is {value:.3g}, {ratio:.3g} times that of a usual {usual.name}"


def _unheard_of(hardware: HardwareProfile) -> Iterator[str]:
    """What no device of today does."""
    inside, between = hardware.intra_node, hardware.inter_node
    flops_per_s = max(hardware.matmul_flops_per_s.values())
    bytes_per_s = max(
        hardware.memory_bandwidth_bytes_per_s, inside.bandwidth_bytes_per_s, between.bandwidth_bytes_per_s
    )
    latency_s = max(inside.latency_s, between.latency_s)
    found = {
        f"matrix products at {flops_per_s:.3g} FLOP/s": flops_per_s > MOST_FLOPS_PER_S,
        f"memory or links at {bytes_per_s:.3g} bytes/s": bytes_per_s > MOST_BYTES_PER_S,
        "links between nodes faster than inside one": between.bandwidth_bytes_per_s > inside.bandwidth_bytes_per_s,
        f"a latency of {latency_s:.3g} s": latency_s > MOST_LATENCY_S,
    }
    yield from (f"doubtful: {what}; check the profile of {hardware.name}" for what, is_odd in found.items() if is_odd)
