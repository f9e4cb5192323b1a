"""Process 1 of a program's world: waits for its verdict, and ends it all when a limit is passed.

Limits of the kernel hold for one process, but for a control group's, where there is one. What holds for all processes of a
program together is measured here, about a hundred times a second: memory, time, and processes where the kernel does not
count them.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from typing import Any

from evalsuite.containment.groups import Group
from evalsuite.containment.judged import FAILED, READY, REASON_CHARS, seal

PAUSE_S = 0.01
MOST_HEARD = 4096
MOST_REAPED = 256
HARD = 3  # times the limit on time, waiting for a processor included
MANY = 16  # threads, from which on a program yields to others
LOWEST = 19
UNSEEN = ("VmPTE", "VmSwap", "HugetlbPages")  # beside the pages in memory
PROCESS_BYTES = 64 << 10  # the kernel's own, for a process or a thread
MAPPING_BYTES = 320  # of each of its mappings
SHARED = "/dev/zero (deleted)"  # how the kernel lists shared anonymous memory
PAGE = os.sysconf("SC_PAGE_SIZE")
PIPE_BYTES = 16 * PAGE  # what a pipe may hold, as F_SETPIPE_SZ is refused
TICKS = os.sysconf("SC_CLK_TCK")


class Processes:
    """All processes of this process space, read through a descriptor of its /proc."""

    def __init__(self, descriptor: int, scratch: tuple[str, ...]) -> None:
        self.descriptor = descriptor
        self.scratch = scratch
        with socket.socket(socket.AF_UNIX) as one:
            # What is sent is charged to its sender up to here; as much again for options and the kernel's own.
            self.socket_bytes = 2 * one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)

    def _text(self, name: str) -> str:
        """A file of /proc, "" where the process is gone."""
        try:
            handle = os.open(name, os.O_RDONLY, dir_fd=self.descriptor)
        except OSError:
            return ""
        try:
            parts = []
            while part := os.read(handle, 1 << 16):
                parts.append(part)
            return b"".join(parts).decode(errors="replace")
        except OSError:
            return ""
        finally:
            os.close(handle)

    def end_first(self, score: str) -> None:
        """Have the kernel end the calling process, and those that it starts, before others when memory ends."""
        try:
            handle = os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=self.descriptor)
            os.write(handle, score.encode())
            os.close(handle)
        except OSError:
            return  # where it ends the supervisor, `server` gives the verdict

    def numbers(self) -> list[str]:
        return [name for name in os.listdir(self.descriptor) if name.isdigit() and name != "1"]

    def waited_s(self) -> float:
        """The longest that the main thread of any process was ready to run and had no processor."""
        found = [self._text(f"{name}/schedstat").split() for name in self.numbers()]
        return max((int(fields[1]) / 1e9 for fields in found if len(fields) > 1), default=0.0)

    def cpu_s(self) -> float:
        """Processor time of all, those that have ended included."""
        times = os.times()
        total = times.children_user + times.children_system
        for name in self.numbers():
            fields = self._text(f"{name}/stat").rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / TICKS  # utime, stime, cutime, cstime
        return total

    def memory(self, limit: int) -> tuple[int, int]:
        """Bytes that all hold together, and the number of threads; fewer of both where the limit is passed already. Pages
        that processes share count once.
        """
        private = unseen = threads = 0
        shared: dict[str, int] = {}
        for name in (numbers := self.numbers()):
            status = dict(line.split(":", 1) for line in self._text(f"{name}/status").splitlines() if ":" in line)
            private += _kib(status, "RssAnon")
            unseen += sum(_kib(status, kind) for kind in UNSEEN)
            threads += int(status.get("Threads", "0"))
            unseen += max(0, len(self._names(f"{name}/fd")) - 3) * PIPE_BYTES  # but for the standard three
            maps = self._text(f"{name}/maps")
            unseen += maps.count("\n") * MAPPING_BYTES
            if unseen > limit:
                return unseen, threads
            for line in maps.splitlines() if SHARED in maps else ():
                if line.endswith(SHARED):
                    span, _, offset, _, inode = line.split()[:5]
                    begin, end = (int(part, 16) for part in span.split("-"))
                    shared[inode] = max(shared.get(inode, 0), int(offset, 16) + end - begin)
        unseen += threads * PROCESS_BYTES + self.sockets() * self.socket_bytes
        unseen += sum(shared.values()) + sum(map(_used, self.scratch))
        if private + unseen > limit >= unseen and len(numbers) > 1:  # forked processes share most of their pages
            private = sum(self._proportional(name) for name in numbers)
        return private + unseen, threads

    def sockets(self) -> int:
        """How many there are: also those that wait to be accepted, and closed ones whose words nobody has read."""
        used = self._text("1/net/sockstat").split()
        return int(used[2]) if used[:2] == ["sockets:", "used"] else 0

    def yield_to_others(self) -> None:
        """Give all threads the lowest priority, which new ones inherit: what a program starts is its own cost."""
        for name in self.numbers():
            for thread in self._names(f"{name}/task"):
                try:
                    os.setpriority(os.PRIO_PROCESS, int(thread), LOWEST)
                except OSError:
                    continue  # it has ended

    def _names(self, folder: str) -> list[str]:
        """What a folder of /proc holds, nothing where the process is gone."""
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.descriptor)
        except OSError:
            return []
        try:
            return os.listdir(handle)
        except OSError:
            return []
        finally:
            os.close(handle)

    def _proportional(self, name: str) -> int:
        rollup = dict(line.split(":", 1) for line in self._text(f"{name}/smaps_rollup").splitlines() if ":" in line)
        if "Pss_Anon" in rollup:
            return _kib(rollup, "Pss_Anon")
        status = dict(line.split(":", 1) for line in self._text(f"{name}/status").splitlines() if ":" in line)
        return _kib(status, "RssAnon")


def _kib(fields: dict[str, str], name: str) -> int:
    return int(fields.get(name, "0").split()[0]) << 10


def _used(path: str) -> int:
    found = os.statvfs(path)
    return (found.f_blocks - found.f_bfree) * found.f_frsize + (found.f_files - found.f_ffree) * 1024


def watch(pipe: int, program: int, processes: Processes, group: Group | None, task: dict[str, Any]) -> dict[str, Any]:
    """The answer about a program that runs as process `program` and reports through a pipe: {"passed", "reason"}, or
    {"setup"} where it was not begun. Returns as soon as the verdict is certain; what still runs ends with this process.
    """
    os.set_blocking(pipe, False)
    ended = os.pidfd_open(program)
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    poll.register(ended, select.POLLIN)
    heard, started = b"", 0.0
    while True:
        ready = dict(poll.poll(PAUSE_S * 1000))
        part = _read(pipe)
        heard += part
        if pipe in ready and not part:
            poll.unregister(pipe)  # its other end is closed
        if heard and not started:
            started = time.monotonic()
        status = _reap(program)
        if status is not None or (heard and heard[:1] != READY):
            if heard[:1] != READY:
                return {"setup": heard.decode(errors="replace") or "the program's process ended before it began"}
            if group is not None and group.out_of_memory():
                return {"passed": False, "reason": out_of_memory(task)}
            return _judge(heard[1:] + _read(pipe), status or 0, program, task)
        if started and (reason := _passed_limit(processes, group, time.monotonic() - started, task)):
            return {"passed": False, "reason": reason}
        if len(heard) > MOST_HEARD:
            return {"passed": False, "reason": "the program wrote to where its verdict is expected"}


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 8192)
    except BlockingIOError:
        return b""


def _reap(program: int) -> int | None:
    """The program's status if it has ended. Others that have ended, and that nobody waits for, are collected; not all at
    once, as some programs make them faster than that.
    """
    found = None
    try:
        for which in (program, *[-1] * MOST_REAPED):
            process, status = os.waitpid(which, os.WNOHANG)
            if process == program:
                found = status
            elif process == 0 and which < 0:
                break
    except ChildProcessError:
        pass
    return found


def out_of_memory(task: dict[str, Any]) -> str:
    return f"out of memory: more than {task['memory_bytes'] >> 20} MiB in all processes together"


def _passed_limit(processes: Processes, group: Group | None, elapsed_s: float, task: dict[str, Any]) -> str:
    """Which limit is passed, in words; "" for none. Time in which others kept the processors from it is not the program's,
    but for what its own processes use: its clock runs at least as fast as they use the processors.
    """
    wall_s, memory_bytes = task["wall_s"], task["memory_bytes"]
    if group is not None and group.out_of_memory():
        return out_of_memory(task)
    if elapsed_s > wall_s:
        used_s = max(elapsed_s - processes.waited_s(), processes.cpu_s() / len(os.sched_getaffinity(0)))
        if used_s > wall_s or elapsed_s > HARD * wall_s:
            return f"timed out: stopped after {wall_s:g} s"
    held, threads = processes.memory(memory_bytes)
    if held > memory_bytes:
        return out_of_memory(task)
    if threads > MANY:
        processes.yield_to_others()
    if threads > task["processes"]:
        return f"too many processes: more than {task['processes']}, threads included"
    return ""


def _judge(told: bytes, status: int, program: int, task: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a program that has ended. It has passed if it ended by itself and said nothing but the seal."""
    code = os.waitstatus_to_exitcode(status)
    if code == 0 and told == seal(bytes.fromhex(task["secret"]), program):
        return {"passed": True, "reason": ""}
    if code == 1 and told.startswith(FAILED):
        return {"passed": False, "reason": told[1:].decode(errors="replace")[:REASON_CHARS]}
    cpu_s = task["limits"]["CPU"]
    used_s = os.times().children_user + os.times().children_system
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and used_s >= cpu_s):
        return {"passed": False, "reason": f"timed out: stopped after {cpu_s:g} s of processor time"}
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return {"passed": False, "reason": f"the program {how} before its tests were over"}


if sys.platform != "linux":
    raise ImportError("programs are contained on Linux alone")
