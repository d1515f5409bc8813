"""Measurements of Hetu-Galvatron as profiles of ours: ``--profile-from galvatron DIR``.

Imported (its unit "MB" is 2^20 bytes, times are ms):

    computation_profiling_*    forward seconds of a layer and of embedding + head, 1 to 12 samples, one device
    sp_time_*                  all-reduce and all-to-all inside a node, 1 MiB to 1 GiB, groups of 2, 4, 8
    allreduce_bandwidth_*      bus bandwidth of groups by their members per node, one message size
    p2p_bandwidth_*            messages between pipeline stages, inside a node and between nodes
    overlap_coefficient        how much slower compute is beside communication

With them come three assumptions of the peer's cost model, because it times forward passes only: a backward pass takes
twice the forward pass; full recomputation takes one forward pass; gathers and reduce-scatters take half an all-reduce.

Ours: the model's structure and all bytes (its memory tables are not read), how tensor parallelism divides a layer's
work, ZeRO traffic, the optimizer, the schedule, peak rates and memory of the GPU, and all formulas where no table
speaks (all-to-all between nodes). Embedding + head count as the head: a look-up takes next to nothing.

Clusters of more nodes than were measured use the bus bandwidth of groups with as many members per node. Tables that
fall where sizes rise (noise) are raised to the value before.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .._document import MAX_DOCUMENT_BYTES
from ..cluster import Cluster
from ..errors import DocumentError, DocumentNotFoundError
from ..hardware import load_hardware
from ..measured import Measured, PassTable, Provenance
from ..profile import CollectiveKind, CollectiveTable, HardwareProfile, Link, ModelProfile
from ..units import MIB

NAME = "galvatron-a100-class"
BASE = "a100-40g"
"""Peak rates and memory: the tables name no GPU, and their figures fit A100-class machines."""

BACKWARD_PER_FORWARD = 2.0
"""The peer's assumption (its cost model, galvatron/core/search_engine): backward = 2 x forward."""
HALF_AN_ALL_REDUCE = 0.5
"""The peer's assumption for all-gather and reduce-scatter."""
MS = 1e-3
SPREAD_MIB = (1.0, 32.0, 1024.0)
"""Sizes at which a single measured bandwidth becomes a table; the message measured was 32 MiB."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What a folder holds."""

    hardware: HardwareProfile
    model: str
    """Name of the preset that was measured, for example ``"llama2-7b"``."""
    dtype: str
    seq: int
    forward_s: Mapping[str, Mapping[int, float]]
    """Seconds by ``"layer"`` and ``"other"`` (embedding and head), then by samples."""

    def apply(self, model: ModelProfile) -> ModelProfile:
        """Return ``model``, at the measured sequence length and dtype, with the measured times of its kinds.

        The most frequent kind is the layer, the last one the head.
        """
        at = model.at_seq(self.seq).at_dtype(self.dtype)
        layer = max(at.layers, key=lambda run: run.count).kind
        return at.with_measured(
            {
                layer: self._measured(self.forward_s["layer"]),
                at.layers[-1].kind: self._measured(self.forward_s["other"]),
            }
        )

    def _measured(self, forward_s: Mapping[int, float]) -> Measured:
        samples = tuple(sorted(forward_s))
        times = tuple(itertools.accumulate((forward_s[count] for count in samples), max))
        provenance = self.hardware.provenance
        assert provenance is not None
        return Measured(
            provenance=provenance,
            fused_attention=True,
            passes=(
                PassTable(what="forward", tp=1, samples=samples, times_s=times),
                PassTable(
                    what="backward", tp=1, samples=samples, times_s=tuple(BACKWARD_PER_FORWARD * t for t in times)
                ),
                PassTable(what="recompute", tp=1, samples=samples, times_s=times),
            ),
        )


