"""Command line of the search: flags, their texts, and the values that they stand for. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..cluster import Cluster, parse_cluster
from ..errors import GalvatronError
from ..units import parse_bytes

DEFAULT_MODEL = "llama2-7b"
DEFAULT_OUT = Path("configs/optimal_solution.json")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
MAX_SEQ = 2**24
EXAMPLES = """\
examples:
  python -m galvatron_jax.search --mesh 2x8
  python -m galvatron_jax.search --mesh 4x8 --gpu h100 --model llama3-70b --global-batch 512,1024
  python -m galvatron_jax.search --mesh 1x8 --gpu a100-40g --memory 34GiB --no-pp --json > plan.json

exit status: 0 done, 2 bad input, 3 nothing fits the memory, 4 environment, 130 interrupted (the best plan so far is
written)
"""


FLAGS = {
    "what to train, and where": (
        ("--mesh", "NODESxGPUS", "the cluster, for example 2x8: two nodes of eight GPUs"),
        ("--gpu", "NAME", "a100-40g, a100-80g, h100, h200, b200, cpu (default: what nvidia-smi shows, else h100)"),
        ("--hardware", "FILE", "hardware profile to use instead of a bundled one"),
        ("--memory", "SIZE", "budget per GPU, for example 72GiB (default: capacity less driver, NCCL and slack)"),
        ("--model", "NAME", f"preset, for example llama3-8b (default: {DEFAULT_MODEL})"),
        ("--profile", "FILE", "model profile to use instead of a preset"),
        ("--seq", "N", "sequence length (default: the model's)"),
        ("--dtype", "NAME", "compute dtype: bfloat16, float16, float32 (default: the model's)"),
        ("--attention", "KIND", "fused: a kernel that keeps no scores (cuDNN; 16-bit dtypes), or xla: scores in memory,"
         " as auto_shard 0.1 runs it (default: fused where the GPU has it)"),
        ("--global-batch", "N,N,...", "samples per step to choose from (default: the largest three of 1, 2, 4, 8, 16,"
         " 32 per GPU that stay within 16 Mi tokens)"),
    ),
    "what to leave out": (
        ("--microbatches", "N,N,...", "allowed microbatch counts (default: all divisors of the batch)"),
        ("--max-pp", "N", "most pipeline stages"),
        ("--no-pp", "", "no pipeline: the same as --max-pp 1"),
        ("--max-tp", "N", "largest tensor-parallel degree"),
        ("--time-limit", "SECONDS", "stop then, with the best plan so far and the gap that is proven"),
    ),
    "output": (
        ("--out", "FILE", f"plan file (default: {DEFAULT_OUT}; with --json: none)"),
        ("--force", "", "overwrite --out even if it is not a plan file"),
        ("--json", "", "print the plan document, and nothing else, on stdout"),
        ("--quiet", "", "print nothing but errors (and the document with --json)"),
        ("--debug", "", "show the traceback of an error"),
    ),
}  # fmt: skip
"""(flag, name of its value or nothing, help) by group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for."""

    cluster: Cluster
    gpu: str | None
    hardware: Path | None
    memory_bytes: int | None
    model: str
    profile: Path | None
    seq: int | None
    dtype: str | None
    attention: str | None
    global_batches: tuple[int, ...] | None
    microbatches: tuple[int, ...] | None
    max_stages: int | None
    max_tp: int | None
    time_limit_s: float | None
    out: Path
    out_given: bool
    force: bool
    json: bool
    quiet: bool
    debug: bool


def parse_options(argv: Sequence[str]) -> Options:
    """Return the options in ``argv``.

    Raises:
        GalvatronError: a flag is unknown or its value is out of range.
        SystemExit: ``--help`` or ``--version`` was given.
    """
    found = _parser().parse_args(_joined(argv))
    if found.gpu is not None and found.hardware is not None:
        raise GalvatronError("got both --gpu and --hardware", expected="one of them", action="leave one out")
    if found.model is not None and found.profile is not None:
        raise GalvatronError("got both --model and --profile", expected="one of them", action="leave one out")
    return Options(
        cluster=parse_cluster(found.mesh),
        gpu=found.gpu,
        hardware=found.hardware,
        memory_bytes=None if found.memory is None else parse_bytes(found.memory),
        model=found.model or DEFAULT_MODEL,
        profile=found.profile,
        seq=_optional(found.seq, "--seq", MAX_SEQ),
        dtype=_dtype(found.dtype),
        attention=_attention(found.attention),
        global_batches=_numbers(found.global_batch, "--global-batch"),
        microbatches=_numbers(found.microbatches, "--microbatches"),
        max_stages=1 if found.no_pp else _optional(found.max_pp, "--max-pp"),
        max_tp=_optional(found.max_tp, "--max-tp"),
        time_limit_s=_seconds(found.time_limit),
        out=found.out or DEFAULT_OUT,
        out_given=found.out is not None,
        force=found.force,
        json=found.json,
        quiet=found.quiet,
        debug=found.debug,
    )


class _Parser(argparse.ArgumentParser):
    """Errors are raised like all others instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise GalvatronError(message, action="see python -m galvatron_jax.search --help")


class _Version(argparse.Action):
    """Prints the version; the package is asked only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .. import __version__

        print(f"galvatron_jax {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m galvatron_jax.search",
        description="Find the fastest way to spread a model over GPUs, and prove that it is. Needs no GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, metavar, text in flags:
            if metavar:
                kind = Path if metavar == "FILE" else str
                group.add_argument(flag, metavar=metavar, type=kind, required=flag == "--mesh", help=text)
            else:
                group.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    return parser


def _joined(argv: Sequence[str]) -> list[str]:
    """``--mesh -1x8`` as ``--mesh=-1x8``, so that the value is judged as one and not taken for a flag."""
    joined: list[str] = []
    for word in argv:
        if joined and re.match(r"-[0-9.]", word) and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _number(text: str, where: str, most: int = 10**7) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text.strip(), flags=re.ASCII) and 1 <= int(text) <= most:
        return int(text)
    raise GalvatronError(f"got {text!r}", expected=f"a whole number from 1 to {most}", where=where)


def _optional(text: str | None, where: str, most: int = 10**7) -> int | None:
    return None if text is None else _number(text, where, most)


def _numbers(text: str | None, where: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(_number(part, where) for part in text.split(","))


def _dtype(text: str | None) -> str | None:
    name = DTYPES.get(text.lower(), text.lower()) if text else None
    if name is not None and name not in DTYPES.values():
        raise GalvatronError(f"got {text!r}", expected="one of bfloat16, float16, float32", where="--dtype")
    return name


def _attention(text: str | None) -> str | None:
    if text not in (None, "fused", "xla"):
        raise GalvatronError(f"got {text!r}", expected="fused or xla", where="--attention")
    return text


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text, flags=re.ASCII):
        return float(text)
    raise GalvatronError(f"got {text!r}", expected="seconds, for example 30", where="--time-limit")
