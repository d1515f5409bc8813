"""Where a process stands: from arguments, from our variables, from SLURM, from mpirun, or alone."""

from __future__ import annotations

import socket

import pytest

from galvatron_jax.distributed import FIRST_PORT, ProcessPlace, _check_port, find_place, first_host
from galvatron_jax.errors import DistributedError

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "12345.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def test_nothing_said_is_one_process() -> None:
    assert find_place({}) is None
    assert find_place({"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_slurm_step_with_eight_tasks_per_node() -> None:
    assert find_place(SLURM) == ProcessPlace(
        coordinator=f"gpu03:{FIRST_PORT + 3}",
        processes=16,
        process=9,
        local_processes=8,
        local_process=1,
        source="SLURM",
    )


def test_mpirun_on_two_nodes() -> None:
    assert find_place(MPIRUN) == ProcessPlace(
        coordinator=f"10.96.0.1:{FIRST_PORT + 12345 % 4096}",
        processes=4,
        process=3,
        local_processes=2,
        local_process=1,
        source="mpirun",
    )


def test_mpirun_on_one_node_needs_no_address() -> None:
    place = find_place({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_MCA_orte_hnp_uri": ""})
    assert place is not None
    assert place.coordinator.startswith("127.0.0.1:")


def test_arguments_come_before_variables_and_variables_before_slurm() -> None:
    ours = {"GALVATRON_COORDINATOR": "b:2", "GALVATRON_PROCESSES": "2", "GALVATRON_PROCESS": "1"}
    found = [find_place({**SLURM, **ours}, "a:1", 3, 0), find_place({**SLURM, **ours})]
    assert [(p.coordinator, p.processes, p.process) for p in found if p] == [("a:1", 3, 0), ("b:2", 2, 1)]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu03", "gpu03"), ("gpu03,gpu04", "gpu03"), ("gpu[03-05,9],login", "gpu03"), ("n[7,9]", "n7")],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"GALVATRON_PROCESSES": "2"}, "all three"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "15"}, "15 tasks on 2 nodes.*ntasks-per-node"),
        ({**SLURM, "SLURM_PROCID": "16"}, "process 16 of 16"),
        ({**SLURM, "SLURM_PROCID": "-1"}, "SLURM_PROCID='-1'.*a number"),
        ({**MPIRUN, "OMPI_MCA_orte_hnp_uri": ""}, "does not say where process 0 is.*GALVATRON_COORDINATOR"),
    ],
)
def test_contradictions_are_refused_with_what_to_do(environ: dict[str, str], message: str) -> None:
    with pytest.raises(DistributedError, match=message):
        find_place(environ)


def test_coordinator_without_port_is_refused() -> None:
    with pytest.raises(DistributedError, match="host:port"):
        find_place({}, "node0", 2, 0)


def test_busy_port_is_named_before_jax_aborts() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DistributedError, match=f"port {port} of the coordinator is busy"):
            _check_port(ProcessPlace(coordinator=f"127.0.0.1:{port}", processes=2, process=0, source="test"))
