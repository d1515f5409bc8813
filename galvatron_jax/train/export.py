"""``python -m galvatron_jax.train.export RUN FOLDER``: a checkpoint of a run as a Llama that ``transformers`` loads.

Writes ``config.json`` and safetensors, one file after the other; needs no device and no optimizer state, and never
holds more than one file in memory. Exit codes: 0 done, 2 bad input, 4 damaged checkpoint or full disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, GalvatronError
from ..models.huggingface import write_llama
from ._build import llama_of
from ._identity import read_config
from .checkpoint import CheckpointReader


def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    given = _parser().parse_args(argv)
    try:
        step, files = export_run(
            given.run,
            given.folder,
            step=given.step,
            dtype=given.dtype,
            shard_bytes=given.shard_mib * 2**20,
            force=given.force,
        )
    except GalvatronError as error:
        printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in error.message)
        print(f"galvatron_jax.train.export: error: {printable}", file=sys.stderr)
        return error.exit_code
    print(f"step {step} as {given.dtype}: wrote {', '.join(path.name for path in files)} in {given.folder}")
    return 0


def export_run(
    run: Path, folder: Path, *, step: int | None = None, dtype: str = "float32", shard_bytes: int, force: bool = False
) -> tuple[int, list[Path]]:
    """Export a checkpoint of a run; return its step and the files.

    Raises:
        ConfigError: the run's folder holds no run, or one of a model that is no Llama of ours.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DocumentError: the folder has weights already, or cannot be written.
    """
    config = read_config(run)
    if config is None:
        raise ConfigError("holds no run", expected="the [run] folder of a run", where=str(run), action="check the path")
    reader = CheckpointReader(run / "checkpoints", step)
    llama = llama_of(config.model)
    return reader.step, write_llama(
        folder,
        llama,
        reader.parameters,
        dtype=dtype,  # type: ignore[arg-type]  # one of the choices of the flag
        shard_bytes=shard_bytes,
        force=force,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m galvatron_jax.train.export",
        description="Write a checkpoint of a run as config.json and safetensors, for transformers.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the folder of the run")
    add("folder", type=Path, metavar="FOLDER", help="where to write")
    add("--step", type=int, help="the checkpoint's step (default: the newest)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the stored weights")
    add("--shard-mib", type=int, default=4096, metavar="MIB", help="most MiB in one file (default: 4096)")
    add("--force", action="store_true", help="replace an earlier export")
    return parser


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")  # no GPU is needed, and none that others use is to be touched
    sys.exit(main(sys.argv[1:]))
