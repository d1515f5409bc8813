"""From options to values: which hardware, which model, and the words in which the user is told what was assumed."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .._document import load
from .._text import Line, Piece, clean, labelled
from ..cluster import Cluster
from ..cost import is_fused, is_measured, memory_budget, valid_memory
from ..errors import DocumentError, DocumentNotFoundError, GalvatronError
from ..hardware import freshness_notes, load_hardware
from ..models import load_model_profile
from ..profile import Array, HardwareProfile, LayerKind, ModelProfile
from ..units import GB, ITEM_BYTES, format_count, format_gib
from ._flags import DEFAULT_MODEL
from ._galvatron import import_galvatron
from ._options import Options
from ._space import default_batches

DEFAULT_GPU = "h100"
PEER_NOTE = (
    "Hetu-Galvatron's measurements: forward times, collectives, messages, overlap; its assumptions: backward = 2 x"
    " forward, gather = half an all-reduce; ours: bytes, structure, tensor division, optimizer, schedule, peak rates"
)
MAX_LAYERS = 10_000
MAX_ELEMENTS = 2.0**62
"""Of one array, per sample; beyond this sums of bytes are no longer exact."""
NVIDIA_SMI_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the search is given, and where each part came from."""

    model: ModelProfile
    model_source: str
    cluster: Cluster
    hardware: HardwareProfile
    hardware_source: str
    gpu_note: str
    """Why this GPU, when the user did not say; else empty."""


def load_inputs(options: Options, cluster: Cluster) -> Inputs:
    """Read the model and hardware that ``options`` name, for ``cluster``.

    Raises:
        DocumentNotFoundError: there is no such preset, GPU or file.
        DocumentError: a file is not a valid profile, or contradicts itself.
        GalvatronError: the hardware cannot compute in the model's dtype.
    """
    if options.peer is None:
        hardware, hardware_source, note = _hardware(options)
        model, where = _model(options, options.model or DEFAULT_MODEL)
    else:
        hardware, hardware_source, note, model, where = _imported(options, options.peer, cluster)
    if options.attention is not None:
        hardware = msgspec.structs.replace(hardware, fused_attention=options.attention == "fused")
    missing = sorted({dot.dtype for kind in model.kinds for dot in kind.dots} - set(hardware.matmul_flops_per_s))
    if missing:
        raise GalvatronError(
            f"{clean(hardware.name)} has no matmul rate for {', '.join(missing)}",
            expected=f"one of {', '.join(sorted(hardware.matmul_flops_per_s))}",
            where="--dtype",
            action="choose another --dtype or --gpu",
        )
    if memory_budget(hardware) <= 0:
        raise DocumentError(
            f"reserved_bytes {hardware.reserved_bytes} leave nothing of memory_bytes {hardware.memory_bytes}",
            where=hardware_source,
        )
    cluster = msgspec.structs.replace(cluster, gpu=hardware.device)
    return Inputs(
        model=model,
        model_source=where,
        cluster=cluster,
        hardware=hardware,
        hardware_source=hardware_source,
        gpu_note=note,
    )


def assumption_lines(inputs: Inputs, options: Options) -> list[Line]:
    """Return what the search was given, and which part of it nobody chose."""
    model, hardware, cluster = inputs.model, inputs.hardware, inputs.cluster
    runs = ", ".join(f"{run.count} {clean(run.kind)}" for run in model.layers)
    several = len(options.clusters) > 1
    shape = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} x {cluster.gpus_per_node}"
    shape = ", ".join(each.mesh for each in options.clusters) if several else shape
    nodes = f"{shape} {clean(hardware.name)}"
    measured = "measured" if hardware.measured else "bundled, not measured" if not options.hardware else "not measured"
    size = f" · {format_count(model.parameter_count)} parameters · {runs} · seq {model.seq} · {model.dtype}"
    lines = [
        labelled("model", Piece(clean(model.name), "bold"), size, Piece(f"   {inputs.model_source}", "dim")),
        labelled(
            "clusters" if several else "cluster", Piece(nodes, "bold"), _links(inputs), Piece(f"   {measured}", "dim")
        ),
    ]
    lines[1:1] = [*_attention(model, hardware), *_measured(model, hardware), *_compiled(model, hardware)]
    doubts = freshness_notes(hardware, visible_gpu=visible_gpu() if hardware.provenance else None)
    doubts = doubts if options.peer is None else []  # another tool's files say neither driver nor date
    lines += [labelled("", Piece(clean(note), "yellow")) for note in (inputs.gpu_note, *doubts) if note]
    return [*lines, labelled("budget", _budget(inputs, options)), labelled("batch", _batches(inputs, options))]