def import_galvatron(folder: Path, cluster: Cluster) -> Imported:
    """Read a folder of the peer's profile files.

    Args:
        folder: Holds its JSON files, all in one folder.
        cluster: What to plan for: its nodes and GPUs choose among the hardware files.

    Raises:
        DocumentNotFoundError: the folder or a needed file does not exist.
        DocumentError: a file does not hold what the peer writes.
    """
    if not folder.is_dir():
        raise DocumentNotFoundError(
            "is no folder", expected="a folder with Hetu-Galvatron's JSON files", where=f"--profile-from {folder}",
            action="name the folder that holds computation_profiling_*.json",
        )  # fmt: skip
    path = _one(folder, "computation_profiling_*_all.json")
    match = re.fullmatch(r"computation_profiling_([a-z0-9]+)_(.+)_all\.json", path.name)
    if match is None or match[1] not in DTYPES:
        raise DocumentError(
            f"got {path.name!r}", expected=f"a precision of {', '.join(DTYPES)} in the name", where=str(folder)
        )
    seq, forward_s = _compute(path)
    provenance = Provenance(
        device=NAME, device_kind="A100-class, unnamed", jax_version="none (PyTorch)", date="unknown"
    )
    base = load_hardware(BASE)
    return Imported(
        hardware=msgspec.structs.replace(
            base,
            name=NAME,
            description=f"Hetu-Galvatron's measurements in {folder.name}; peaks and memory of {BASE}",
            measured=True,
            overlap_slowdown=max(1.0, _number(_one(folder, "overlap_coefficient.json"), "overlap_coe")),
            intra_node=Link(bandwidth_bytes_per_s=_inside(folder, cluster), latency_s=base.intra_node.latency_s),
            inter_node=Link(bandwidth_bytes_per_s=_between(folder, cluster), latency_s=base.inter_node.latency_s)
            if cluster.nodes > 1
            else base.inter_node,
            collectives=(*_inside_tables(folder), *(_between_tables(folder, cluster) if cluster.nodes > 1 else ())),
            sources={**base.sources, "collectives": f"Hetu-Galvatron profile files in {folder.name}"},
            provenance=provenance,
        ),
        model=match[2],
        dtype=DTYPES[match[1]],
        seq=seq,
        forward_s=forward_s,
    )


# ----------------------------------------------------------------------------------------------------------- compute
def _compute(path: Path) -> tuple[int, dict[str, dict[int, float]]]:
    """Sequence length, and forward seconds by part and samples."""
    found: dict[str, dict[int, float]] = {"layer": {}, "other": {}}
    lengths = set()
    for key, value in _numbers(path).items():
        match = re.fullmatch(r"layertype_(0|other)_bsz([0-9]+)_seq([0-9]+)", key)
        if match:
            samples = int(match[2])
            found["layer" if match[1] == "0" else "other"][samples] = value * samples * MS  # the peer stores per sample
            lengths.add(int(match[3]))
    if len(lengths) != 1 or not found["layer"] or not found["other"]:
        raise DocumentError(
            f"got layer times at {len(lengths)} sequence lengths",
            expected="layertype_0_* and layertype_other_* at one",
            where=str(path),
            action="profile again in static or batch mode",
        )
    return lengths.pop(), found


# ------------------------------------------------------------------------------------------------------------- links
def _inside(folder: Path, cluster: Cluster) -> float:
    """Bus bandwidth of a whole node."""
    path = _hardware_file(folder, "allreduce_bandwidth", 1, cluster.gpus_per_node)
    return _number(path, f"allreduce_size_{cluster.gpus_per_node}_consec_1") * MIB / MS


def _between(folder: Path, cluster: Cluster) -> float:
    """A message between nodes: two stages, one on each half of the cluster."""
    path = _hardware_file(folder, "p2p_bandwidth", cluster.nodes, cluster.gpus_per_node)
    return _number(path, "pp_size_2") * MIB / MS


def _inside_tables(folder: Path) -> Iterator[CollectiveTable]:
    """Groups inside a node: measured times at many sizes."""
    times: dict[tuple[str, int], dict[float, float]] = {}
    for key, value in _numbers(_one(folder, "sp_time_1nodes_*gpus_per_node.json")).items():
        match = re.fullmatch(r"(allreduce|all2all)_size_(\d+)_(\d+)MB_time", key)
        if match:
            times.setdefault((match[1], int(match[2])), {})[int(match[3]) * MIB] = value * MS
    for (name, group), measured in sorted(times.items()):
        for kind, share in _kinds(name):
            yield _table(kind, group, {size: share * t for size, t in measured.items()}, inside=True)


