"""Several machines, each starting the same command by itself: no ssh between them, as Slurm, Kubernetes and people do.

The ranks find each other through the master, an address of the first machine. Torch-free.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tinyllama.errors import ConfigError

GIVE = "give --nodes, --node-rank and --master"


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
    nodes = slurm_nodes(environment)
    if nodes < 2 or "SLURM_NODEID" not in environment:
        return None
    if environment.get("SLURM_STEP_NUM_TASKS") != str(nodes):
        raise ConfigError(
            f"srun started {environment.get('SLURM_STEP_NUM_TASKS')} tasks on {nodes} nodes",
            fix="one starts all ranks of its node: srun --ntasks-per-node=1",
        )
    rank, job = (_number(environment, name) for name in ("SLURM_NODEID", "SLURM_JOB_ID"))
    command = ["scontrol", "show", "hostnames", environment.get("SLURM_STEP_NODELIST", "")]
    try:
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        master = hosts[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise ConfigError(f"{' '.join(command)} names no host ({reason})", fix=GIVE) from None
    port = 20000 + job % 20000  # the same on all nodes, another for each job
    return Nodes(nodes, rank, master, port, accelerators)


def slurm_nodes(environment: Mapping[str, str]) -> int:
    """On how many machines `srun` has started this; 1 elsewhere."""
    return _number(environment, "SLURM_STEP_NUM_NODES") if environment.get("SLURM_STEP_NUM_NODES") else 1


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is not what Slurm writes", fix=GIVE)
    return int(text)


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host of a DeepSpeed hostfile. ConfigError for what DeepSpeed refuses, or takes for this machine alone."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--hostfile {path} cannot be read ({reason})", fix="give a DeepSpeed hostfile") from None
    found: dict[str, int] = {}
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=([0-9]+)", line)
        if match is None or match[1] in found or not int(match[2]):
            raise ConfigError(f"--hostfile {path}: {line!r}", fix="write each host once, as: HOST slots=8")
        found[match[1]] = int(match[2])
    if not found:
        raise ConfigError(f"--hostfile {path} names no host", fix="write each host on a line, as: HOST slots=8")
    return found
