"""The command ``python -m galvatron_jax.train RUN.toml``: train, or go on training, and tell how it ended by a number.

    0 done · 2 bad input · 3 nothing fits · 4 the environment failed · 5 not finite · 75 preempted and saved: start me
    again · 130 interrupted and saved

stdout carries the table, stderr warnings and errors. An error is one message; ``--debug`` adds its traceback.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import GalvatronError
from ._config import RunConfig, load_config

INTERNAL_ERROR = 1

PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
"""Virtual devices are threads that share a few cores: one may reach a collective minutes after the others. XLA ends the
process after 40 seconds by default."""


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    given = _parser().parse_args(argv)
    try:
        config = load_config(given.run, _settings(given))
        os.environ.update(device_environment(config.run.devices, os.environ))
        return _train(config, given)
    except GalvatronError as error:
        return _fail(f"error: {error.message}", error.exit_code, debug=given.debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug=given.debug)
    except Exception as error:
        action = "this is a fault of galvatron_jax: please report it with the output of --debug"
        return _fail(f"internal error: {type(error).__name__}: {error}; {action}", INTERNAL_ERROR, debug=given.debug)


def _train(config: RunConfig, given: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's own account of what we report ourselves
    # Not at the top: JAX reads its environment when it is imported.
    from ..distributed import initialize
    from ._goodput import describe
    from ._trainer import AutoTrainer

    place = initialize()
    trainer = AutoTrainer.from_config(
        config,
        override_config=given.override_config,
        allow_mismatch=given.allow_mismatch,
        retry_oom=given.retry_oom,
        retry_failed=given.retry_failed,
    )
    outcome = trainer.run()
    if place is not None and place.process > 0:
        return outcome.exit_code
    held_out = f", held-out loss {outcome.held_out_loss:.4f}" if outcome.held_out_loss is not None else ""
    loss = f", loss {outcome.loss:.4f}" if outcome.loss is not None else ""
    print(f"{outcome.status}: step {outcome.step}{loss}{held_out}; {describe(outcome.goodput)}", flush=True)
    if outcome.status in ("preempted", "interrupted"):
        print(f"saved in {trainer.folder}; the same command goes on from here", flush=True)
    return outcome.exit_code


def device_environment(devices: int | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set before JAX is imported.

    Args:
        devices: Virtual CPU devices of this process, even where there are GPUs; None: what is there.
        environment: The present variables.
    """
    if devices is None:
        return {}
    flags = [f for f in environment.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    patience = [] if any("terminate_timeout" in f for f in flags) else [PATIENCE]
    count = f"--xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": " ".join([*flags, *patience, count]), "JAX_PLATFORMS": "cpu"}


def _settings(given: argparse.Namespace) -> list[str]:
    """Flags that stand for keys of the run file, as ``section.key=value``."""
    flags = {
        "run.mesh": given.mesh,
        "run.plan": given.plan,
        "run.steps": given.steps,
        "run.folder": given.folder,
        "run.devices": given.devices,
        "run.profile": given.profile,
        "checkpoint.verify": None if given.verify == "on" else "false",
    }
    return [*given.set, *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m galvatron_jax.train",
        description="Train a model under a plan; a run that was stopped goes on where it was.",
        epilog="exit codes: 0 done, 2 bad input, 3 nothing fits, 4 environment, 5 not finite, 75 preempted and saved,"
        " 130 interrupted and saved",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN.toml", help="the run file")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a key of the run file")
    add("--steps", type=int, help="steps in all")
    add("--folder", help="where the run writes")
    add("--plan", metavar="FILE", help="plan of python -m galvatron_jax.search")
    add("--mesh", metavar="NODESxGPUS", help="the cluster; plans again when the plan was for another one")
    add("--devices", type=int, metavar="N", help="N virtual CPU devices, even where there are GPUs")
    add("--profile", metavar="FIRST:LAST", help="steps to trace with jax.profiler")
    add("--verify", choices=("on", "off"), default="on", help="checksums of checkpoints (default: on)")
    add("--override-config", action="store_true", help="resume with another learning rate or number of steps")
    add("--allow-mismatch", action="store_true", help="run a plan for another mesh on equally many devices")
    add("--retry-oom", type=int, default=0, metavar="N", help="plan again up to N times when memory runs out")
    add("--retry-failed", type=int, default=0, metavar="N", help="take a simpler plan up to N times when XLA fails")
    add("--debug", action="store_true", help="tracebacks")
    return parser


def _fail(message: str, status: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in message)
    print(f"galvatron_jax.train: {printable}", file=sys.stderr, flush=True)
    return status
