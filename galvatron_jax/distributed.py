"""Joining the processes of a run: from SLURM, from mpirun, or from what the user says.

    from galvatron_jax import distributed
    distributed.initialize()          # before anything else that uses JAX

The first that is there counts: the arguments; ``GALVATRON_COORDINATOR`` (host:port), ``GALVATRON_PROCESSES`` and
``GALVATRON_PROCESS``; a SLURM step (``srun``); Open MPI (``mpirun``); else one process, and nothing happens. With
several processes on a node each takes the GPU of its local number. The coordinator's port is neither authenticated nor
encrypted: trusted networks only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
from collections.abc import Mapping

from .errors import DistributedError

FIRST_PORT, PORTS = 61440, 4096
"""Jobs take ports of the ephemeral range by their number, so that two of them on a node rarely meet."""

COORDINATOR, PROCESSES, PROCESS = "GALVATRON_COORDINATOR", "GALVATRON_PROCESSES", "GALVATRON_PROCESS"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlace:
    """Where one process stands among all of a run."""

    coordinator: str
    """``host:port`` of process 0."""
    processes: int
    process: int
    local_processes: int = 1
    """On this node."""
    local_process: int = 0
    source: str
    """Who said so, for messages."""


_place: ProcessPlace | None = None


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_timeout_s: int = 100,
) -> ProcessPlace | None:
    """Join the processes of the run; return this one's place, None when there is only one.

    A second call does nothing.

    Args:
        coordinator: ``host:port`` of process 0; all three or none of the first arguments.
        processes: How many there are.
        process: Which one this is, from 0.
        heartbeat_timeout_s: After so long without a sign of a process all others are aborted.

    Raises:
        DistributedError: the environment contradicts itself, or the processes cannot be joined.
    """
    global _place
    place = _place or find_place(os.environ, coordinator, processes, process)
    if place is None or _place is not None:
        return place
    import jax  # late: reading the environment needs no devices

    if place.process == 0:
        _check_port(place)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            place.coordinator,
            num_processes=place.processes,
            process_id=place.process,
            local_device_ids=[place.local_process] if place.local_processes > 1 else None,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
        )
    except RuntimeError as error:
        raise DistributedError(
            f"process {place.process} of {place.processes} cannot join at {place.coordinator}: {error}",
            where=place.source,
            action="start all processes together, and call initialize before anything else that uses JAX",
        ) from error
    _place = place
    return place


def processes_per_node() -> int:
    """Return how many processes of the run share a node (1 when ``initialize`` was not called)."""
    return _place.local_processes if _place else 1


def find_place(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> ProcessPlace | None:
    """Return the place of this process from arguments and environment variables; None when it is the only one.

    Raises:
        DistributedError: they are incomplete or contradict themselves.
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given):
        place = _explicit(*given, source="initialize")
    elif any(name in environ for name in (COORDINATOR, PROCESSES, PROCESS)):
        count, index = _number(environ, PROCESSES), _number(environ, PROCESS)
        place = _explicit(environ.get(COORDINATOR), count, index, source=PROCESSES)
    elif "SLURM_STEP_NODELIST" in environ:
        place = _from_slurm(environ)
    elif "OMPI_COMM_WORLD_SIZE" in environ:
        place = _from_mpirun(environ)
    else:
        return None
    if not 0 <= place.process < place.processes:
        raise DistributedError(
            f"got process {place.process} of {place.processes}", expected="0 to one less", where=place.source
        )
    return place if place.processes > 1 else None


def _explicit(coordinator: str | None, processes: int | None, process: int | None, *, source: str) -> ProcessPlace:
    if coordinator is None or processes is None or process is None:
        raise DistributedError(
            f"got coordinator={coordinator}, processes={processes}, process={process}",
            expected="all three",
            where=source,
            action="for example coordinator='node0:61500', processes=2, process=0",
        )
    if not re.fullmatch(r".+:[0-9]{1,5}", coordinator):
        raise DistributedError(f"got coordinator {coordinator!r}", expected="host:port", where=source)
    return ProcessPlace(coordinator=coordinator, processes=processes, process=process, source=source)


def _from_slurm(environ: Mapping[str, str]) -> ProcessPlace:
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS") or _number(environ, "SLURM_NTASKS") or 1
    nodes = _number(environ, "SLURM_STEP_NUM_NODES") or 1
    if tasks % nodes:
        raise DistributedError(
            f"got {tasks} tasks on {nodes} nodes",
            expected="equally many on each node",
            where="SLURM",
            action="set --ntasks-per-node",
        )
    port = FIRST_PORT + (_number(environ, "SLURM_JOB_ID") or 0) % PORTS
    return ProcessPlace(
        coordinator=f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        processes=tasks,
        process=_number(environ, "SLURM_PROCID") or 0,
        local_processes=tasks // nodes,
        local_process=_number(environ, "SLURM_LOCALID") or 0,
        source="SLURM",
    )


def _from_mpirun(environ: Mapping[str, str]) -> ProcessPlace:
    size, local = _number(environ, "OMPI_COMM_WORLD_SIZE") or 1, _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    address = re.search(r"tcp6?://\[?([^,:\]]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
    if size > local and address is None:
        raise DistributedError(
            f"mpirun started {size} processes on several nodes and does not say where process 0 is",
            where="OMPI_COMM_WORLD_SIZE",
            action=f"pass it: mpirun -x {COORDINATOR}=host:port -x {PROCESSES}=... (see galvatron_jax.distributed)",
        )
    host = address[1] if size > local and address else "127.0.0.1"
    job = re.match(
        r"[0-9]+", environ.get("OMPI_MCA_orte_hnp_uri", environ.get("PMIX_NAMESPACE", "").rpartition("-")[2])
    )
    return ProcessPlace(
        coordinator=f"{host}:{FIRST_PORT + (int(job[0]) if job else 0) % PORTS}",
        processes=size,
        process=_number(environ, "OMPI_COMM_WORLD_RANK") or 0,
        local_processes=local,
        local_process=_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK") or 0,
        source="mpirun",
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list, for example ``"gpu[03-05,9],login"`` → ``"gpu03"``."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+))?", nodes)
    if match is None:
        raise DistributedError(
            f"got node list {nodes!r}", expected="for example gpu[03-05]", where="SLURM_STEP_NODELIST"
        )
    return match[1] + (match[2] or "")


def free_port() -> int:
    """Return a port of this machine that is free now (another process may take it before it is used)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_port(place: ProcessPlace) -> None:
    """Refuse a port that somebody listens on: JAX would abort the process."""
    port = int(place.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise DistributedError(
                f"port {port} of the coordinator is busy: {error.strerror}",
                where=place.source,
                action=f"choose another one: {COORDINATOR}=host:port, with {PROCESSES} and {PROCESS}",
            ) from error


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise DistributedError(f"got {name}={text!r}", expected="a number", where="environment")
    return int(text)
