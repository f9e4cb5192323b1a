"""Several machines, each starting the same command by itself: no ssh between them, as Slurm, Kubernetes and people do.

The ranks find each other through the master, an address of the first machine. Torch-free.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Mapping

from tinyllama.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Nodes:
    """count machines of `accelerators` ranks each; this one is number `rank`."""

    count: int
    rank: int
    master: str
    port: int
    accelerators: int

    @property
    def ranks(self) -> int:
        return self.count * self.accelerators


def given(nodes: int, node_rank: int | None, master: str | None, accelerators: int) -> Nodes:
    """From the command line. ConfigError for what cannot be."""
    if nodes < 1 or node_rank is None or not 0 <= node_rank < nodes:
        raise ConfigError(f"--nodes {nodes} --node-rank {node_rank}", fix="number the machines from 0 to nodes - 1")
    host, colon, port = (master or "").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--master {master}", fix="give an address of machine 0 as HOST:PORT, the same on all")
    return Nodes(nodes, node_rank, host.strip("[]"), int(port), accelerators)


def from_slurm(environment: Mapping[str, str], accelerators: int) -> Nodes | None:
    """Under `srun` with a task a node, what Slurm says; None elsewhere. ConfigError with several tasks a node."""
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
    if nodes < 2 or "SLURM_NODEID" not in environment:
        return None
    if environment.get("SLURM_STEP_NUM_TASKS") != str(nodes):
        raise ConfigError(
            f"srun started {environment.get('SLURM_STEP_NUM_TASKS')} tasks on {nodes} nodes",
            fix="one starts all ranks of its node: srun --ntasks-per-node=1",
        )
    command = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 20000  # the same on all nodes, another for each job
    return Nodes(nodes, int(environment["SLURM_NODEID"]), hosts[0], port, accelerators)
