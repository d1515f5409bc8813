"""Command line of the search: flags, their texts, and the values that they stand for. Imports nothing heavy."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from ..cluster import Cluster, parse_cluster
from ..errors import GalvatronError
from ..schedule import ScheduleName
from ..units import parse_bytes
from ._flags import DEFAULT_OUT, EXAMPLES, FLAGS, PROGRAM, SPECIAL
from ._rules import Rule, forbid, pin
from ._spaces import SPACES, named_space

DTYPES = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
MAX_SEQ = 2**24
MAX_MESHES = 16
MAX_TOP = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for."""

    clusters: tuple[Cluster, ...]
    gpu: str | None
    hardware: Path | None
    peer: Path | None
    """Folder with another tool's measurements."""
    memory_bytes: int | None
    model: str | None
    """Preset; None: the default, or what another tool measured."""
    profile: Path | None
    seq: int | None
    dtype: str | None
    attention: str | None
    global_batches: tuple[int, ...] | None
    space: str
    rules: tuple[Rule, ...]
    """Those of the space included."""
    microbatches: tuple[int, ...] | None
    schedules: tuple[ScheduleName, ...] | None
    max_stages: int | None
    max_tp: int | None
    time_limit_s: float | None
    explain: bool
    top: int
    frontier: bool
    price_per_hour: float | None
    report: Path | None
    verify: bool
    verify_model: str
    """``MODULE:FUNCTION`` of the profile's model; empty: the preset."""
    out: Path
    out_given: bool
    force: bool
    json: bool
    quiet: bool
    debug: bool

    @property
    def cluster(self) -> Cluster:
        """The cluster to plan for, when it is one."""
        return self.clusters[0]


def parse_options(argv: Sequence[str]) -> Options:
    """Return the options in ``argv``.

    Raises:
        GalvatronError: a flag is unknown or its value is out of range.
        SystemExit: ``--help`` or ``--version`` was given.
    """
    found = _parser().parse_args(_joined(argv))
    _check_alone(found, "hardware", "gpu", "profile_from")
    _check_alone(found, "model", "profile")
    clusters = _clusters(found.mesh)
    _check_verifiable(found, clusters)
    name = _choice(found.space or "full", SPACES, "--space")
    space = named_space(name, clusters[0])
    given = 1 if found.no_pp else _optional(found.max_pp, "--max-pp")
    return Options(
        clusters=clusters,
        gpu=found.gpu,
        hardware=found.hardware,
        peer=peer_folder(found.profile_from),
        memory_bytes=None if found.memory is None else parse_bytes(found.memory),
        model=found.model,
        profile=found.profile,
        seq=_optional(found.seq, "--seq", MAX_SEQ),
        dtype=_dtype(found.dtype),
        attention=None if found.attention is None else _choice(found.attention, ("fused", "xla"), "--attention"),
        global_batches=_numbers(found.global_batch, "--global-batch"),
        space=name,
        rules=(*space.rules, *(pin(text) for text in found.pin), *(forbid(text) for text in found.forbid)),
        microbatches=_numbers(found.microbatches, "--microbatches"),
        schedules=_schedules(found.schedule),
        max_stages=min((n for n in (given, space.max_stages) if n is not None), default=None),
        max_tp=_optional(found.max_tp, "--max-tp"),
        time_limit_s=_seconds(found.time_limit),
        explain=found.explain,
        top=_optional(found.top, "--top", MAX_TOP) or 0,
        frontier=found.frontier,
        price_per_hour=_price(found.price),
        report=found.report,
        verify=found.verify,
        verify_model=found.verify_model or "",
        out=found.out or DEFAULT_OUT,
        out_given=found.out is not None,
        force=found.force,
        json=found.json,
        quiet=found.quiet,
        debug=found.debug,
    )


class Parser(argparse.ArgumentParser):
    """Errors are raised like all others instead of printed with a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the error with the command that helps."""
        raise GalvatronError(message, action=f"see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version; the package is asked only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from .. import __version__

        print(f"galvatron_jax {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s --mesh NODESxGPUS [options]\n       %(prog)s {explain,diff,report} PLAN ...",
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
                how = {"metavar": metavar, "type": kind, **SPECIAL.get(flag, {})}
                group.add_argument(flag, help=text, **how)
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


def _check_alone(found: argparse.Namespace, *names: str) -> None:
    given = ["--" + name.replace("_", "-") for name in names if getattr(found, name) is not None]
    if len(given) > 1:
        both = "both " * (len(given) == 2)
        raise GalvatronError(
            f"got {both}{' and '.join(sorted(given))}", expected="one of them", action="leave the others out"
        )


def _check_verifiable(found: argparse.Namespace, clusters: Sequence[Cluster]) -> None:
    """Refuse ``--verify`` where the compiler has no model, or several plans, to work on."""
    profiled = found.profile is not None or found.profile_from is not None
    if found.verify_model is not None and not (found.verify and profiled):
        raise GalvatronError(
            f"got --verify-model {found.verify_model!r}",
            expected="--verify and --profile FILE beside it" if found.verify else "--verify beside it",
            where="--verify-model",
            action="leave it out: a preset is compiled by its name",
        )
    if not found.verify:
        return
    if profiled and found.verify_model is None:
        raise GalvatronError(
            "--verify compiles models: a profile is none",
            expected="--verify-model MODULE:FUNCTION, the model of the profile",
            where="--verify",
            action="name it, or verify the plan itself: python -m galvatron_jax.verify PLAN --model MODULE:FUNCTION",
        )
    if len(clusters) > 1:
        raise GalvatronError(
            f"got {len(clusters)} meshes",
            expected="one mesh",
            where="--verify",
            action="verify the mesh that you chose",
        )


def _clusters(text: str) -> tuple[Cluster, ...]:
    clusters = tuple(parse_cluster(part) for part in text.split(","))
    if len(clusters) > MAX_MESHES:
        raise GalvatronError(f"got {len(clusters)} meshes", expected=f"at most {MAX_MESHES}", where="--mesh")
    return clusters


def peer_folder(words: list[str] | None) -> Path | None:
    """Return the folder of ``--profile-from TOOL DIR``; None without it.

    Raises:
        GalvatronError: the tool is unknown.
    """
    if words is None:
        return None
    _choice(words[0], ("galvatron",), "--profile-from")
    return Path(words[1])


def _schedules(text: str | None) -> tuple[ScheduleName, ...] | None:
    if text is None:
        return None
    names: tuple[ScheduleName, ...] = get_args(ScheduleName)
    asked = [_choice(part.strip(), names, "--schedule") for part in text.split(",")]
    return tuple(name for name in names if name in asked)


def _choice(text: str, names: Sequence[str], where: str) -> str:
    if text in names:
        return text
    close = difflib.get_close_matches(text, names, n=1)
    expected = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    action = f"did you mean {close[0]}?" if close else f"for example {where} {names[0]}"
    raise GalvatronError(f"got {text!r}", expected=expected, where=where, action=action)


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
    return None if name is None else _choice(name, ("bfloat16", "float16", "float32"), "--dtype")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text, flags=re.ASCII):
        return float(text)
    raise GalvatronError(f"got {text!r}", expected="seconds, for example 30", where="--time-limit")


def _price(text: str | None) -> float | None:
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text, flags=re.ASCII) and float(text) > 0:
        return float(text)
    raise GalvatronError(
        f"got {text!r}", expected="the price of one GPU hour, without a currency", where="--price",
        action="for example --price 2.50",
    )  # fmt: skip