def _between_tables(folder: Path, cluster: Cluster) -> Iterator[CollectiveTable]:
    """Groups over all nodes: one measured bus bandwidth for each number of members per node."""
    path = _hardware_file(folder, "allreduce_bandwidth", cluster.nodes, cluster.gpus_per_node)
    measured_nodes = int(path.name.split("_")[2].removesuffix("nodes"))
    for key, value in sorted(_numbers(path).items()):
        match = re.fullmatch(r"allreduce_size_(\d+)_consec_([01])", key)
        size = int(match[1]) if match else 0
        whole = size == measured_nodes * cluster.gpus_per_node
        if match is None or size % measured_nodes or (match[2] == "1") != whole:
            continue
        per_node = size // measured_nodes
        group = per_node * cluster.nodes
        bus_bytes_per_s = value * MIB / MS
        for kind, share in _kinds("allreduce"):
            moved = 2 * (group - 1) / group * share
            times = {size * MIB: moved * size * MIB / bus_bytes_per_s for size in SPREAD_MIB}
            yield _table(kind, group, times, inside=False, per_node=per_node)


def _kinds(name: str) -> tuple[tuple[CollectiveKind, float], ...]:
    if name == "all2all":
        return (("all-to-all", 1.0),)
    return (("all-reduce", 1.0), ("all-gather", HALF_AN_ALL_REDUCE), ("reduce-scatter", HALF_AN_ALL_REDUCE))


def _table(
    kind: CollectiveKind, group: int, times_s: Mapping[float, float], *, inside: bool, per_node: int | None = None
) -> CollectiveTable:
    sizes = tuple(sorted(times_s))
    rising = tuple(itertools.accumulate((times_s[size] for size in sizes), max))
    return CollectiveTable(
        kind=kind, group=group, inside_node=inside, per_node=per_node or group, sizes_bytes=sizes, times_s=rising
    )


# ------------------------------------------------------------------------------------------------------------- files
def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DocumentNotFoundError(
            f"holds no {pattern}", where=str(folder), action="copy Hetu-Galvatron's profile files into one folder"
        )
    if len(found) > 1 and not pattern.startswith("sp_time"):
        raise DocumentError(
            f"holds {len(found)} files {pattern}", expected="one", where=str(folder), action="keep the one to use"
        )
    return found[-1]


def _hardware_file(folder: Path, name: str, nodes: int, gpus: int) -> Path:
    """The file of this cluster; else that of the most nodes, at least two when there are several to plan for."""
    measured = {
        int(match[1]): path
        for path in folder.glob(f"{name}_*nodes_{gpus}gpus_per_node.json")
        if (match := re.fullmatch(rf"{name}_(\d+)nodes_\d+gpus_per_node\.json", path.name))
    }
    fitting = [n for n in measured if n <= nodes and (n > 1) == (nodes > 1)]
    if not fitting:
        raise DocumentNotFoundError(
            f"holds no {name} file for {nodes} nodes of {gpus} GPUs",
            expected=f"{name}_{nodes}nodes_{gpus}gpus_per_node.json",
            where=str(folder),
            action="plan for a cluster that was measured",
        )
    return measured[max(fitting)]


def _number(path: Path, key: str) -> float:
    numbers = _numbers(path)
    if key not in numbers:
        raise DocumentError(
            f"has no {key!r}, only {', '.join(sorted(numbers)[:4])}", expected=f"the key {key}", where=str(path),
            action="profile again",
        )  # fmt: skip
    return numbers[key]


def _numbers(path: Path) -> dict[str, float]:
    """A flat JSON object of positive numbers."""
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise DocumentError(f"got {path.stat().st_size} bytes", expected="a small JSON file", where=str(path))
    try:
        numbers = msgspec.json.decode(path.read_bytes(), type=dict[str, float])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DocumentError(
            str(error), expected="a flat JSON object of numbers", where=str(path), action="profile again"
        ) from None
    bad = [key for key, value in numbers.items() if not 0 < value < 1e12]
    if bad:
        raise DocumentError(
            f"got {numbers[bad[0]]} for {bad[0]!r}",
            expected="positive numbers",
            where=str(path),
            action="profile again",
        )
    return numbers
