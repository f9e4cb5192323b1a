"""Processes that end with the one that started them, however it ends; and who a process is, for records on disk.

`guarded` is for whole families: whatever is started in the environment that it gives, and whatever those start in turn
(DeepSpeed's launcher and its ranks, vLLM's server, engine and workers), is killed once this process is gone, by a small
guardian beside it. `die_with_parent` is for a direct child, `watch` for anything else that must not outlive another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LINUX = sys.platform == "linux"
FAMILIES = "TINYLLAMA_FAMILIES"  # the marks of all guardians above a process
GUARDIAN = Path(__file__).with_name("guardian.py")
PR_SET_PDEATHSIG = 1
CLOSE_S = 35.0  # for a guardian to end its family
POLL_S = 0.2  # between two looks at a process where the kernel cannot tell its end


# -- Who a process is -------------------------------------------------------------------------------------------------


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot; None if there is none, or only its exit code is left.

    With the pid it names a process for as long as the machine is up: a pid alone is given to others again.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _pid_namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, as other processes, also of other machines, can know it."""

    host: str
    boot: str  # of the kernel since it started
    pids: str  # the namespace in which the pid means this process
    pid: int
    ticks: int | None

    @classmethod
    def this(cls) -> Owner:
        """This process."""
        boot = _read("/proc/sys/kernel/random/boot_id")
        return cls(platform.node(), boot, _pid_namespace(), os.getpid(), start_ticks(os.getpid()))

    @classmethod
    def of(cls, record: Any) -> Owner | None:
        """From a record read from a disk; None if it is none."""
        try:
            owner = cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})
        except (TypeError, KeyError):
            return None
        whole = isinstance(owner.pid, int) and isinstance(owner.ticks, int | None) and owner.pid > 0
        return owner if whole and all(isinstance(text, str) for text in (owner.host, owner.boot, owner.pids)) else None

    def is_alive(self) -> bool | None:
        """Whether it still runs; None if that cannot be told from here (another machine, another container)."""
        here = Owner.this()
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return False  # the machine has started anew since then
        if self.pids != here.pids:
            return None
        ticks = start_ticks(self.pid)
        return ticks is not None and self.ticks in (None, ticks)


# -- Ending with another ----------------------------------------------------------------------------------------------


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Called in a child: the kernel sends it a signal once the thread that started it ends. parent: that process's id.

    Ends at once if the parent is gone already. Give this up where the child is started by a thread that ends before it.
    """
    if not LINUX:
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def watch(pid: int, then: Callable[[], None]) -> None:
    """Call `then`, in a thread, once process `pid` (which need not be a parent) is gone."""
    ticks = start_ticks(pid)
    descriptor = None
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.pidfd_open(pid)

    def wait() -> None:
        if descriptor is not None and start_ticks(pid) == ticks:
            import select

            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll()
        while ticks is not None and start_ticks(pid) == ticks:
            time.sleep(POLL_S)
        if descriptor is not None:
            os.close(descriptor)
        then()

    threading.Thread(target=wait, name=f"watch {pid}", daemon=True).start()


@contextlib.contextmanager
def guarded(environment: Mapping[str, str] | None = None, keep: Sequence[int] = ()) -> Iterator[dict[str, str]]:
    """The environment for children that must not outlive this process, not even if it is killed; nor this block.

    environment: to start from, default this process's. keep: descriptors that stay open until the last of them has ended.
    """
    given = dict(os.environ if environment is None else environment)
    if not LINUX:
        yield given
        return
    mark = secrets.token_hex(16)
    given[FAMILIES] = ",".join(filter(None, (given.get(FAMILIES), mark)))
    given["SPT_NOENV"] = "1"  # vLLM's names for its processes would be written over the environment that tells them
    guardian = _Guardian(mark, keep)
    try:
        yield given
    finally:
        guardian.close()


class _Guardian:
    """The process that ends a family with this one; another where it is killed itself."""

    def __init__(self, mark: str, keep: Sequence[int]) -> None:
        self._keep, self._closing, self._mutex = keep, False, threading.Lock()
        self._text = f"PID = {os.getpid()}\nMARK = {mark.encode()!r}\n{GUARDIAN.read_text()}".encode()
        self._process = self._start()
        threading.Thread(target=self._replace, name="guardian", daemon=True).start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Its command line names nothing of ours, so that who kills by a name does not kill the guardian too.
        code = f"import sys; exec(sys.stdin.buffer.read({len(self._text)}))"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            pass_fds=self._keep,
            start_new_session=True,
        )
        self._tell(process, self._text)
        return process

    @staticmethod
    def _tell(process: subprocess.Popen[bytes], text: bytes) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(text)
            process.stdin.flush()

    def _replace(self) -> None:
        while True:
            self._process.wait()
            time.sleep(POLL_S)
            with self._mutex:
                if self._closing:
                    return
                self._process = self._start()

    def close(self) -> None:
        """End the family; waits for it."""
        with self._mutex:
            self._closing = True
            self._tell(self._process, b"\n")  # a fork of ours may hold this end too, so closing it may not do
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)


_GUARDS: list[Any] = []


def guard_from_now_on() -> None:
    """As `guarded`, for everything that this process will start, until its end."""
    if not _GUARDS:
        guard = guarded()
        os.environ.update(guard.__enter__())
        _GUARDS.append(guard)
