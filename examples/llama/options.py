"""The command line of the example, and the environment that JAX must find when it is first imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from galvatron_jax import Plan, load_plan
from galvatron_jax.errors import PlanError
from galvatron_jax.models import LlamaConfig, llama_config, model_names

DEFAULT_MODEL = "llama-tiny"
DEFAULT_GLOBAL_BATCH = 32
DEFAULT_VIRTUAL_DEVICES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to train and how, with every default filled in."""

    model: str
    config: LlamaConfig
    plan: Plan | None
    """None: ``auto_shard`` searches one for the visible devices."""
    plan_path: Path | None
    steps: int
    global_batch: int
    seq: int
    text: Path | None
    learning_rate: float
    seed: int
    devices: int | None
    """Number of virtual CPU devices; None: real accelerators when there are some."""
    log_every: int


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Return the options in ``arguments`` (default: the command line); a plan decides what it was made for.

    Raises:
        GalvatronError: the model or plan does not exist, or an option contradicts the plan.
        SystemExit: an option is unknown or out of range (2), or help was asked for (0).
    """
    given = _parser().parse_args(arguments)
    plan = load_plan(given.plan) if given.plan else None
    model = given.model or (plan.model.name if plan else DEFAULT_MODEL)
    config = llama_config(model)
    return Options(
        model=model,
        config=config,
        plan=plan,
        plan_path=given.plan,
        steps=given.steps,
        global_batch=_agreed(
            "--global-batch", given.global_batch, plan.global_batch if plan else None, DEFAULT_GLOBAL_BATCH
        ),
        seq=_agreed("--seq", given.seq, plan.model.seq if plan else None, config.seq),
        text=given.text,
        learning_rate=given.lr or default_learning_rate(config),
        seed=given.seed,
        devices=given.devices,
        log_every=given.log_every,
    )


def default_learning_rate(config: LlamaConfig) -> float:
    """Return 0.003 for models below 10 M parameters (tried with llama-tiny), else 0.0006 as GPT-3 125M.

    Source: Brown et al. 2020, arXiv:2005.14165, table 2.1.
    """
    return 3e-3 if config.parameter_count < 10_000_000 else 6e-4


PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
"""Virtual devices are threads that share a few cores: one may reach a collective minutes after the others. XLA ends the
process after 40 seconds by default."""


def device_environment(options: Options, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set before JAX is imported.

    Args:
        options: ``devices`` virtual CPU devices are used even where GPUs are. When it is None the CPU is divided all
            the same (into as many devices as the plan needs, or 8), which only matters when JAX finds no GPU.
        environment: The present variables; a device count in ``XLA_FLAGS`` is respected unless ``devices`` is given.
    """
    flags = environment.get("XLA_FLAGS", "").split()
    chosen = [flag for flag in flags if "xla_force_host_platform_device_count" in flag]
    if chosen and options.devices is None:
        return {}
    count = options.devices or (options.plan.cluster.devices if options.plan else DEFAULT_VIRTUAL_DEVICES)
    kept = [flag for flag in flags if flag not in chosen]
    changes = {"XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={count}", PATIENCE])}
    return changes | ({"JAX_PLATFORMS": "cpu"} if options.devices else {})


def _agreed(flag: str, given: int | None, planned: int | None, default: int) -> int:
    """What the user gave, or the plan says, or the default; the first two must not differ."""
    if given and planned and given != planned:
        raise PlanError(
            f"got {given}, the plan is for {planned}", expected="equal numbers", where=flag, action=f"leave {flag} out"
        )
    return given or planned or default


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python examples/llama/train.py", description="Train a Llama on text as bytes, sharded by a plan."
    )
    add = parser.add_argument
    add("--model", help=f"{', '.join(model_names())} (default: the plan's, or {DEFAULT_MODEL})")
    add("--plan", type=Path, metavar="FILE", help="plan of python -m galvatron_jax.search (default: search one now)")
    add("--steps", type=_positive_int, default=60, help="optimizer steps (default: 60)")
    add("--global-batch", type=_positive_int, help=f"sequences per step (default: plan's, or {DEFAULT_GLOBAL_BATCH})")
    add("--seq", type=_positive_int, help="tokens per sequence (default: the plan's, or the model's)")
    add("--text", type=Path, metavar="PATH", help="file or folder (default: Python's library and licence texts)")
    add("--lr", type=_positive_float, help="peak learning rate (default: by model size)")
    add("--seed", type=_whole, default=0, help="weights and order of the text (default: 0)")
    add("--devices", type=_positive_int, metavar="N", help="N virtual CPU devices, even where there are GPUs")
    add("--log-every", type=_positive_int, default=5, metavar="STEPS", help="steps between lines (default: 5)")
    return parser


def _positive_int(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive whole number")


def _whole(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number, 0 or more")


def _positive_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if 0 < number < math.inf:
        return number
    raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
