"""Calls the DeepSpeed launcher with `pretrain.py`, and passes signals to the ranks so that they can save.

DeepSpeed's own runner kills its ranks within a tenth of a second of an interrupt; this process stands before it in a
session of its own, so that Ctrl-C and SIGTERM arrive here, go to the ranks, and are answered by a checkpoint.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllama.errors import MissingExtraError
from train import accelerators
from train.nodes import Nodes

PRETRAIN = Path(__file__).with_name("pretrain.py")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, an end, and Slurm's warning of one


def launcher() -> list[str]:
    """The command of DeepSpeed's launcher, in this interpreter."""
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "train")
    return [sys.executable, "-m", "deepspeed.launcher.runner"]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks_below(pid: int) -> list[int]:
    """Process ids of the ranks (the processes that run `pretrain.py`, not the launchers that name it)."""
    import psutil

    found = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            line = child.cmdline()
            if (
                str(PRETRAIN) in line
                and "deepspeed.launcher.launch" not in line
                and "deepspeed.launcher.runner" not in line
            ):
                found.append(child.pid)
    except psutil.Error:
        pass
    return found


def runner_command(arguments: Sequence[str]) -> list[str]:
    """DeepSpeed's whole launcher: it looks for this machine's accelerators, or reaches the hosts of a hostfile by ssh."""
    if not any(argument.startswith(("--master_port", "--hostfile", "-H")) for argument in arguments):
        # DeepSpeed's fixed port would keep two runs from sharing a machine.
        arguments = [*arguments, "--master_port", str(free_port())]
    return [*launcher(), "--log_level", "warning", *arguments]


def node_command(nodes: Nodes) -> list[str]:
    """The part of DeepSpeed's launcher that starts one machine's ranks, where it is known which: seconds earlier."""
    # Of the other machines only the number of ranks counts here: each starts its own.
    slots = accelerators.slots(nodes.accelerators, os.environ.get("CUDA_VISIBLE_DEVICES"))
    world = json.dumps({f"node-{number}": slots for number in range(nodes.count)}).encode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level", "warning"]
    command += [f"--world_info={base64.urlsafe_b64encode(world).decode()}", f"--node_rank={nodes.rank}"]
    return [*command, f"--master_addr={nodes.master}", f"--master_port={nodes.port}"]


def launch(launcher: Sequence[str], script_arguments: Sequence[str]) -> int:
    """Run the launcher to its end; returns its exit code. Any of SIGNALS becomes SIGTERM for every rank."""
    import time

    command = [*launcher, str(PRETRAIN), *script_arguments]
    environment = {**os.environ, "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning")}
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, _: object) -> None:
        ranks = ranks_below(process.pid)
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        if not ranks:  # not started yet, or on other hosts: the launcher has to do it
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        while (code := process.poll()) is None:
            time.sleep(0.1)
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