def _attention(model: ModelProfile, hardware: HardwareProfile) -> list[Line]:
    """Say how attention is priced; ``auto_shard`` runs cuDNN's kernel where the model asks for it, and prices it so."""
    if not any(dot.attention for kind in model.kinds for dot in kind.dots):
        return []
    if any(is_fused(kind, hardware) for kind in model.kinds):
        note = '   the model must ask for it: implementation="cudnn"; else plan with --attention xla'
        return [labelled("", "attention by a fused kernel that keeps no scores (cuDNN)", Piece(note, "yellow"))]
    return [labelled("", "attention with its scores in memory, no fused kernel")]


def _measured(model: ModelProfile, hardware: HardwareProfile) -> list[Line]:
    """Say whether a clock or a formula prices compute, where the profile holds measured layers."""
    known = [kind.measured for kind in model.kinds if kind.measured is not None]
    if not known:
        return []
    used = [kind.measured for kind in model.kinds if is_measured(kind, hardware) and kind.measured is not None]
    if not used:
        where = clean(known[0].provenance.device)
        return [labelled("", Piece(f"layers measured on {where} do not count here: compute is estimated", "yellow"))]
    rest = f", {len(model.kinds) - len(used)} kinds estimated" if len(used) < len(model.kinds) else ""
    error = max(measured.interpolation_error for measured in used)
    note = f" · between measured batches within {error:.0%}" if error else ""
    return [labelled("", f"compute measured on {clean(used[0].provenance.device_kind)}{rest}{note}")]


def _compiled(model: ModelProfile, hardware: HardwareProfile) -> list[Line]:
    """Say whether compiled programs or formulas give the memory, where the profile holds compiled ones."""
    known = [kind.memory for kind in model.kinds if kind.memory is not None]
    if not known:
        return []
    used = [memory for kind in model.kinds if (memory := valid_memory(kind, hardware)) is not None]
    if not used:
        other = " with attention run the other way" if known[0].provenance.device == hardware.device else ""
        where = clean(known[0].provenance.device) + other
        return [labelled("", Piece(f"memory compiled for {where} does not count here: it is estimated", "yellow"))]
    rest = f", {len(model.kinds) - len(used)} kinds estimated" if len(used) < len(model.kinds) else ""
    error = max(memory.interpolation_error for memory in used)
    note = f" · between measured batches within {error:.0%}" if error else ""
    where = clean(f"{used[0].provenance.device} (jax {used[0].provenance.jax_version})")
    return [labelled("", f"memory measured on programs compiled for {where}{rest}{note}")]


def _links(inputs: Inputs) -> str:
    hardware, cluster = inputs.hardware, inputs.cluster
    inside, between = hardware.intra_node.bandwidth_bytes_per_s / GB, hardware.inter_node.bandwidth_bytes_per_s / GB
    words = f" · {inside:.3g} GB/s inside a node" if cluster.gpus_per_node > 1 else ""
    return words + (f" · {between:.3g} GB/s per GPU between nodes" if cluster.nodes > 1 else "")


def _budget(inputs: Inputs, options: Options) -> str:
    hardware = inputs.hardware
    if options.memory_bytes is not None:
        more = options.memory_bytes > hardware.memory_bytes
        warning = f", more than the {format_gib(hardware.memory_bytes)} that the GPU has" * more
        return f"{format_gib(options.memory_bytes)} per GPU (--memory{warning})"
    return (
        f"{format_gib(memory_budget(hardware))} per GPU: {format_gib(hardware.memory_bytes)} less"
        f" {format_gib(hardware.reserved_bytes)} for driver, NCCL and allocator"
    )


def _batches(inputs: Inputs, options: Options) -> str:
    if len(options.clusters) > 1 and not options.global_batches:
        return "8, 16 and 32 samples per step and GPU, or the largest three that stay within 16 Mi tokens (default)"
    batches = options.global_batches or default_batches(inputs.cluster, inputs.model)
    text = ", ".join(str(batch) for batch in sorted(set(batches))) + " samples per step"
    if options.global_batches:
        return text
    per_gpu = ", ".join(f"{batch // inputs.cluster.devices}" for batch in batches)
    return f"{text}: {per_gpu} per GPU (default; choose with --global-batch)"


