"""A real Slurm cluster of one node with two CPUs, for tests: its own munged, slurmctld and slurmd, all below one folder.

It needs root and the Debian packages slurm-wlm and munge, but neither cgroups nor accounting nor /etc/slurm.
Run as a program, this file is the keeper of one cluster: the parent of its daemons and, as their subreaper, of every
process that a job leaves behind. When it is told to end, or the test process is gone, it kills them all.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo")
START_SECONDS = 30

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
{bind}
AuthType=auth/munge
# A job that is requeued waits until its credential has expired: 120 seconds, unless told otherwise.
AuthInfo=socket={folder}/munge.sock,cred_expire=15
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
ReturnToService=2
MessageTimeout=30
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# Memory is asked for but not counted, and the node has what is written here, whatever the machine has.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000000 State=UNKNOWN
PartitionName=batch Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def _path() -> str:
    """PATH, with the folder of the daemons."""
    path = os.environ.get("PATH", os.defpath)
    return path if "/usr/sbin" in path.split(":") else f"{path}:/usr/sbin"


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm cluster needs Linux and root"
    absent = [tool for tool in TOOLS if not shutil.which(tool, path=_path())]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster below the empty `folder`; yield what the environment of its clients needs beside their own."""
    folder = folder.resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").touch(mode=0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "slurm.conf").write_text(_config(folder))
    env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}

    # Slurm's variables would be those of a job that runs the tests. A session of its own keeps Ctrl-C away.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    command = [sys.executable, __file__, str(folder)]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=folder, env=clean | env, start_new_session=True)
    try:
        _wait_until_idle(keeper, folder, env)
        yield env
    finally:
        keeper.terminate()
        keeper.communicate(timeout=60)


def wait_for_jobs(env: dict[str, str], timeout_s: float = 120) -> None:
    """Return when the queue is empty; RuntimeError after `timeout_s`, or once a job waits for one that has failed."""
    end = time.monotonic() + timeout_s
    while queue := _client(env, "squeue", "-h", "-o", "%i %j %T %M %r"):
        if "DependencyNeverSatisfied" in queue:
            raise RuntimeError(f"a job can never start:\n{queue}")
        if time.monotonic() > end:
            raise RuntimeError(f"jobs are left after {timeout_s:g} s:\n{queue}")
        time.sleep(0.25)


def _config(folder: Path) -> str:
    name = socket.gethostname()
    host = name.split(".")[0]  # Slurm compares it to `hostname -s`
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = one.getsockname()[1], other.getsockname()[1]
    # To listen on loopback alone, Slurm must find it under this machine's name.
    bind = ""
    with suppress(OSError):
        if socket.gethostbyname(name).startswith("127."):
            bind = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny"
    return CONFIG.format(host=host, ctld_port=ports[0], slurmd_port=ports[1], bind=bind, folder=folder)


def _client(env: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _wait_until_idle(keeper: subprocess.Popen[bytes], folder: Path, env: dict[str, str]) -> None:
    end, state = time.monotonic() + START_SECONDS, "no state"
    while keeper.poll() is None and time.monotonic() < end:
        try:
            state = _client(env, "sinfo", "-h", "-o", "%T")
        except RuntimeError as error:
            state = str(error)
        if state == "idle":
            return
        time.sleep(0.1)
    logs = [f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*.log"))]
    raise RuntimeError("\n".join([f"the Slurm cluster did not start: {state}", *logs]))


def _keep(folder: Path) -> None:
    """The keeper: start the daemons, wait for SIGTERM or the end of the test process, kill all that is below."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: slurmstepd leaves slurmd on purpose
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    # By force: pytest's folders are closed to others, who munged thinks should reach its socket.
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *files]
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with open(folder / f"{command[0]}.out.log", "wb") as log:
                daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while not (folder / "munge.sock").exists():
                if daemon.poll() is not None:
                    sys.exit("munged has ended")
                time.sleep(0.01)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the orphans
        sys.stdin.read()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            for child in children:  # whose own children then come here
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            time.sleep(0.01)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
