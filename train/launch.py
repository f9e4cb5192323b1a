"""Calls the DeepSpeed launcher with `pretrain.py`, and passes signals to the ranks so that they can save.

DeepSpeed's own runner kills its ranks within a tenth of a second of an interrupt; this process stands before it in a
session of its own, so that Ctrl-C, SIGTERM and the end of the terminal (SIGHUP) arrive here, go to the ranks, and are
answered by a checkpoint. If this process itself is killed, all that it has started is too.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllama import processes
from tinyllama.cli.app import print_error
from tinyllama.errors import MissingExtraError
from train import accelerators, heartbeat
from train.nodes import Nodes
from train.stopping import BEFORE, STOPPED_BY_SIGNAL, heeded

if TYPE_CHECKING:
    from tinyllama.locks import Lock

PRETRAIN = Path(__file__).with_name("pretrain.py")
OURS = (0, 2, 70, 74, STOPPED_BY_SIGNAL, heartbeat.HUNG)  # exit codes of pretrain.py that say all


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


def launch(launcher: Sequence[str], script_arguments: Sequence[str], run: Path, lock: Lock | None = None) -> int:
    """Run the launcher to its end; returns the exit code of the run. Any of the signals becomes SIGTERM for every rank.

    run: its directory. lock: of that directory; held until the last process of the run has ended, if this one is killed too.
    The handlers of signals stay: one that comes after the end changes nothing.
    """
    stopping: list[int] = []
    for number in heeded():
        signal.signal(number, lambda number, _: stopping.append(number))
    command = [*launcher, str(PRETRAIN), *script_arguments, *(["--lock", lock.token] if lock else [])]
    environment = {**os.environ, "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning")}
    with processes.guarded(environment, [lock.descriptor] if lock else []) as guarded:
        if stopping:
            print_error(BEFORE)
            return STOPPED_BY_SIGNAL
        process = subprocess.Popen(command, env=guarded, start_new_session=True)
        told: set[int] = set()
        while (code := process.poll()) is None:
            if stopping:
                _pass_on(process, told)
            time.sleep(0.1)
    ended = heartbeat.exit_codes(run, lock.token) if lock else []
    code = exit_code(code, bool(stopping), ended)
    if code == STOPPED_BY_SIGNAL and lock and not ended:  # no rank has said it
        print_error(BEFORE)
    return code


def _pass_on(process: subprocess.Popen[bytes], told: set[int]) -> None:
    """SIGTERM, once, to each rank that there is by now; to the launcher where there are none."""
    ranks = ranks_below(process.pid)
    # Without ranks: they are not started yet, or on other hosts, and the launcher has to do it.
    for pid in {*ranks} - told if ranks or told else {process.pid}:
        told.add(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def exit_code(code: int, stopped: bool, ended: Sequence[int]) -> int:
    """What a run's end means, from the launcher's code, whether a signal asked for it, and the codes of ranks that ended.

    DeepSpeed's launcher ends with 1 when it is stopped itself, and with 256 - N when a rank dies of signal N.
    """
    if code in OURS:
        return code
    killed = code < 0 or code > 128
    if stopped:
        others = [found for found in ended if found not in (0, STOPPED_BY_SIGNAL)]
        if others:
            return others[0]
        return 0 if ended and not any(ended) else STOPPED_BY_SIGNAL
    if killed:
        number = -code if code < 0 else 256 - code
        print_error(f"a process of the run was killed by signal {number}; run the same command again")
        return heartbeat.HUNG
    return code
