"""Write docs/hardware.md from the bundled profiles, so that the page can not differ from what the search uses.

Run from the repository root: python scripts/write_hardware_table.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from galvatron_jax.hardware import hardware_names, load_hardware
from galvatron_jax.profile import HardwareProfile

PAGE = Path(__file__).parent.parent / "docs" / "hardware.md"

INTRODUCTION = """# Bundled hardware

Written by `python scripts/write_hardware_table.py` from `galvatron_jax/hardware/*.json`; do not edit by hand.

No clock of ours ran for these numbers: they are data sheets and public measurements, and the search says so
("bundled, not measured"). A profile of your own cluster takes their place: `--hardware FILE`.
GB is 10^9 bytes, GiB is 2^30. Link bandwidths are per GPU and direction, and what large collectives reach, not line
rates. Usable memory is what plans are made for; JAX itself preallocates only 75 % of a GPU unless
`XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise, so set it (0.92 for an H100) before you run a plan that fills the card.
"""


def tera(hardware: HardwareProfile, dtype: str) -> str:
    """Peak of one dtype in TFLOP/s, or a dash."""
    rate = hardware.matmul_flops_per_s.get(dtype)
    return f"{rate / 1e12:g}" if rate else "–"


ROWS: tuple[tuple[str, Callable[[HardwareProfile], str]], ...] = (
    ("memory, GiB", lambda h: f"{h.memory_bytes / 2**30:.1f}"),
    ("reserved, GiB", lambda h: f"{h.reserved_bytes / 2**30:.1f}"),
    ("usable, GiB", lambda h: f"{(h.memory_bytes - h.reserved_bytes) / 2**30:.1f}"),
    ("memory bandwidth, GB/s", lambda h: f"{h.memory_bandwidth_bytes_per_s / 1e9:g}"),
    ("bfloat16 peak, TFLOP/s", lambda h: tera(h, "bfloat16")),
    ("float32 peak, TFLOP/s", lambda h: tera(h, "float32")),
    ("float8 peak, TFLOP/s", lambda h: tera(h, "float8_e4m3fn")),
    (
        "products: share of peak, by FLOP",
        lambda h: ", ".join(f"{p.efficiency:g} at {p.flops:.1e}" for p in h.matmul_efficiency),
    ),
    ("attention: forward, backward", lambda h: ", ".join(f"{share:g}" for share in h.attention_efficiency.values())),
    ("fused attention", lambda h: "yes" if h.fused_attention else "no"),
    ("kernel launch, µs", lambda h: f"{h.kernel_launch_s * 1e6:g}"),
    ("overlap slowdown", lambda h: f"{h.overlap_slowdown:g}"),
    ("link in a node, GB/s", lambda h: f"{h.intra_node.bandwidth_bytes_per_s / 1e9:g}"),
    ("– per ring step, µs", lambda h: f"{h.intra_node.latency_s * 1e6:g}"),
    ("link between nodes, GB/s", lambda h: f"{h.inter_node.bandwidth_bytes_per_s / 1e9:g}"),
    ("– per ring step, µs", lambda h: f"{h.inter_node.latency_s * 1e6:g}"),
    ("merges sums before reducing", lambda h: "yes" if h.sums_before_reducing else "no"),
)


def page() -> str:
    """The whole page as Markdown."""
    profiles = [load_hardware(name) for name in hardware_names()]
    lines = [INTRODUCTION, "| | " + " | ".join(h.name for h in profiles) + " |", "|---" * (len(profiles) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(row(h) for h in profiles) + " |" for title, row in ROWS]
    lines += ["", "## Sources"]
    for hardware in profiles:
        lines += ["", f"### {hardware.name}", "", hardware.description + ".", ""]
        lines += [f"- `{field}`: {text}." for field, text in hardware.sources.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