def _hardware(options: Options) -> tuple[HardwareProfile, str, str]:
    if options.hardware is not None:
        return load_hardware(options.hardware), str(options.hardware), ""
    if options.gpu is not None:
        return load_hardware(options.gpu), options.gpu, ""
    visible = visible_gpu()
    if visible is None:
        note = f"no GPU is visible here: {DEFAULT_GPU} assumed; choose with --gpu"
        return load_hardware(DEFAULT_GPU), DEFAULT_GPU, note
    try:
        hardware = load_hardware(visible)
    except DocumentNotFoundError:
        note = f"no bundled profile of the visible {clean(visible)}: {DEFAULT_GPU} assumed; choose with --hardware"
        return load_hardware(DEFAULT_GPU), DEFAULT_GPU, note
    return hardware, hardware.name, f"{clean(visible)} is visible here"


def visible_gpu() -> str | None:
    """Return the name of the first GPU that ``nvidia-smi`` lists; None without a GPU or the command."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        listed = subprocess.run(
            [command, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_LIMIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    names = [line.strip() for line in listed.stdout.splitlines() if line.strip()]
    return names[0] if names else None


def _imported(options: Options, folder: Path, cluster: Cluster) -> tuple[HardwareProfile, str, str, ModelProfile, str]:
    """Another tool's measurements, and the preset that it measured."""
    found = import_galvatron(folder, cluster)
    asked = options.model or found.model
    if options.profile is None and asked != found.model:
        raise GalvatronError(
            f"got --model {asked} with measurements of {found.model}", expected=f"--model {found.model}, or none",
            where=f"--profile-from galvatron {folder}", action="leave --model out",
        )  # fmt: skip
    model, where = _model(options, asked)
    if options.seq in (None, found.seq) and options.dtype in (None, found.dtype):
        model, note = found.apply(model), PEER_NOTE
    else:
        note = f"compute was measured at seq {found.seq} in {found.dtype}: elsewhere it is estimated"
    return found.hardware, str(folder), note, model, where


def _model(options: Options, name: str) -> tuple[ModelProfile, str]:
    if options.profile is not None:
        model, source = load(options.profile, ModelProfile), str(options.profile)
    else:
        if name.endswith(".json") or len(Path(name).parts) > 1:
            raise GalvatronError(f"got {name!r}", expected="a preset", where="--model", action="use --profile")
        model, source = load_model_profile(name), "stored profile of a preset"
    check_model(model, source)
    model = model if options.seq is None else model.at_seq(options.seq)
    return (model if options.dtype is None else model.at_dtype(options.dtype)), clean(source)


def check_model(model: ModelProfile, where: str) -> None:
    """Refuse a profile that contradicts itself, with every violation."""
    names = [kind.name for kind in model.kinds]
    found = [f"layers name the unknown kind {run.kind!r}" for run in model.layers if run.kind not in names]
    found += [f"kind {name!r} occurs twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if not 1 <= model.layer_count <= MAX_LAYERS:
        found.append(f"{model.layer_count} layers, expected 1 to {MAX_LAYERS}")
    for kind in model.kinds:
        found += _kind_violations(kind)
    if found:
        raise DocumentError(
            f"{len(found)} violation{'s' * (len(found) > 1)}:\n  - " + "\n  - ".join(map(clean, found[:20])),
            expected="a model profile as the analysis writes it",
            where=where,
            action="write the profile again",
        )


def _kind_violations(kind: LayerKind) -> Iterable[str]:
    arrays = [*kind.residuals, *kind.workspace, *(t.array for t in kind.traffic), *(p.array() for p in kind.parameters)]
    arrays += [boundary.array for boundary in (*kind.inputs, *kind.outputs)]
    arrays += [c.array for part in kind.candidates for c in (*part.tensor, *(part.sequence or ()))]
    arrays += [collective.array for collective in kind.data]
    arrays += [Array(dtype=dot.dtype, classes=dot.classes, factor=dot.factor) for dot in kind.dots]
    arrays += [p.array(p.compute_dtype) for p in kind.parameters]
    unknown = {name for array in arrays for name in array.classes} | {n for c in kind.candidates for n in c.classes}
    for name in sorted(unknown - set(kind.classes)):
        yield f"kind {kind.name!r} uses the unknown class {name!r}"
    for dtype in sorted({array.dtype for array in arrays} - set(ITEM_BYTES)):
        yield f"kind {kind.name!r} uses the unknown dtype {dtype!r}"
    sizes = (
        array.count * array.factor * math.prod(float(kind.classes.get(name, 1)) for name in array.classes)
        for array in arrays
    )
    if any(size > MAX_ELEMENTS for size in sizes):
        yield f"kind {kind.name!r} has an array of more than 2^62 elements"
