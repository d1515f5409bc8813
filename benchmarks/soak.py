"""Soak: a run in several processes, killed at random again and again, must lose nothing and need nobody.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 3 --processes 1 --devices 8
    python benchmarks/soak.py --minutes 5 --steps 300 --stages 2        # a pipeline, its stages in different processes

First an undisturbed control run; then the same run under the supervisor while processes are killed (SIGKILL), asked to
stop (SIGTERM), frozen (SIGSTOP, with several processes: the others' watchdogs must notice), and files of the newest
checkpoint damaged, at random moments from a seed. When the time is over it is left alone until it ends. Then every
step's batch, loss and gradient norm must equal the control run's with ``==``, and so must the last checkpoint's arrays.
Prints one JSON line (--record keeps it); exit code 0 when nothing was lost. Choose --steps so that the run lasts longer
than --minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import orbax.checkpoint

from galvatron_jax.analysis import analyse_model
from galvatron_jax.cluster import Cluster
from galvatron_jax.plan import Plan, PlanRun, Stage, Strategy, model_reference, save_plan
from galvatron_jax.train import load_config
from galvatron_jax.train._build import build_subject
from galvatron_jax.train._trackers import read_metrics

REPOSITORY = Path(__file__).parents[1]

RUN = """
[model]
changes = {{layers = 2, embed = 32, mlp = 64, heads = 4, kv_heads = 2}}
[data]
seq = 32
global_batch = 16
max_bytes = 1_000_000
max_skipped_share = 0.01
[optimizer]
learning_rate = 3e-3
[run]
folder = "{folder}"
steps = {steps}
devices = {devices}
{plan}
compile_cache = "{cache}"
[checkpoint]
every = 20
timeout_s = 60
[log]
every = 100
[policy]
stall_s = 20
"""


def main() -> int:
    """Run the soak; return 0 when nothing was lost."""
    given = parse_arguments()
    folder = Path(given.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    control = launch(given, folder, "control")
    if control.wait() != 0:
        print("the control run failed", file=sys.stderr)
        return 1
    control_s = time.monotonic() - start
    soaked = launch(given, folder, "soaked")
    disturbances = disturb(soaked, folder / "soaked", random.Random(given.seed), given.minutes * 60, given.pause)
    code = soaked.wait()
    lost = differences(folder / "control", folder / "soaked") if code == 0 else [f"exit code {code}"]
    result = {
        "date": datetime.date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 1),
        "minutes": round((time.monotonic() - start - control_s) / 60, 1),
        "control_minutes": round(control_s / 60, 1),
        "steps": given.steps,
        "processes": given.processes,
        "devices_of_each": given.devices,
        "stages": given.stages,
        "disturbances": disturbances,
        "attempts": (folder / "soaked.log").read_text().count("starting again") + 1,
        "lost": lost,
    }
    print(json.dumps(result))
    if given.record:
        Path(given.record).write_text(json.dumps(result, indent=2) + "\n")
    return bool(lost)


def launch(given: argparse.Namespace, folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Start one run under the supervisor; its words go to ``NAME.log``."""
    file = folder / f"{name}.toml"
    settings = {"folder": folder / name, "steps": given.steps, "devices": given.devices, "cache": folder / "compiled"}
    file.write_text(RUN.format(**settings, plan=""))
    if given.stages > 1:
        plan = save_plan(pipeline(file, given), folder / "plan.json")
        file.write_text(RUN.format(**settings, plan=f'plan = "{plan}"'))
    supervisor = ["-m", "galvatron_jax.train.launch", "--restarts", "10000", "--grace", "10"]
    return subprocess.Popen(
        [sys.executable, *supervisor, "--processes", str(given.processes), str(file)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        stdout=(folder / f"{name}.log").open("wb"),
        stderr=subprocess.STDOUT,
    )


def pipeline(file: Path, given: argparse.Namespace) -> Plan:
    """Return a plan of equal stages for the model of a run file, data parallel in each."""
    config = load_config(file)
    subject, batch, seq = build_subject(config.model), config.data.global_batch or 0, config.data.seq or 0
    tokens = jax.ShapeDtypeStruct((batch // given.stages, seq), np.int32)
    profile = analyse_model(subject.build, subject.loss, {"inputs": tokens, "targets": tokens}, name="soak").profile
    kinds = [run.kind for run in profile.layers for _ in range(run.count)]
    devices = given.processes * given.devices // given.stages
    strategy, share = Strategy(dp=devices, zero=1), len(kinds) // given.stages
    ends = [*(share * (k + 1) for k in range(given.stages - 1)), len(kinds)]
    parts = [kinds[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Plan(
        model=model_reference(profile),
        cluster=Cluster(nodes=given.processes, gpus_per_node=given.devices, gpu="cpu"),
        global_batch=batch,
        microbatches=given.stages,
        stages=tuple(
            Stage(devices=devices, runs=tuple(PlanRun(kind=kind, count=1, strategy=strategy) for kind in part))
            for part in parts
        ),
    )


def disturb(
    supervisor: subprocess.Popen[bytes], folder: Path, dice: random.Random, duration_s: float, pause_s: float
) -> dict[str, int]:
    """Do harm at random moments until the time is over or the run has ended; return what was done how often."""
    done: dict[str, int] = {}
    end = time.monotonic() + duration_s
    while time.monotonic() < end and supervisor.poll() is None:
        time.sleep(dice.uniform(0.2, 2) * pause_s)
        children = processes_of(supervisor.pid)
        if not children:
            continue
        what = dice.choices(("kill", "terminate", "damage", "stop"), weights=(8, 3, 2, 1 if len(children) > 1 else 0))[
            0
        ]
        if what == "damage":
            if not damage_newest(folder / "checkpoints", dice):
                continue
            what, number = "damage and kill", signal.SIGKILL
        else:
            number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}[what]
        try:
            os.kill(dice.choice(children), number)
        except ProcessLookupError:
            continue
        done[what] = done.get(what, 0) + 1
    return done


def processes_of(parent: int) -> list[int]:
    """Return the children of a process that run Python (from /proc)."""
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def damage_newest(folder: Path, dice: random.Random) -> bool:
    """Flip one bit in a file of the newest checkpoint, unless it is the only one."""
    steps = sorted(folder.glob("step_????????"))
    if len(steps) < 2:
        return False
    files = [path for path in steps[-1].rglob("*") if path.is_file() and path.name != "_CHECKPOINT_METADATA"]
    try:
        file = dice.choice(files)
        content = bytearray(file.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    except (OSError, IndexError, ValueError):  # it went away meanwhile, or was empty
        return False
    return True


def differences(control: Path, soaked: Path) -> list[str]:
    """Return what the disturbed run has otherwise than the control run."""
    expected, found = trace(control), trace(soaked)
    lost = [
        f"step {step}: {found.get(step)}, not {numbers}"
        for step, numbers in expected.items()
        if found.get(step) != numbers
    ]
    before, after = arrays(control), arrays(soaked)
    lost += [f"array {name}" for name in before if name not in after or not np.array_equal(before[name], after[name])]
    return lost[:10]


def trace(folder: Path) -> dict[int, tuple[Any, ...]]:
    """Return (batch, loss, gradient norm) by step, of the last time that each was taken."""
    return {r["step"]: (r["batch"], r["loss"], r["gradient_norm"]) for r in read_metrics(folder) if "loss" in r}


def arrays(folder: Path) -> dict[str, Any]:
    """Return the arrays of the last checkpoint, read onto one device."""
    newest = sorted((folder / "checkpoints").glob("step_????????"))[-1]
    leaves = json.loads((newest / "galvatron.json").read_text())["leaves"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]), sharding=place)
        for name, leaf in leaves.items()
    }
    ocp: Any = orbax.checkpoint  # its public names are not marked as such
    return {name: np.asarray(value) for name, value in ocp.StandardCheckpointer().restore(newest, wanted).items()}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Kill a run at random; nothing may be lost.")
    parser.add_argument("--minutes", type=float, default=30.0, help="of disturbance (default: 30)")
    parser.add_argument("--steps", type=int, default=10_000, help="of the run (default: 10000)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2, help="virtual CPU devices of each process")
    parser.add_argument("--pause", type=float, default=30.0, help="mean seconds between two disturbances, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", type=int, default=1, help="of the plan; by default it is searched")
    parser.add_argument("--record", help="file for the result")
    parser.add_argument("--folder", default="/tmp/galvatron_soak")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
